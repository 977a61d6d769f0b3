"""Where prompts can stand: the blocks of a transformer, and refusals of all else by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from toolkit.core.adapt import targets as patterns
from toolkit.core.adapt.load import among
from toolkit.core.adapt.sites import kind_of
from toolkit.core.nets.anatomy.blocks import find
from toolkit.core.nets.anatomy.form import inside, parent

SHOWN = 6
"""Names in a message."""


class Plan(Mapping[Any, Any]):
    """One method on exactly these places.

    Attributes:
        sites: their names.
    """

    def __init__(self, method: Any, sites: list[str]):
        self.sites = tuple(sites)
        self._methods = {among(frozenset(sites)): method}

    def __getitem__(self, key: Any) -> Any:
        return self._methods[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)


def decide(method: Any, model: nn.Module, targets: Any) -> Plan | None:
    """The places of prompts; nothing where they are just what targets names.

    Without targets they are all blocks, or the first for shallow prompts. A pattern such as
    ``"blocks.*"`` names what is inside the blocks as well: the outermost modules are taken.

    Args:
        method: with ``form`` and ``info``.
        model: as it is before anything is put on it.
        targets: as :func:`toolkit.adapt` takes them.

    Raises:
        TypeError: the network, or a place that was named, reads no tokens; places are listed.
        ValueError: there is no place of that name, or more than one for shallow prompts, or
            several stacks of blocks and none was named.
    """
    known = [block.name for block in find(model) if block.attention or block.cross_attention]
    if targets is None:
        return Plan(method, _all(method, model, known))
    chosen = patterns.predicate(targets, method.info.kinds)
    names = [n for n, m in model.named_modules() if n and chosen(n, m)]
    if not names:
        raise ValueError(
            f"targets={targets!r} names no module of the model; it has "
            + (f"the blocks {_few(known)}" if known else f"the places {_few(_layers(model))}")
        )
    called = [n for n in names if _is_called(model.get_submodule(n))]
    outer = [n for n in called if not any(n != other and inside(n, other) for other in called)]
    for name in outer:
        if patterns.fits(model.get_submodule(name), method.info.kinds):
            _refuse_tokenless(model, name, known)
    if method.form == "shallow" and len(outer) > 1:
        raise ValueError(
            f"targets={targets!r} names {len(outer)} modules ({_few(outer)}), but shallow prompts "
            f"enter once; name the first block alone, {outer[0]!r}, or use form='deep'"
        )
    return None if outer == names else Plan(method, outer)


def _is_called(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList | nn.ModuleDict)


def _all(method: Any, model: nn.Module, known: list[str]) -> list[str]:
    if not known:
        raise TypeError(_tokenless(model) + "; or, if it has blocks, name them in targets")
    stacks = list(dict.fromkeys(parent(name) for name in known))
    if len(stacks) > 1:
        raise ValueError(
            f"targets: the model has blocks in {', '.join(map(repr, stacks))}; say which, as "
            f"targets={stacks[0] + '.*'!r}"
        )
    return known[:1] if method.form == "shallow" else known


def _refuse_tokenless(model: nn.Module, name: str, known: list[str]) -> None:
    """Raise TypeError for a module that is told by its form to read no tokens."""
    if known:
        if not any(inside(name, block) or inside(block, name) for block in known):
            raise TypeError(
                f"targets: {name!r} is in no block, so it reads no sequence of tokens; the blocks "
                f"are {_few(known)}"
            )
    elif any(kind_of(module) == "conv" for module in model.get_submodule(name).modules()):
        raise TypeError(_tokenless(model))


def _tokenless(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} has no tokens: no attention is recognised in it, and prompts are "
        f"read by attention alone. Its places are {_few(_layers(model))}; put a method on weights "
        "there, such as LoRA, whose factors can be pre-trained just as well"
    )


def _layers(model: nn.Module) -> list[str]:
    modules = model.named_modules()
    return [f"{n} ({type(m).__name__})" for n, m in modules if n and kind_of(m) is not None]


def _few(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "none") + more
