"""What a handle refers to, found anew by name: tensors may be replaced behind its back.

``load_state_dict(assign=True)``, ``model.fc = nn.Linear(...)`` and ``fully_shard`` put other
tensors, or other modules, where those were that the model had when it was adapted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from toolkit.core.adapt.layer import AdaptedLayer

WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names under which torch's own wrappers keep the module that they wrap."""


def modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The base's own modules under their names in the base, one in several places several times."""
    while isinstance(model, AdaptedLayer):
        model = model.base
    yield name, model
    for part, child in model._modules.items():
        if child is not None:
            yield from modules(child, f"{name}.{part}".lstrip("."))


def parameters(model: nn.Module, twice: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """The base's own parameters under their names in the base.

    Args:
        model: adapted or not.
        twice: give a tensor that has several names under each of them, not under the first only.
    """
    seen = set()
    for name, module in modules(model):
        for key, value in module._parameters.items():
            if value is not None and (twice or id(value) not in seen):
                seen.add(id(value))
                yield f"{name}.{key}".lstrip("."), value


def buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base's own persistent buffers, such as the statistics of batch normalisation."""
    for name, (module, key) in buffer_places(model).items():
        value = module._buffers[key]
        if value is not None:
            yield name, value


def buffer_places(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where the base's own persistent buffers lie, those included that hold nothing yet."""
    seen, found = set(), {}
    for name, module in modules(model):
        for key, value in module._buffers.items():
            kept = key not in module._non_persistent_buffers_set
            if kept and (value is None or id(value) not in seen):
                seen.add(id(value))
                found[f"{name}.{key}".lstrip(".")] = module, key
    return found


def put_buffers(model: nn.Module, values: Mapping[str, Tensor | None]) -> None:
    """Let the base's buffers of these names hold these numbers, or nothing where that is None."""
    for name, (module, key) in buffer_places(model).items():
        now, value = module._buffers[key], values.get(name)
        if name not in values:
            continue
        writable = now is not None and not now.is_inference()
        if writable and value is not None and now.shape == value.shape:
            now.copy_(value)
        else:  # filled, emptied, or put anew since
            like = value if now is None else now
            module._buffers[key] = None if value is None else value.clone().to(like.device)


def same(one: Tensor, other: Tensor | None) -> bool:
    """Whether two buffers hold the same numbers, NaN being the same as NaN."""
    if other is None or one.shape != other.shape:
        return False
    if one.is_meta or other.is_meta:
        return one.is_meta and other.is_meta
    if one.is_floating_point() and one.element_size() == 1:  # which cannot be compared
        one = one.float()
    other = other.to(one.device, one.dtype)
    return bool(((one == other) | ((one != one) & (other != other))).all())


def also_called(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """First name of each tied parameter -> its other names."""
    names: dict[int, list[str]] = {}
    for name, value in parameters(model, twice=True):
        names.setdefault(id(value), []).append(name)
    return {first: tuple(rest) for first, *rest in names.values() if rest}


def refuse_spread(model: nn.Module) -> None:
    """Raise ValueError for a base whose parameters lie on several processes already."""
    for name, value in parameters(model):
        if type(value) is not nn.Parameter and hasattr(value, "full_tensor"):
            raise ValueError(
                f"parameter {name!r} is sharded; put adapters on the model first and call "
                "fully_shard afterwards, so that their gradients are averaged too"
            )


def refuse_lazy(model: nn.Module) -> None:
    """Raise ValueError for parameters or buffers that have no shape yet."""
    for name, module in modules(model):
        own = () if isinstance(module, torch.jit.ScriptModule) else module._parameters.items()
        for key, value in (*own, *module._buffers.items()):
            if is_lazy(value):
                raise ValueError(
                    f"layer {name!r} ({type(module).__name__}) has no {key} yet (lazy); run one "
                    "batch through the model first"
                )


def refuse_meta(model: nn.Module) -> None:
    """Raise ValueError for parameters that have no memory to load into yet."""
    for name, value in parameters(model):
        if value.is_meta:
            raise ValueError(
                f"parameter {name!r} is on the meta device; load the base's own weights first"
            )


def parameter(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter that the model has under a name of its base, now.

    Raises:
        RuntimeError: there is none any more.
    """
    *path, leaf = name.split(".")
    module: nn.Module | None = model
    for part in path:
        module = _around(module, part)._modules.get(part)
        if module is None:
            break
    found = None if module is None else _around(module, leaf)._parameters.get(leaf)
    if found is None:
        raise RuntimeError(
            f"parameter {name!r} trains beside the adapters, but the model has none of that name "
            "any more; put its module back, or unload() and adapt the model again"
        )
    return found


def _around(module: nn.Module, part: str) -> nn.Module:
    """The module of that part, below adapters and torch's wrappers."""
    while True:
        own = module._modules
        if isinstance(module, AdaptedLayer):
            module = module.base
        elif part in own or part in module._parameters:
            return module
        elif inner := [own[w] for w in WRAPPED if own.get(w) is not None]:
            module = inner[0]
        else:
            return module


Links = list[tuple[nn.Module, str, nn.Module]]
"""Parent, attribute and child: every step of the ways from a model to its adapted layers."""


def stand(links: Links) -> bool:
    """Whether all links hold: a quick look, for every step."""
    return all(parent._modules.get(attribute) is child for parent, attribute, child in links)


def find(model: nn.Module, sites: Mapping[str, Any], part: str = "layer") -> Links:
    """Find the places of all sites anew, and the ways that lead to them.

    Args:
        model: the adapted, or merged, model.
        sites: name -> :class:`~toolkit.core.adapt.layer.Placed`; their places are renewed.
        part: what must be there: "layer", or "base" while merged.

    Raises:
        RuntimeError: a layer is no longer in the model.
    """
    above: dict[int, Links] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                above.setdefault(id(child), []).append((parent, attribute, child))
    wanted = {name: _of(placed, part) for name, placed in sites.items()}
    for name, module in wanted.items():
        if id(module) not in above:
            raise RuntimeError(
                f"adapted layer {name!r} is no longer in the model: something else was put in its "
                f"place. Put it back (it is adapted.sites[{name!r}].{_WHERE[part]}), or adapt the "
                "model anew"
            )
    links: Links = []
    seen, waiting = set(), [id(module) for module in wanted.values()]
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            links += above.get(one, [])
            waiting += [id(parent) for parent, _, _ in above.get(one, [])]
    for name, module in wanted.items():
        sites[name].places = [(parent, attribute) for parent, attribute, _ in above[id(module)]]
    return links


_WHERE = {"layer": "layer", "base": "layer.base"}


def _of(placed: Any, part: str) -> nn.Module:
    return placed.layer if part == "layer" else placed.layer.base
