"""What rules do with task vectors: keep the largest numbers, drop some by chance, elect signs."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from toolkit.core.declare.fields import Range
from toolkit.core.states.orders import order_statistics
from toolkit.core.states.rules import Piece, Pieces

Density = Annotated[float, Range(0.0, 1.0, log=True, open_low=True)]
"""The share of numbers that is kept."""
Scale = Annotated[float, Range(-10.0, 10.0)]
"""Factor of the merged task vector."""


def thresholds(pieces: Pieces, density: float) -> dict[str, Any]:
    """The size from which on numbers are kept, per model."""
    keep = max(1, int(density * pieces.count))
    found = order_statistics(pieces, lambda piece: piece.vectors.abs(), [pieces.count - keep])
    return {"threshold": found[:, 0].tolist()}


def trimmed(piece: Piece) -> Tensor:
    """Task vectors (n, k) without what lies below the threshold."""
    least = piece.vectors.new_tensor(piece.facts["threshold"])[:, None]
    # not `hardshrink`, which drops what lies at the threshold
    return piece.vectors.masked_fill_(piece.vectors.abs() < least, 0.0)


def dropped(piece: Piece, drop: float, keep: float) -> Tensor:
    """Task vectors (n, k) with numbers dropped by chance and the rest divided by ``keep``."""
    found = piece.vectors
    for row, draws in zip(found, piece.generators, strict=True):
        row.masked_fill_(random_mask(len(piece), drop, draws).logical_not_(), 0.0)
    return found.mul_(1 / keep)


def random_mask(count: int, drop: float, generator: torch.Generator) -> Tensor:
    """Which numbers stay (count,), each with probability 1 - drop; bool."""
    # named, so that a seed means one mask under every default dtype
    return torch.rand(count, generator=generator, dtype=torch.float32) >= drop


def weighted(vectors: Tensor, weights: tuple[float, ...]) -> Tensor:
    """The weighted sum (k,) of task vectors (n, k)."""
    return vectors.new_tensor(weights) @ vectors


def elected(vectors: Tensor, weights: tuple[float, ...]) -> Tensor:
    """In every coordinate the weighted mean of those whose sign is that of the weighted sum.

    Args:
        vectors: (n, k), overwritten.
        weights: one per model.

    Returns:
        (k,); 0 where nothing is left.
    """
    strength = vectors.new_tensor(weights)
    if any(weight != 1 for weight in weights):
        vectors.mul_(strength[:, None])
    sign = torch.where(vectors.sum(dim=0) >= 0, 1.0, -1.0)
    turned = vectors.mul_(sign)  # what agrees is positive now
    mass = strength @ (turned > 0).to(vectors.dtype)
    mean = turned.clamp_(min=0).sum(dim=0) / mass.masked_fill_(mass.abs() < 1e-8, 1.0)
    return mean.mul_(sign)
