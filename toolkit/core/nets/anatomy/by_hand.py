"""Blocks whose parts are named by hand, each name checked."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from toolkit.core.nets.anatomy.blocks import Block
from toolkit.core.nets.anatomy.form import inside, is_norm, join, matrix

FEED = ("up", "gate", "down", "gate_up")
ATTENTION = ("query", "key", "value", "qkv", "key_value", "output")
ROLES = (*ATTENTION, *(f"cross_{part}" for part in ATTENTION), *FEED)


def told(
    model: nn.Module,
    blocks: str | Sequence[str],
    layers: Mapping[str, str],
    norms: Sequence[str] = (),
    pre_norm: bool | None = None,
    width: int | None = None,
) -> tuple[Block, ...]:
    """The blocks that :meth:`toolkit.core.nets.anatomy.Anatomy.by_hand` describes.

    Raises:
        ValueError: as told there.
    """
    unknown = [part for part in layers if part not in ROLES]
    if unknown or not layers:
        said = f"{unknown[0]!r} is no role" if unknown else "no layer is given"
        near = nearest(unknown[0] if unknown else "", ROLES)
        raise ValueError(f"{said}; roles are {', '.join(ROLES)}.{near}")
    modules = dict(model.named_modules())
    found: list[str] = []
    for pattern in [blocks] if isinstance(blocks, str) else blocks:
        hits = [name for name in modules if _whole(name, pattern)]
        if not hits:
            raise ValueError(f"blocks: nothing is named {pattern!r}.{nearest(pattern, modules)}")
        found += [name for name in hits if name not in found]
    made = []
    for place in found:
        names = {part: _layer(modules, place, part, name) for part, name in layers.items()}
        stand = tuple(_layer(modules, place, "norms", name) for name in norms)
        wide = width or _stream(modules, names)
        for name in stand:
            if not is_norm(modules[name], wide):
                raise ValueError(f"norms: {name!r} is no norm of the stream's width {wide}.")
        made.append(_sorted(place, modules[place], wide, names, stand, pre_norm))
    return tuple(made)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message: the known names most like one, or nothing."""
    known = [one for one in known if one]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    last = name.rpartition(".")[2]
    near += [one for one in known if last and one.rpartition(".")[2] == last][:3]
    return f" Nearest: {', '.join(dict.fromkeys(near))}." if near else ""


def _whole(name: str, pattern: str) -> bool:
    # * stands for one part: with fnmatch alone it would reach inside the blocks as well
    return name.count(".") == pattern.count(".") and fnmatchcase(name, pattern)


def _layer(modules: dict[str, nn.Module], place: str, part: str, name: str) -> str:
    whole = join(place, name)
    if whole not in modules:
        known = [n[len(place) :].lstrip(".") for n in modules if inside(n, place)]
        raise ValueError(f"{part}: {place!r} has no {name!r}.{nearest(name, known)}")
    module = modules[whole]
    if part != "norms" and matrix(module) is None and not list(module.parameters(recurse=False)):
        kind = type(module).__name__
        below = [n for n in modules if inside(n, whole) and matrix(modules[n]) is not None]
        shown = f" Layers inside: {', '.join(below[:4])}." if below else ""
        raise ValueError(f"{part}: {whole!r} ({kind}) has no weight of its own.{shown}")
    return whole


def _stream(modules: dict[str, nn.Module], names: dict[str, str]) -> int:
    for part, name in names.items():
        ends = matrix(modules[name])
        if ends is not None and not part.startswith("cross_"):
            return ends[part in ("output", "down")]
        embed = getattr(modules[name], "embed_dim", None)
        if isinstance(embed, int):
            return embed
    raise ValueError(f"width: cannot be read from {', '.join(names.values())}; give it.")


def _sorted(
    place: str,
    module: nn.Module,
    width: int,
    names: dict[str, str],
    norms: tuple[str, ...],
    pre_norm: bool | None,
) -> Block:
    return Block(
        name=place,
        module=module,
        width=width,
        attention={p: n for p, n in names.items() if p not in FEED and not p.startswith("cross_")},
        cross_attention={
            p.removeprefix("cross_"): n for p, n in names.items() if p.startswith("cross_")
        },
        feed_forward={p: n for p, n in names.items() if p in FEED},
        norms=norms,
        pre_norm=pre_norm,
    )
