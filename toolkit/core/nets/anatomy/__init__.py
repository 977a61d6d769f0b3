"""Where attention, feed-forward and norms stand in a transformer, ours or another's.

Recognised by form, without importing the library that wrote the network::

    parts = anatomy(model)
    adapted = adapt(model, LoRA(rank=4), targets=parts.names("query", "value"))

What is not recognised is said by hand, with :meth:`Anatomy.by_hand`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from toolkit.core.nets.anatomy.blocks import Block, Map, find
from toolkit.core.nets.anatomy.by_hand import nearest, told
from toolkit.core.nets.anatomy.form import inside, parent

HELD = {"qkv": ("query", "key", "value"), "key_value": ("key", "value"), "gate_up": ("gate", "up")}
SELF = ("query", "key", "value", "output")
GROUPS = {
    "attention": SELF,
    "cross_attention": tuple(f"cross_{part}" for part in SELF),
    "feed_forward": ("up", "gate", "down"),
}
PARTS = (*SELF, *GROUPS["cross_attention"], *GROUPS["feed_forward"], "norm")


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The blocks of a model in order of registration, each once; those of an encoder come before
    those of its decoder."""

    blocks: tuple[Block, ...]

    def names(self, *parts: str) -> list[str]:
        """Dotted names of the layers with some roles, block by block, as `adapt` takes them.

        A layer that holds several roles in one (qkv, gate_up) is named for each of them, once.

        Args:
            parts: query, key, value, output; the same with `cross_` before it; up, gate, down;
                norm; or for all of a kind attention, cross_attention, feed_forward.

        Raises:
            ValueError: no part, an unknown one, or one that no block has.
        """
        unknown = [part for part in parts if part not in (*PARTS, *GROUPS)]
        if unknown or not parts:
            raise ValueError(
                f"parts={parts}: choose among {', '.join((*PARTS, *GROUPS))}."
                + nearest(unknown[0] if unknown else "", (*PARTS, *GROUPS))
            )
        wanted: dict[str, tuple[str, ...]] = {part: GROUPS.get(part, (part,)) for part in parts}
        found = [list(_roles(block)) for block in self.blocks]
        had = {part for rows in found for part, _ in rows}
        for part, members in wanted.items():
            if not had & set(members):
                raise ValueError(
                    f"{part}: no block has it; they have {', '.join(sorted(had))}. If it is there "
                    "and not recognised, say where, with Anatomy.by_hand."
                )
        roles = {role for members in wanted.values() for role in members}
        return list(dict.fromkeys(name for rows in found for part, name in rows if part in roles))

    def under(self, place: str) -> Anatomy:
        """Only the blocks inside one module, such as `"vision_model"` or `"decoder"`.

        Raises:
            ValueError: there is none.
        """
        kept = tuple(block for block in self.blocks if inside(block.name, place))
        if not kept:
            known = list(dict.fromkeys(parent(block.name) for block in self.blocks))
            raise ValueError(f"{place!r} holds no block; they stand in {', '.join(known)}.")
        return Anatomy(kept)

    @classmethod
    def by_hand(
        cls,
        model: nn.Module,
        blocks: str | Sequence[str],
        norms: Sequence[str] = (),
        pre_norm: bool | None = None,
        width: int | None = None,
        **layers: str,
    ) -> Anatomy:
        """Say where the parts of a model's blocks are; every name is checked in every block.

        Args:
            model: the network.
            blocks: names of the blocks, `*` for one part of a name, as in `"encoder.layer.*"`.
            norms: names of the norms inside a block, in the order in which they act.
            pre_norm: whether they act first; None leaves it open.
            width: of the stream; left out, read from the layers given.
            layers: role to name inside a block, as in `query="attention.self.query"`: query, key,
                value, qkv, key_value, output; these with `cross_`; up, gate, down, gate_up.

        Raises:
            ValueError: no such block, role or name, with the nearest that there are; a name that
                is no layer with a weight, or no norm; or no width to be read.
        """
        return cls(told(model, blocks, layers, norms, pre_norm, width))


def anatomy(model: nn.Module) -> Anatomy:
    """Where the parts of a transformer stand.

    Recognised are stacks of blocks with attention (query, key and value in three layers or one,
    of `nn.Linear`, transformers' Conv1D or `nn.MultiheadAttention`) and feed-forward (plain or
    gated), and stacks of feed-forwards with norms. Several stacks, wrapped and shared blocks may
    occur.

    Args:
        model: the network; a single block will do.

    Where shapes leave roles or the place of the norms open, words in names decide (`q_proj`,
    `gate`, `input_layernorm`). Mixtures of experts count as blocks without feed-forward.

    Raises:
        ValueError: no block is recognised; the message tells what came near.
    """
    found = find(model)
    if not found:
        raise ValueError(_unrecognised(model))
    return Anatomy(found)


def _roles(block: Block) -> Iterator[tuple[str, str]]:
    crossing = {f"cross_{part}": name for part, name in block.cross_attention.items()}
    for part, name in {**block.attention, **crossing, **block.feed_forward}.items():
        prefix = "cross_" if part in crossing else ""
        bare = part.removeprefix("cross_")
        yield from ((prefix + role, name) for role in HELD.get(bare, (bare,)))
    yield from (("norm", name) for name in block.norms)


def _unrecognised(model: nn.Module) -> str:
    seen = Map(model)
    near = [
        f"an attention {found.root or '(the model)'} outside any block" for found in seen.attentions
    ]
    last = None
    for name, module in seen.modules.items():
        stack = isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
        if not stack or (last is not None and inside(name, last)):
            continue
        last = name
        kinds = ", ".join(dict.fromkeys(type(child).__name__ for child in module))
        layers = [n for n in seen.layers if inside(n, name)]
        shown = f"linear layers {', '.join(layers[:4])}" if layers else "no linear layer"
        near.append(f"a stack {name or '(the model)'} of {len(module)} ({kinds}): {shown}")
    return (
        f"{type(model).__name__} holds no block that is recognised. Looked for attention (three "
        "layers named for query, key and value, or one with three times the width, beside an "
        "output layer) and feed-forward (up from the width, down to it) inside one module. Near: "
        f"{'; '.join(near[:4]) or 'nothing'}. If it has blocks, name their parts: "
        'Anatomy.by_hand(model, blocks="layers.*", query=..., value=..., up=..., down=...).'
    )
