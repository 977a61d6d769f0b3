"""Where something is put into a block: what a sub-layer reads and writes, and what trains beside.

All by form (:mod:`toolkit.core.nets.anatomy`), so a transformer of another library is read as ours
are. A block that keeps its feed-forward inline has no module to stand beside; so a layer of this
part stands around the whole block and acts where its sub-layers read and write, for the length of
one call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from toolkit.core.adapt.beside import first_input, on_tensor
from toolkit.core.adapt.load import among
from toolkit.core.adapt.targets import predicate
from toolkit.core.nets.anatomy import anatomy
from toolkit.core.nets.anatomy.blocks import Block, Map
from toolkit.core.nets.anatomy.form import feed_forward, inside
from toolkit.core.nets.anatomy.norms import crosses, norms_in

TITLES = {"mhsa": "attention", "ffn": "feed-forward"}
READERS = {"mhsa": ("query", "key", "value", "key_value", "qkv"), "ffn": ("gate", "up", "gate_up")}
CLASS = ("cls_token", "class_token", "class_embedding")
DISTILLATION = ("distillation_token", "dist_token")


@dataclass(frozen=True)
class Sublayer:
    """Names inside a block: the layers that read the normalised input, and the one that writes."""

    readers: tuple[str, ...]
    writer: str


class Plan(dict[Callable[..., bool], Any]):
    """The methods by pattern that :func:`toolkit.adapt` follows, and the sites decided over."""

    def __init__(self, methods: Mapping[Any, list[str]]):
        super().__init__({among(frozenset(names)): m for m, names in methods.items() if names})
        self.sites = [name for names in methods.values() for name in names]


def sublayers(block: nn.Module) -> dict[str, Sublayer]:
    """The places of one block: "mhsa", "ffn", or what of them it has."""
    seen, found = Map(block), {}
    own = [held for held in seen.attentions if not crosses(held.root, "")]
    rest = seen.rest("")
    # without attention the width of the stream is told by a norm
    widths = [own[0].width] if own else dict.fromkeys(out for _, out in rest.values())
    feeds = (feed_forward(rest, w) for w in widths if own or norms_in(seen.modules, "", w))
    parts = {"mhsa": own[0].layers if own else {}, "ffn": next((f for f in feeds if f), {})}
    for place, layers in parts.items():
        readers = tuple(layers[role] for role in READERS[place] if role in layers)
        writer = layers.get("output" if place == "mhsa" else "down")
        if readers and isinstance(block.get_submodule(readers[0]), nn.MultiheadAttention):
            writer = readers[0]  # reads the weight of its own output layer
        if readers and writer:
            found[place] = Sublayer(readers, writer)
    return found


def chosen(method: Any, model: nn.Module, targets: Any) -> list[Block]:
    """The blocks that targets name, all by default.

    Raises:
        ValueError: the model has no blocks of tokens, or targets name none of them.
    """
    name = type(method).__name__
    try:
        blocks = anatomy(model).blocks
    except ValueError as error:
        raise ValueError(f"{name} needs a network of tokens and blocks: {error}") from error
    if targets is None:
        return list(blocks)
    wanted = predicate(targets, ("module",))
    kept = [block for block in blocks if wanted(block.name, block.module)]
    if not kept:
        known = ", ".join(block.name for block in blocks)
        raise ValueError(f"targets={targets!r} names no block; {name} acts on {known}")
    return kept


def asked(method: Any) -> tuple[str, ...]:
    """The places of a method: one, or both as Houlsby's adapters."""
    return ("mhsa", "ffn") if method.place == "both" else (method.place,)


def check_places(method: Any, blocks: list[Block]) -> None:
    """Raise ValueError where a block lacks a place, with the places it has."""
    for block in blocks:
        there = sublayers(block.module)
        for place in asked(method):
            if place not in there:
                known = ", ".join(f'"{p}"' for p in there) or "none"
                raise ValueError(
                    f"{type(method).__name__}(place={method.place!r}): block {block.name!r} has no "
                    f"{TITLES[place]} that is recognised; places here: {known}"
                )


def holds(model: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether a parameter of the model bears one of these names."""
    return any(name.rpartition(".")[2] in names for name, _ in model.named_parameters())


class Names(tuple[str, ...]):
    """Names of parameters, for ``adapt(..., train=...)``: these and no others."""

    def __call__(self, name: str) -> bool:
        return name in self


def beside(model: nn.Module, method: Any = None, head: bool = True) -> Names:
    """What trains beside a method: final norm, head, and the norm that feeds an adapter.

    Args:
        model: the plain network.
        method: an adapter or a mixture, whose sub-layer's norm trains too; None for the others.
        head: whether what stands after the final norm trains.

    Returns:
        Names of parameters, as ``train`` takes them.

    Raises:
        ValueError: no blocks; or a norm that cannot be told, as the blocks are not pre-norm.
    """
    blocks = chosen(method, model, None)
    modules = dict(model.named_modules())
    order = {name: number for number, name in enumerate(modules)}
    last = max(blocks, key=lambda block: order[block.name])
    after = [n for n in modules if order[n] > order[last.name] and not inside(n, last.name)]
    norms = [n for n in norms_in(modules, "", last.width) if n in after]
    wanted = norms[:1]
    if head:
        wanted += [n for n in after if n not in wanted]
    for place in asked(method) if hasattr(method, "place") else ():
        for block in blocks:
            if block.pre_norm is not True or len(block.norms) != 2:
                raise ValueError(
                    f"block {block.name!r}: which norm feeds its {TITLES[place]} cannot be told; "
                    "name the norms in train yourself"
                )
            wanted.append(block.norms[("mhsa", "ffn").index(place)])
    own = {f"{n}.{p}" for n in wanted for p in modules[n]._parameters}
    return Names(name for name, _ in model.named_parameters() if name in own)


@contextlib.contextmanager
def acting(
    block: nn.Module,
    sublayer: Sublayer,
    name: str,
    read: Callable[[Tensor], Tensor | None],
    write: Callable[[Tensor], Tensor],
) -> Iterator[None]:
    """For one call: ``read`` sees what a sub-layer reads and may change it, ``write`` what leaves.

    ``read`` is called once for each layer that reads; None leaves the input as it is.
    """

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        new = read(first_input(name, args, kwargs))
        if new is None:
            return None
        if isinstance(_, nn.MultiheadAttention):
            return ((new, new, new, *args[3:]), {k: v for k, v in kwargs.items() if k not in QKV})
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"input": new})

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        return on_tensor(output, write)

    handles = []
    try:
        for reader in sublayer.readers:
            layer = block.get_submodule(reader)
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.get_submodule(sublayer.writer).register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


QKV = ("query", "key", "value")


def refuse_recomputing(block: nn.Module, name: str) -> None:
    """Raise RuntimeError for a block that runs again in the backward pass, without what acts."""
    if block.training and getattr(block, "gradient_checkpointing", False):
        raise RuntimeError(
            f"block {name!r} recomputes itself in the backward pass (gradient checkpointing), "
            "where an adapter between its layers is not seen; call "
            "model.gradient_checkpointing_disable()"
        )
