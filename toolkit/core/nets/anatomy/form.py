"""Layers, norms and feed-forwards told by their form: shapes, neighbours and words in names.

A class's name says nothing here, so a network written elsewhere is read as ours are. What shapes
leave open (which of three square layers is the query) is read from the words in attribute names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

Shapes = dict[str, tuple[int, int]]  # dotted name -> (inputs, outputs), in order of registration

WORDS = {
    "query": {"q", "query", "queries", "wq"},
    "key": {"k", "key", "keys", "wk"},
    "value": {"v", "value", "values", "wv"},
}


def join(prefix: str, name: str) -> str:
    """Two dotted names in a row; either may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def inside(name: str, place: str) -> bool:
    """Whether a dotted name is a place or lies below it; the empty place holds all."""
    return not place or name == place or name.startswith(place + ".")


def parent(name: str) -> str:
    """The dotted name without its last part."""
    return name.rpartition(".")[0]


def common(names: Iterable[str]) -> str:
    """The smallest place that holds all of some dotted names."""
    first, *others = names
    while not all(inside(name, first) for name in others):
        first = parent(first)
    return first


def matrix(module: Any) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer or a transformers Conv1D, None for anything else."""
    ends = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if all(isinstance(end, int) for end in ends):
        return ends
    weight = getattr(module, "weight", None)  # Conv1D keeps (inputs, outputs), and nf outputs
    if getattr(module, "nf", None) and getattr(weight, "ndim", 0) == 2:
        return tuple(weight.shape)
    return None


def shapes(modules: Mapping[str, nn.Module]) -> Shapes:
    """The linear layers among named modules; what lies inside one (a quantised or adapted layer
    holds more) is left out."""
    found: Shapes = {}
    last = None
    for name, module in modules.items():
        if last is not None and inside(name, last):
            continue
        if (ends := matrix(module)) is not None:
            found[name], last = ends, name
    return found


def is_norm(module: nn.Module, width: int) -> bool:
    """Whether a module normalises a stream: no children, and a weight (width,) and at most a bias
    of its own, or none at all where the class of PyTorch tells."""
    if next(module.children(), None) is not None or isinstance(module, nn.PReLU):
        return False
    own = dict(module.named_parameters(recurse=False))
    if not own:
        return isinstance(module, nn.LayerNorm | nn.RMSNorm) and (
            tuple(module.normalized_shape) == (width,)
        )
    return own.keys() <= {"weight", "bias"} and all(p.shape == (width,) for p in own.values())


def role(name: str) -> str | None:
    """What the words in the last part of a name say: query, key, value, key_value or qkv."""
    last = name.rpartition(".")[2].lower()
    words = set(last.split("_"))
    found = [part for part, known in WORDS.items() if known & words]
    if "qkv" in last or len(found) == 3:
        return "qkv"
    if "kv" in words or found == ["key", "value"]:
        return "key_value"
    return found[0] if len(found) == 1 else None


def feed_forward(layers: Shapes, width: int) -> dict[str, str]:
    """The widest pair of layers that leaves the stream and comes back, by role: up, (gate), down,
    or gate_up where both are one layer. Empty when there is none or several (experts)."""
    order = list(layers)
    found: list[tuple[int, dict[str, str]]] = []
    for down, (inner, out) in layers.items():
        if out != width:
            continue
        ups = [
            n
            for n, ends in layers.items()
            # of square layers only the order tells which comes first
            if n != down
            and ends == (width, inner)
            and (inner != width or order.index(n) < order.index(down))
        ]
        double = [n for n, ends in layers.items() if ends == (width, 2 * inner)]
        if len(ups) == 1:
            found.append((inner, {"up": ups[0], "down": down}))
        elif len(ups) == 2:
            # the gate is registered first wherever its name does not tell
            gate = next((n for n in ups if "gate" in n.rpartition(".")[2]), ups[0])
            up = next(n for n in ups if n != gate)
            found.append((inner, {"up": up, "gate": gate, "down": down}))
        elif len(ups) > 2:
            found += [(inner, {}), (inner, {})]
        elif len(double) == 1:
            found.append((inner, {"gate_up": double[0], "down": down}))
    widest = max((inner for inner, _ in found), default=0)
    best = [made for inner, made in found if inner == widest]
    return best[0] if len(best) == 1 else {}
