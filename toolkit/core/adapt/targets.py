"""Which layers a method adapts: by name pattern, by layer type or by a callable."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from toolkit.core.adapt.sites import fits, kind_of

Targets = str | type | Callable[[str, nn.Module], bool] | Iterable["str | type"] | None
DEFAULT_KINDS = ("linear", "hf_conv1d", "attention")


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern names this module or parameter.

    A pattern with ``*``, ``?`` or ``[`` is matched against the whole dotted name; a plain one is
    the whole name or its last components, so ``"query"`` matches ``"layer.0.attention.query"``.
    """
    if any(mark in pattern for mark in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def select(
    model: nn.Module, targets: Targets, kinds: tuple[str, ...], exclude: Iterable[str] = ()
) -> dict[str, nn.Module]:
    """The layers that ``targets`` names, by name, in the model's order, each module once.

    Args:
        model: the network.
        targets: None for every Linear, transformers Conv1D and MultiheadAttention; a name pattern
            or a list of them (see :func:`matches`); a layer type or a list of them; or a callable
            ``(name, module) -> bool``.
        kinds: layer kinds the method accepts; matched modules that are no layers at all
            (containers caught by a wide pattern) are passed over.
        exclude: names of layers that stay as they are; layers inside them are still looked at.

    Raises:
        ValueError: nothing matched, or one name pattern of several matched nothing; the message
            shows the nearest names.
        TypeError: only modules that the method cannot adapt matched, or ``targets`` is of no
            accepted form.
    """
    exclude = set(exclude)
    modules = {name: module for name, module in model.named_modules() if name not in exclude}
    chosen = predicate(targets, kinds)
    hits = {name: module for name, module in modules.items() if chosen(name, module)}
    layers = {name: m for name, m in hits.items() if fits(m, kinds)}
    for pattern in (t for t in _as_list(targets) if isinstance(t, str)):
        if not any(matches(name, pattern) for name, _ in model.named_modules()):
            raise ValueError(_nothing(pattern, modules))
    if layers:
        named = {t for t in _as_list(targets) if isinstance(t, str)} & hits.keys()
        refused = sorted(named - layers.keys())
        if refused:
            raise TypeError(_refusal({name: hits[name] for name in refused}, kinds))
        return layers
    if hits:
        raise TypeError(_refusal(hits, kinds))
    passed = left_out(modules, targets, kinds, ())
    also = "".join(f"; {name!r} is left out: {why}" for name, why in [*passed.items()][:4])
    raise ValueError(_nothing(targets, modules) + also)


def left_out(
    modules: Mapping[str, nn.Module], targets: Targets, kinds: tuple[str, ...], taken: Any
) -> dict[str, str]:
    """Modules that targets name, that hold a matrix by their form and are not adapted, with why.

    Args:
        modules: those of the model, by name.
        targets: as in :func:`select`; None asks for what multiplies by its matrix.
        kinds: layer kinds the method accepts.
        taken: names of the sites, and of what stays as it is on purpose.
    """
    chosen = _multiplies if targets is None else predicate(targets, kinds)
    hits = {n: m for n, m in modules.items() if n not in taken and chosen(n, m)}
    return {n: why for n, m in hits.items() if (why := _matrix(m, kinds))}


def _multiplies(name: str, module: nn.Module) -> bool:
    """Whether a module that holds a matrix multiplies by it, as far as its form tells.

    Tables, such as positions, are looked up; they lie in modules that hold layers as well.
    """
    if not name or kind_of(module) not in (None, *DEFAULT_KINDS) or hasattr(module, "eps"):
        return False
    own = () if isinstance(module, torch.jit.ScriptModule) else module._parameters
    leaf = next(module.children(), None) is None
    return leaf or _packs(module) or any("weight" in key or "proj" in key for key in own)


def _packs(module: nn.Module) -> bool:
    """Whether a module is one of torch's quantised layers, whose weight is no parameter."""
    return callable(getattr(type(module), "weight", None))


def _matrix(module: nn.Module, kinds: tuple[str, ...]) -> str | None:
    """Why a module that holds a matrix by its form is not adapted, or None if it holds none."""
    name = f"{type(module).__module__}.{type(module).__name__}"
    if isinstance(module, torch.jit.ScriptModule):
        return f"{module.original_name} is compiled by TorchScript"
    if _packs(module):
        return f"{name} is quantised"
    if (kind := kind_of(module)) is not None:
        return f"{name} is of kind {kind}, on which the method does not act"
    tensors = [*module._parameters.items()]
    if "linear" in name.lower():  # as libraries for quantisation keep them
        tensors += module._buffers.items()
    for key, tensor in tensors:
        if is_lazy(tensor):
            return f"{name} has no {key} yet (lazy)"
        if tensor is not None and sum(n > 1 for n in tensor.shape) > 1:
            return f"{name} holds {key} {tuple(tensor.shape)}, but is no layer of a known kind"
    return None


def _as_list(targets: Any) -> list[Any]:
    if targets is None:
        return []
    if isinstance(targets, str | type) or callable(targets):
        return [targets]
    if not isinstance(targets, Iterable):
        raise TypeError(
            f"targets={targets!r}: pass name patterns, layer types or a callable (name, module)"
        )
    return list(targets)


def predicate(targets: Targets, kinds: tuple[str, ...]) -> Callable[[str, nn.Module], bool]:
    """Whether ``targets`` names a module, as a function of its name and the module."""
    if targets is None:
        usual = tuple(k for k in DEFAULT_KINDS if k in kinds) or kinds
        if "module" in usual:
            raise ValueError("targets: say which modules, for example targets='blocks.*'")
        return lambda _, module: fits(module, usual)
    wanted = _as_list(targets)
    if not wanted:
        raise ValueError("targets is empty; pass None for every linear layer, or name patterns")
    types = tuple(t for t in wanted if isinstance(t, type))
    patterns = [t for t in wanted if isinstance(t, str)]
    calls = [t for t in wanted if not isinstance(t, str | type)]
    if any(not callable(c) for c in calls):
        raise TypeError(
            f"targets={targets!r}: pass name patterns, layer types or a callable (name, module)"
        )
    return lambda name, module: (
        (bool(types) and isinstance(module, types))
        or any(matches(name, p) for p in patterns)
        or any(c(name, module) for c in calls)
    )


def _refusal(hits: dict[str, nn.Module], kinds: tuple[str, ...]) -> str:
    few = list(hits.items())[:4]
    shown = ", ".join(
        f"{n or '(the model)'}: {_matrix(m, kinds) or type(m).__name__}" for n, m in few
    )
    return (
        f"targets matched modules that cannot be adapted here ({shown}). This method accepts "
        f"layers of kind {', '.join(kinds)}; name such layers in targets"
    )


def _nothing(targets: Targets, modules: dict[str, nn.Module]) -> str:
    usable = [n for n, m in modules.items() if kind_of(m) is not None and n]
    ends = {n.rsplit(".", 1)[-1] for n in usable}
    near: list[str] = []
    for t in _as_list(targets):
        if isinstance(t, str):
            word = t.strip("*.?").rsplit(".", 1)[-1]
            near += difflib.get_close_matches(word, sorted(ends), n=3, cutoff=0.4)
            near += difflib.get_close_matches(t, usable, n=2, cutoff=0.5)
    near = list(dict.fromkeys(near)) or usable[:6]
    return (
        f"targets={targets!r} matches no layer. Nearest names: {near}. "
        "Patterns match whole dotted names; a plain word matches a name's last part"
    )
