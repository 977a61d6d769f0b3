"""An adapted layer in its model's ``state_dict``: the frozen layer keeps its own names.

``fc.weight`` of the base stays ``fc.weight``, and the adapter stands beside it as ``fc.adapter.A``.
So the file that any library writes from an adapted model also loads into the plain base, and the
base's own files load into the adapted model. Names of older files, ``fc.base.weight``, load too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

PARTS = ("base", "adapter", "schedule")
"""Names of an adapted layer's own parts. A base that uses one of them is stored under ``base``."""


def hidden(layer: nn.Module) -> bool:
    """Whether ``base`` is left out of the names in the state dict."""
    base: Any = layer._modules["base"]
    own = base._modules.keys() | base._parameters.keys() | base._buffers.keys()
    return not own & set(PARTS)


def shorten(layer: nn.Module, state_dict: Any, prefix: str, _: Any) -> None:
    """Hook after ``state_dict``: take ``base.`` out of the names, in their order."""
    if not hidden(layer):
        return
    own = []
    for key in reversed(state_dict):  # what this layer wrote stands last
        if not key.startswith(prefix):
            break
        own.append(key)
    start = f"{prefix}base."
    for key in reversed(own):
        value = state_dict.pop(key)
        state_dict[prefix + key.removeprefix(start) if key.startswith(start) else key] = value
    versions = getattr(state_dict, "_metadata", None)
    if versions is not None:
        inner = start[:-1]
        for key in [k for k in versions if k == inner or k.startswith(start)]:
            versions[(prefix + key[len(start) :]).rstrip(".")] = versions[key]


def lengthen(layer: nn.Module, state_dict: Any, prefix: str) -> None:
    """Before a load: give the frozen layer's tensors the names they have in this module tree."""
    if not hidden(layer):
        return
    for key in [k for k in state_dict if k.startswith(prefix)]:
        rest = key.removeprefix(prefix)
        inner = f"{prefix}base.{rest}"
        if rest.partition(".")[0] not in PARTS and inner not in state_dict:
            state_dict[inner] = state_dict.pop(key)


def listen(layer: nn.Module, prefix: str, lists: tuple[Any, ...]) -> None:
    """Remember where a load reports, for :func:`report_short` once all parts have reported."""
    if hidden(layer):
        layer.__dict__["_reports"] = prefix, lists


def report_short(layer: nn.Module, _: Any) -> None:
    """Hook after a load: missing and unexpected names, and errors, as the state dict has them."""
    prefix, lists = layer.__dict__.pop("_reports", ("", ()))
    for found in lists:
        found[:] = [line.replace(f"{prefix}base.", prefix) for line in found]


def modifiers(layer: nn.Module) -> Mapping[str, str]:
    """What ``torch.distributed.checkpoint`` must know: name in the state dict -> part it is in."""
    base: Any = layer._modules["base"]
    if not hidden(layer):
        return {}
    names = [*base._parameters, *base._buffers, *base._modules]
    return dict.fromkeys(names, "base")


def whole(tensor: Tensor) -> Tensor:
    """A tensor without its graph; a sharded one is gathered from all processes."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor.detach() if gather is None else gather().detach()


ODD = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError)
"""What a computation raises over numbers of a kind it never made itself."""


def resume(controller: Any, state: Mapping[str, Tensor]) -> None:
    """Let a controller go on from a state.

    Raises:
        ValueError: it is of another method or of other layers, or holds what no run leaves behind.
    """
    own = controller.state()
    for key in own.keys() & state.keys():
        _refuse_odd(key, state[key], own[key])
    try:
        controller.load(state)
    except (*ODD, UnicodeDecodeError) as error:
        raise ValueError(
            f"the saved schedule of {controller.title} is damaged ({error})"
        ) from error


def _refuse_odd(key: str, value: Tensor, like: Tensor) -> None:
    floats = like.is_floating_point()
    if value.is_floating_point() != floats or (not floats and value.dtype != like.dtype):
        raise ValueError(f"the saved schedule's {key!r} is of {value.dtype}, not {like.dtype}")
    if not value.numel() or key.startswith("history."):
        return
    if floats and not bool(value.isfinite().all()):
        raise ValueError(f"the saved schedule's {key!r} holds numbers that are not finite")
    if not floats and value.dtype != torch.bool and bool((value < 0).any()):
        raise ValueError(f"the saved schedule's {key!r} holds negative numbers")
