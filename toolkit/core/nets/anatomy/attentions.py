"""Attention told by its form: three layers named for query, key and value, or one for all three,
and the layer through which they go back to the stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from toolkit.core.nets.anatomy.form import WORDS, Shapes, common, inside, join, parent, role

# words by which output layers are named
OUT = {"o", "out", "output", "dense", "proj", "projection", "wo"}


class Attention(NamedTuple):
    """One attention: the smallest module around it, the layer of each role, and the width of the
    stream it reads and writes."""

    root: str
    layers: dict[str, str]
    width: int


def attentions(modules: Mapping[str, nn.Module], layers: Shapes) -> list[Attention]:
    """Every attention among named modules, in order of registration."""
    children: dict[str, Shapes] = {}
    for name, ends in layers.items():
        children.setdefault(parent(name), {})[name] = ends
    found = []
    for owner, module in modules.items():
        own = children.get(owner, {})
        output = join(owner, "out_proj")
        if "in_proj_weight" in module._parameters and output in own:  # nn.MultiheadAttention
            # one parameter of the module itself: that is the layer which holds qkv
            made = {"qkv": owner, "output": output}
            found.append(Attention(owner, made, own[output][1]))
            continue
        made = _separate(own)
        if made:
            width, inner = own[made["query"]]
            near = _output(owner, modules, layers, width, inner, set(made.values()))
            if near is None and "key" not in made:
                continue
        else:
            fused = _fused(owner, own, layers)
            if fused is None:
                continue
            made, near = {"qkv": fused[0]}, fused[1]
            width = own[fused[0]][0]
        if near is not None:
            made["output"] = near
        root = common([owner] if near is None else [owner, parent(near)])
        found.append(Attention(root, made, width))
    return found


def _separate(own: Shapes) -> dict[str, str]:
    roles = [role(name) for name in own]
    named: dict[str, str] = {}
    for part, name in zip(roles, own, strict=True):
        named.setdefault(part or "", name)
    if all(part in named for part in WORDS):
        return {part: named[part] for part in WORDS}
    # DeepSeek has two of each, one after the other: neither is the query
    if roles.count("query") == roles.count("key_value") == 1:
        return {part: named[part] for part in ("query", "key_value")}
    if roles.count("query") == 1:  # the cross attention of GPT-2: c_attn holds key and value
        double = [n for n in own if not role(n) and own[n][1] == 2 * own[named["query"]][1]]
        if len(double) == 1:
            return {"query": named["query"], "key_value": double[0]}
    return {}


def _fused(owner: str, own: Shapes, layers: Shapes) -> tuple[str, str] | None:
    """The layer of query, key and value in one, and the output layer beside it."""
    for name, (width, wide) in own.items():
        # gate and up in one look like grouped queries, so words decide below three times
        if role(name) not in (None, "qkv"):
            continue
        told = role(name) == "qkv" or "att" in owner.rpartition(".")[2].lower()
        order = list(layers)
        if any(ends[0] == wide for n, ends in own.items() if n != name):
            continue  # something reads all of it: an up projection
        for near, (inner, out) in layers.items():
            if near == name or out != width or role(near) or not _beside(near, owner, layers):
                continue
            if not told and order.index(near) < order.index(name):
                continue  # a head with three times the width of what it reads
            if wide == 3 * inner or (told and inner < wide < 3 * inner and (wide - inner) % 2 == 0):
                return name, near
    return None


def _beside(name: str, owner: str, layers: Shapes) -> bool:
    """Whether a layer is a child of a module, or alone in one (`to_out.0`)."""
    if parent(name) == owner:
        return True
    around = parent(name)
    alone = sum(inside(other, around) for other in layers) == 1
    return inside(name, owner) and bool(around) and parent(around) == owner and alone


def _output(
    owner: str,
    modules: Mapping[str, nn.Module],
    layers: Shapes,
    width: int,
    inner: int,
    taken: set[str],
) -> str | None:
    def fitting(place: str) -> list[str]:
        return [
            n
            for n, ends in layers.items()
            if inside(n, place) and ends == (inner, width) and n not in taken and not role(n)
        ]

    def told(name: str, place: str) -> bool:
        return bool(OUT & set(name[len(place) :].lower().replace("_", ".").split(".")))

    near = sorted(fitting(owner), key=lambda n: (not told(n, owner), parent(n) != owner))
    above = parent(owner)
    if not near and owner and not isinstance(modules[above], nn.ModuleList | nn.Sequential):
        # BERT keeps query, key and value in one module and the output in the next
        order = list(layers)
        start = max(order.index(n) for n in taken)
        near = [n for n in fitting(above) if order.index(n) > start and told(n, above)]
    return near[0] if near else None
