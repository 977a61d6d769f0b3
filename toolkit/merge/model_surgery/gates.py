"""Where the gate rows of a model lie, and how they stand to a direction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core.nets.anatomy import anatomy
from toolkit.core.nets.anatomy.by_hand import nearest
from toolkit.core.nets.anatomy.form import matrix

PATTERN = "*gate_proj.weight"
"""Tensors of a state dict that are taken where no others are named: Llama, Mistral, Qwen, Gemma."""
DOUBLE = "gate_up"
"""In the name of a layer that holds both."""


def gate_rows(
    model: nn.Module | Mapping[str, Tensor], at: str | Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Name of the tensor -> its gate rows (m, d), which share the model's memory.

    Where gate and up are one layer (Phi-3, GLM), the gate is its first half.

    Args:
        model: a module, whose gated feed-forwards are found by form; or a state dict.
        at: patterns of names instead: of layers in a module, of tensors in a state dict. In an
            ungated feed-forward the rows of the first layer may be named so; that they were silent
            before is then not to be expected.

    Raises:
        ValueError: nothing is found, or a block's feed-forward has no gate.
        TypeError: a gate's weight is no plain floating-point matrix, or ``model`` is neither.
    """
    patterns = [at] if isinstance(at, str) else at
    if isinstance(model, nn.Module):
        layers = _found(model) if patterns is None else _named(model, patterns)
        found = {f"{name}.weight": _plain(name, model.get_submodule(name)) for name in layers}
        halved = {f"{name}.weight" for name, double in layers.items() if double}
    elif not isinstance(model, Mapping):
        raise TypeError(f"model is a {type(model).__name__}: give a module or a state dict")
    else:
        names = _matching(model, [PATTERN] if patterns is None else patterns, "tensor")
        found = {name: model[name].detach() for name in names}
        halved = {name for name in found if DOUBLE in name}
    found = {n: rows[: len(rows) // 2] if n in halved else rows for n, rows in found.items()}
    for name, rows in found.items():
        if rows.dim() != 2 or not rows.is_floating_point() or rows.is_meta:
            raise TypeError(
                f"{name} is no plain floating-point matrix ({rows.dtype}, "
                f"{tuple(rows.shape)}, {rows.device}): load the model unquantised, with its weights"
            )
    once: dict[tuple[int, torch.Size, torch.device], str] = {}
    for name, rows in found.items():  # layers that share a weight move it once
        once.setdefault((rows.data_ptr(), rows.shape, rows.device), name)
    return {name: found[name] for name in once.values()}


def _found(model: nn.Module) -> dict[str, bool]:
    """Name of each block's gate -> whether it holds the up layer as well."""
    layers, bare = {}, []
    for block in anatomy(model).blocks:
        name = block.feed_forward.get("gate") or block.feed_forward.get("gate_up")
        if name is None:
            bare.append(block.name or type(block.module).__name__)
        else:
            layers[name] = "gate" not in block.feed_forward
    if bare:
        raise ValueError(
            f"{', '.join(bare[:3])}{' ...' if len(bare) > 3 else ''}: no gated feed-forward is "
            'recognised there. Name the layers whose rows may move, as in at="*.mlp.gate_proj"'
        )
    return layers


def _named(model: nn.Module, patterns: Sequence[str]) -> dict[str, bool]:
    names = {name: layer for name, layer in model.named_modules() if matrix(layer) is not None}
    return {name: DOUBLE in name for name in _matching(names, patterns, "layer")}


def _matching(known: Mapping[str, object], patterns: Sequence[str], kind: str) -> list[str]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(
                f"at: no {kind} is named {pattern!r}.{nearest(pattern, known)} Say where the gate "
                "rows are, as patterns"
            )
    found = [name for name in known if any(fnmatchcase(name, p) for p in patterns)]
    if not found:
        raise ValueError("at: empty; name the gates, or leave it out")
    return found


def _plain(name: str, layer: nn.Module) -> Tensor:
    """The rows of a layer's weight; of one that is computed from others there are none."""
    weight = layer._parameters.get("weight")
    if weight is None:
        raise TypeError(
            f"{name} ({type(layer).__name__}) has no plain weight: if it is adapted or "
            "parametrized, merge that first"
        )
    return rows_of(layer, weight)


def rows_of(layer: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight (outputs, inputs), also of a Conv1D, which keeps it the other way round."""
    told = isinstance(getattr(layer, "in_features", None), int)
    turned = not told and matrix(layer) == tuple(weight.shape)
    return weight.detach().T if turned else weight.detach()


def cosines(
    gates: Mapping[str, Tensor], direction: Tensor, gains: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Cosine of each row with a direction, name -> (m,), on the CPU.

    Args:
        gates: name -> rows (m, d).
        direction: v (d,).
        gains: name -> (d,), multiplied to the rows first.

    Raises:
        ValueError: a width that is not d, a direction that is zero or not finite, a gain missing.
        TypeError: the direction is no tensor.
    """
    if not isinstance(direction, Tensor):
        raise TypeError(f"direction is a {type(direction).__name__}: give a tensor (d,)")
    if direction.dim() != 1 or not direction.is_floating_point():
        raise ValueError(
            f"direction: shape {tuple(direction.shape)} of {direction.dtype}; give one row (d,)"
        )
    for name, rows in gates.items():
        if rows.shape[1] != len(direction):
            raise ValueError(
                f"direction has {len(direction)} numbers, the rows of {name} {rows.shape[1]}: fit "
                "the probe on states of the width that this layer reads"
            )
    top = float(direction.detach().abs().max()) if len(direction) else 0.0
    if not math.isfinite(top) or top == 0:
        raise ValueError(
            f"direction is {'zero' if top == 0 else 'not finite'}: fit the probe on states that "
            "differ between the classes"
        )
    # a power of two takes no digit away, and a short direction would count as none
    v = direction.detach() * 2.0 ** -math.frexp(top)[1]
    found = {}
    for name, rows in gates.items():
        kind = torch.promote_types(torch.promote_types(rows.dtype, v.dtype), torch.float32)
        seen = rows.to(kind)
        if gains is not None:
            if name not in gains or gains[name].shape != v.shape:
                raise ValueError(f"gains: give {name} a gain of shape {tuple(v.shape)}")
            seen = seen * gains[name].detach().to(seen)
        found[name] = F.cosine_similarity(seen, v.to(seen).unsqueeze(0), dim=1).cpu()
    return found


def gains_before(
    model: nn.Module | Mapping[str, Tensor], gates: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Name of the gate's tensor -> gain (d,) of the norm that acts before it.

    Raises:
        ValueError: a state dict, which does not tell; or a block whose norms act elsewhere.
    """
    remedy = "give gains, a dict from the tensor's name to a gain (d,)"
    if not isinstance(model, nn.Module):
        raise ValueError(f"gains: a state dict does not tell which norm comes before; {remedy}")
    found: dict[str, Tensor] = {}
    for block in anatomy(model).blocks:
        held = {f"{name}.weight" for name in block.feed_forward.values()} & set(gates)
        if held and not (block.pre_norm and block.norms):
            raise ValueError(f"gains: the norm before {sorted(held)[0]} is not known; {remedy}")
        if held:
            gain = _gain(model.get_submodule(block.norms[-1]), block.width)
            if gain is None:
                raise ValueError(f"gains: how {block.norms[-1]} scales is not known; {remedy}")
            found |= dict.fromkeys(held, gain)
    missing = [name for name in gates if name not in found]
    if missing:
        raise ValueError(f"gains: {missing[0]} stands in no block that is recognised; {remedy}")
    return found


@torch.no_grad()
def _gain(norm: nn.Module, width: int) -> Tensor | None:
    """The gain of a norm. Gemma's stores it less 1, so ones are sent through those not known."""
    weight = norm._parameters.get("weight")
    if weight is None or isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        return weight
    out = norm(torch.ones(1, width, dtype=weight.dtype, device=weight.device))[0]
    for gain in (weight.detach(), weight.detach() + 1):
        if torch.allclose(out, gain, rtol=1e-2, atol=1e-3):
            return gain
    return None
