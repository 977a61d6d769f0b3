"""Where the modules of one method go in one model: told by form, checked, refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from toolkit.core.adapt import targets as names
from toolkit.core.adapt.load import among
from toolkit.core.adapt.put import refuse_busy
from toolkit.core.baselines.houlsby import Houlsby
from toolkit.core.nets.anatomy import Anatomy, anatomy
from toolkit.core.nets.anatomy.blocks import Block
from toolkit.core.nets.anatomy.form import common, inside, parent
from toolkit.insert.connected_peft_ir.asides import Aside, Tap


class Plan(Mapping[Any, Any]):
    """Methods by the modules they go to.

    Attributes:
        places: name of a module -> the method that goes there, in the model's order.
        blocks: names of the blocks.
    """

    def __init__(self, places: Mapping[str, Any], blocks: Sequence[str]):
        self.places, self.blocks = dict(places), list(blocks)
        by_method: dict[Any, list[str]] = {}
        for name, method in places.items():
            by_method.setdefault(method, []).append(name)
        self._methods = {among(frozenset(at)): method for method, at in by_method.items()}

    @property
    def sites(self) -> list[str]:
        """Names of the modules that are taken."""
        return list(self.places)

    def __getitem__(self, key: Any) -> Any:
        return self._methods[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)


def planned(method: Any, model: nn.Module, targets: Any) -> Plan:
    """The plan of :meth:`toolkit.insert.connected_peft_ir.Connected.decided`."""
    refuse_busy(model)
    blocks = chosen(model, targets)
    places: dict[str, Any] = {}
    for stack in stacks(blocks):
        for number, block in enumerate(stack):
            aside = Aside(rank=method.rank, features=block.width, act=method.act, std=method.std)
            if method.variant == "layer":
                places[block.name] = aside
            elif method.variant == "stream":
                places[block.name] = _changed(
                    aside, place="stream", order=_order(number, len(stack)), inject=method.inject
                )
            elif method.variant == "sublayer":
                places |= _attention(block, aside) | _feed_forward(block, aside)
            if method.inside == "adapters":
                adapter = Houlsby(width=method.narrow, act=method.act)
                places |= dict.fromkeys(_outputs(block), adapter)
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    places = {name: places[name] for name in sorted(places, key=order.__getitem__)}
    return Plan(places, [block.name for block in blocks])


def chosen(model: nn.Module, targets: Any) -> list[Block]:
    """The blocks that targets name.

    Raises:
        ValueError: none is recognised, or one pattern names none; the blocks are listed.
    """
    found = list((targets if isinstance(targets, Anatomy) else anatomy(model)).blocks)
    known = ", ".join(block.name or "(the model)" for block in found)
    if targets is not None and not isinstance(targets, Anatomy):
        wanted = [targets] if isinstance(targets, str) or callable(targets) else list(targets)
        if not wanted:
            raise ValueError(f"targets is empty; the blocks are {known}")
        for one in wanted:
            hit = names.predicate(one, ("module",))
            if not any(hit(block.name, block.module) for block in found):
                raise ValueError(f"targets={one!r} names no block; the blocks are {known}")
        hit = names.predicate(wanted, ("module",))
        found = [block for block in found if hit(block.name, block.module)]
    return found


def stacks(blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks that follow one another, by the module that holds them."""
    found: dict[str, list[Block]] = {}
    for block in blocks:
        found.setdefault(parent(block.name), []).append(block)
    return list(found.values())


def _order(number: int, count: int) -> str:
    if count == 1:
        return "only"
    return "first" if number == 0 else "last" if number == count - 1 else "inner"


def _changed(aside: Aside, **fields: Any) -> Aside:
    return dataclasses.replace(aside, **fields)


def _outputs(block: Block) -> list[str]:
    """The last layers of attention and of feed-forward, after which adapters stand."""
    found = [block.attention.get("output"), block.feed_forward.get("down")]
    if None in found:
        raise _no_place(block, "inside adapters", 'inside="none"')
    return [name for name in found if name is not None]


def _within(place: str, block: Block) -> bool:
    return place != block.name and inside(place, block.name)


def _holds(block: Block, place: str) -> bool:
    """Whether a norm of the block stands directly in a place."""
    return any(parent(norm) == place for norm in block.norms)


def _beside(block: Block, last: str | None, readers: Sequence[str]) -> tuple[str, str] | None:
    """Where an aside around a sub-layer stands: module and kind of place."""
    if last is None or not readers:
        return None
    holder = parent(last)
    apart = not any(inside(name, holder) for name in readers)
    if _within(holder, block) and apart and _holds(block, holder):
        return holder, "residual"  # as in BERT: this module adds the stream, then normalises
    whole = common([holder, *(n if inside(last, n) else parent(n) for n in readers)])
    if _within(whole, block) and not any(inside(norm, whole) for norm in block.norms):
        return whole, "beside"
    return None


def _attention(block: Block, aside: Aside) -> dict[str, Aside]:
    last = block.attention.get("output")
    found = _beside(block, last, [n for r, n in block.attention.items() if r != "output"])
    if found is None:
        raise _no_place(block, "an aside around attention", 'variant="layer" or "stream"')
    return {found[0]: _changed(aside, place=found[1])}


def _feed_forward(block: Block, aside: Aside) -> dict[str, Any]:
    last = block.feed_forward.get("down")
    found = _beside(block, last, [n for r, n in block.feed_forward.items() if r != "down"])
    if found is not None:
        return {found[0]: _changed(aside, place=found[1])}
    if last is not None and block.pre_norm and len(block.norms) == 2 and block.name:
        # the block's last sum: what is added to its output is added beside the feed-forward
        return {block.norms[-1]: Tap(), block.name: _changed(aside, place="tapped")}
    raise _no_place(block, "an aside around the feed-forward", 'variant="layer" or "stream"')


def _no_place(block: Block, what: str, remedy: str) -> ValueError:
    return ValueError(
        f"block {block.name!r} ({type(block.module).__name__}) has no place for {what}: recognised "
        f"are attention {list(block.attention) or 'none'}, feed-forward "
        f"{list(block.feed_forward) or 'none'}, norms {len(block.norms)}; use {remedy}, or say "
        "where the parts are with targets=Anatomy.by_hand(...)"
    )
