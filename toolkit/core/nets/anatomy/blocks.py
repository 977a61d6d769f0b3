"""Which modules of a network are its blocks, and what stands in each, by form alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from toolkit.core.nets.anatomy.attentions import Attention, attentions
from toolkit.core.nets.anatomy.form import Shapes, feed_forward, inside, join, parent, shapes
from toolkit.core.nets.anatomy.norms import Norms, crosses, norms_in

SCALES = ("ls", "layerscale", "layer_scale", "layer_scale_parameter", "gamma", "lambda")


@dataclass(frozen=True, eq=False)
class Block:
    """One block of a transformer. All names are dotted names in the whole model.

    Attributes:
        name: of the block's module; empty when the model is the block.
        module: the block.
        width: numbers per token of the stream.
        attention: layer of each role: query, key, value (or qkv in one; or query and key_value)
            and output, if there is one. Of `nn.MultiheadAttention` qkv is that module itself,
            whose `in_proj_weight` holds all three. Empty when no self-attention is recognised.
        cross_attention: the same of the attention to another stack's tokens, empty if none.
        feed_forward: layer of each role: up, down, and gate if there is one (or gate_up in one).
            Empty when there is none, or many side by side (a mixture of experts); where one expert
            is shared, that one.
        norms: norms of the stream's width, in the order in which they act, or of registration where
            the form does not tell (more than one for each part).
        pre_norm: True when each norm acts before its attention or feed-forward, False when after
            the sum, None when the form does not tell. (BART and OPT are alike in all but this.)
            Where names decide they are believed, though `layernorm_before` of Swin V2 acts after.
        scales: LayerScale modules or parameters.
    """

    name: str
    module: nn.Module = field(repr=False)
    width: int
    attention: Mapping[str, str] = field(default_factory=dict)
    cross_attention: Mapping[str, str] = field(default_factory=dict)
    feed_forward: Mapping[str, str] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    pre_norm: bool | None = None
    scales: tuple[str, ...] = ()


class Map:
    """A model's modules under all their names, its linear layers and attentions."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.first = {id(module): name for name, module in model.named_modules()}
        self.layers: Shapes = shapes(self.modules)
        self.attentions = attentions(self.modules, self.layers)
        self.taken = {name for found in self.attentions for name in found.layers.values()}

    def canonical(self, name: str) -> str:
        """The name under which `named_modules` lists a module that has several."""
        return self.first[id(self.modules[name])]

    def rest(self, place: str) -> Shapes:
        """The linear layers in a place that belong to no attention."""
        return {n: s for n, s in self.layers.items() if inside(n, place) and n not in self.taken}


def find(model: nn.Module) -> tuple[Block, ...]:
    """The blocks of a model in order of registration, each once; empty when there is none.

    A block is the smallest module that holds an attention and a feed-forward, or the member of a
    stack that holds an attention. In a network without attention (MLP-Mixer, ConvNeXt) it is the
    smallest member of a stack that holds a feed-forward and a norm of its width.
    """
    seen = Map(model)
    places: dict[str, Attention | None] = {}
    for found in seen.attentions:
        if (place := _place(seen, found)) is not None:
            places.setdefault(place, found)
    if not seen.attentions:
        places = dict.fromkeys(_without_attention(seen))
    stacked = [place for place in places if any(map(_numbered, _up(place)))]
    order = {name: number for number, name in enumerate(seen.modules)}
    made: dict[int, Block] = {}
    # where there is a stack, a lone block is a pooling head (SigLIP)
    for place in sorted(stacked or places, key=order.__getitem__):
        module = seen.modules[place]
        if id(module) not in made:  # ALBERT runs one block many times
            made[id(module)] = _block(seen, place)
    return tuple(made.values())


def _up(name: str) -> Iterator[str]:
    """A name and all places around it, the smallest first."""
    while name:
        yield name
        name = parent(name)
    yield ""


def _numbered(name: str) -> bool:
    return name[-1:].isdigit()  # torchvision has encoder_layer_0


def _place(seen: Map, found: Attention) -> str | None:
    for place in _up(found.root):
        held = [other for other in seen.attentions if inside(other.root, place)]
        if len(held) > 2:
            break
        if feed_forward(seen.rest(place), found.width):
            # T5 lists the parts of a block in one that no one calls
            listed = isinstance(seen.modules[place], nn.ModuleList) and not _numbered(place)
            return parent(place) if listed else place
        member = place.rpartition(".")[2].isdigit()  # attn1 would be no member of a stack
        if member and _other_matrices(seen, place, held):
            return place  # experts, or something else in the place of the feed-forward
    return next((place for place in _up(found.root) if _numbered(place)), None)


def _other_matrices(seen: Map, place: str, held: list[Attention]) -> bool:
    return any(
        p.dim() > 1 and not any(inside(join(place, name), other.root) for other in held)
        for name, p in seen.modules[place].named_parameters()
    )


def _without_attention(seen: Map) -> list[str]:
    found = [p for p in seen.modules if any(map(_numbered, _up(p))) and _width(seen, p)]
    smallest = [p for p in found if not any(other != p and inside(other, p) for other in found)]
    members = [next(up for up in _up(p) if _numbered(up)) for p in smallest]
    # a member may hold more than the feed-forward, such as an attention of an unknown form
    return [m if _width(seen, m) else p for m, p in zip(members, smallest, strict=True)]


def _width(seen: Map, place: str) -> int:
    """Width of a feed-forward's stream in a place, told by a norm of that width; 0 if none."""
    rest = seen.rest(place)
    for width in dict.fromkeys(out for _, out in rest.values()):
        feed = feed_forward(rest, width)
        # without attention beside it, twice the width may be Mamba's projection just as well
        if feed and "gate_up" not in feed and norms_in(seen.modules, place, width):
            return width
    return 0


def _block(seen: Map, place: str) -> Block:
    held = [found for found in seen.attentions if inside(found.root, place)]
    width = held[0].width if held else _width(seen, place)
    rest = seen.rest(place)
    feed = feed_forward(rest, width)
    crossing = [f for f in held if crosses(f.root, place)] or held[1:]
    own = [found for found in held if found not in crossing]
    norms = Norms(seen.modules, place, width, held, feed)
    module = seen.modules[place]

    def named(layers: Mapping[str, str]) -> dict[str, str]:
        return {part: seen.canonical(name) for part, name in layers.items()}

    return Block(
        name=seen.canonical(place),
        module=module,
        width=width,
        attention=named(own[0].layers) if own else {},
        cross_attention=named(crossing[0].layers) if crossing else {},
        feed_forward=named(feed),
        norms=tuple(map(seen.canonical, norms.names)),
        pre_norm=norms.first(),
        scales=tuple(join(seen.canonical(place), name) for name in _scales(module)),
    )


def _scales(module: nn.Module) -> list[str]:
    own: dict[str, nn.Module | Tensor | None] = {**module._modules, **module._parameters}
    return [
        name
        for name, item in own.items()
        if item is not None
        and not isinstance(item, nn.Identity)
        and name.rstrip("0123456789").rstrip("_") in SCALES
    ]
