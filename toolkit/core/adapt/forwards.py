"""How a frozen layer is called: by the plain map of its kind, or by a forward of its own.

A layer's own forward (a subclass, a replaced ``forward``, a compiled layer) may scale, standardise,
quantise or pad as it likes. It is then called with the new weight in the old one's place, so that
an adapted layer and a merged one are the same map, whatever that map is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

_FORWARDS = frozenset(
    cls.forward
    for cls in (
        nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention,
        nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
        nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    )
)  # fmt: skip
_CONVOLVE = frozenset(cls._conv_forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def has_own_forward(layer: nn.Module) -> bool:
    """Whether calling a layer is more, or other, than the plain map of its kind, hooks aside."""
    cls, own = type(layer), layer.__dict__
    return (
        "forward" in own
        or "_call_impl" in own
        or layer._compiled_call_impl is not None
        or cls.__call__ is not nn.Module.__call__
        or cls._call_impl is not nn.Module._call_impl
        or (cls.forward not in _FORWARDS and not _is_hf_conv1d(cls))
        or "_conv_forward" in own
        or getattr(cls, "_conv_forward", nn.Conv1d._conv_forward) not in _CONVOLVE
    )


def _is_hf_conv1d(cls: type) -> bool:
    """transformers' Conv1D and not a subclass that calls it otherwise."""
    own = [c for c in cls.__mro__ if "forward" in vars(c) and c is not nn.Module]
    return cls.__name__ == "Conv1D" and len(own) == 1


def has_own_hooks(layer: nn.Module) -> bool:
    """Whether a layer carries hooks."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


def is_hooked(layer: nn.Module) -> bool:
    """Whether hooks, its own or those of all modules, may change what goes in or comes out."""
    # those of all modules cannot be looked for while compiling
    everywhere = not torch.compiler.is_compiling() and has_any_global_hook()
    return everywhere or has_own_hooks(layer)


def frozen(layer: nn.Module, parameter: str, name: str) -> Tensor:
    """A layer's parameter, for a change of it.

    Raises:
        RuntimeError: the layer no longer holds it, since it was pruned, parametrised or offloaded.
    """
    weight = layer._parameters.get(parameter)
    if weight is None:
        raise RuntimeError(
            f"layer {name!r} no longer holds its {parameter} as a parameter, but computes it: it "
            "was pruned or parametrised after it was adapted. Make that final first "
            "(torch.nn.utils.prune.remove, remove_weight_norm, "
            "parametrize.remove_parametrizations), or unload()"
        )
    if weight.is_meta and "_hf_hook" in layer.__dict__:
        raise RuntimeError(
            f"layer {name!r} was offloaded after it was adapted, so its {parameter} holds no "
            "numbers here; merge() before offloading, or load the model whole"
        )
    return weight


def refuse_offloaded(adapter: nn.Module) -> None:
    """Raise RuntimeError for an adapter whose numbers a library keeps elsewhere between calls.

    accelerate's hooks put copies in place for each call, in which gradients would be lost, and look
    for the frozen weight under another name than the state dict has.
    """
    if any(p.is_meta for p in adapter.parameters()):
        name = getattr(getattr(adapter, "site", None), "name", "")
        raise RuntimeError(
            f"layer {name!r} was offloaded after it was adapted, so its adapter holds no numbers "
            "here and cannot train; merge() before offloading, or load the model whole"
        )


def refuse_trace(name: str, values: tuple[Any, ...]) -> None:
    """Raise TypeError in traces that cannot follow hooks or parameters that are put in place."""
    if torch.jit.is_tracing() or any(isinstance(value, fx.Proxy) for value in values):
        raise TypeError(
            f"layer {name!r} has hooks or a forward of its own, or its new weight is formed at "
            "each call, which torch.fx and torch.jit cannot trace; merge() first, and trace the "
            "plain model"
        )


def call_with(
    layer: nn.Module, values: dict[str, Tensor], name: str, args: tuple[Any, ...], kwargs: Any
) -> Any:
    """Output of a layer's own forward with these parameters in place of its own.

    Raises:
        TypeError: inside a trace of torch.fx or torch.jit.
        RuntimeError: the output does not depend on the parameters.
    """
    refuse_trace(name, (*args, *kwargs.values(), *values.values()))
    output = _densely(layer, values, args, kwargs)
    if (
        isinstance(output, Tensor)
        and not output.requires_grad
        and torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and any(value.requires_grad for value in values.values())
    ):
        raise RuntimeError(
            f"layer {name!r} ({type(layer).__name__}) does not use its {', '.join(values)} in its "
            "own forward, or detaches it, so no adapter can act there; leave it out of targets"
        )
    return output


def _densely(layer: nn.Module, values: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
    """The call, without the sparse gradient of an embedding, which no adapter could take on."""
    if not getattr(layer, "sparse", False):
        return functional_call(layer, values, args, kwargs)
    layer.sparse = False
    try:
        return functional_call(layer, values, args, kwargs)
    finally:
        layer.sparse = True
