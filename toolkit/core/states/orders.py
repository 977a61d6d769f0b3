r"""Exact order statistics of numbers that are too many to be held at once.

A small sample gives a bracket for each wanted rank; one pass counts what lies below it and keeps
what lies inside. Where the bracket misses, it is widened and the pass repeated (after Floyd and
Rivest, *Expected time bounds for selection*, 1975).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from toolkit.core.states.rules import Piece, Pieces

SAMPLE = 1 << 16
"""Numbers per row that the brackets are drawn from."""


def order_statistics(
    pieces: Pieces, values: Callable[[Piece], Tensor], ranks: Sequence[int]
) -> Tensor:
    """The numbers of given ranks in every row, exactly.

    Args:
        pieces: those of a model or a tensor.
        values: (rows, k) of a piece, each from the piece's own number alone.
        ranks: 0 for the smallest, ``pieces.count - 1`` for the largest.

    Returns:
        (rows, len(ranks)).

    Raises:
        ValueError: a rank outside, or a number that is not finite, with the tensor's name.
    """
    if any(not 0 <= rank < pieces.count for rank in ranks):
        raise ValueError(f"ranks {list(ranks)} of {pieces.count} numbers: count from 0")
    step = max(1, pieces.count // SAMPLE)
    sample = torch.cat([values(piece.every(step)) for piece in pieces], dim=1).sort(dim=1).values
    if step == 1:
        _finite(sample)
        return sample[:, list(ranks)]
    rows = range(len(sample))
    open_ = {(row, rank): _bracket(sample[row], rank / pieces.count, 4.0) for row in rows
             for rank in ranks}  # fmt: skip
    found: dict[tuple[int, int], Tensor] = {}
    width = 4.0
    while open_:
        below, at_low, inside = _counted(pieces, values, open_)
        missed = []
        for (row, rank), (low, _) in open_.items():
            place = rank - below[row, rank]
            middle = torch.cat(inside[row, rank])
            if 0 <= place < at_low[row, rank]:
                found[row, rank] = low
            elif 0 <= (place := place - at_low[row, rank]) < len(middle):
                found[row, rank] = middle.kthvalue(int(place) + 1).values
            else:
                missed.append((row, rank))
        width *= 16
        open_ = {key: _bracket(sample[key[0]], key[1] / pieces.count, width) for key in missed}
    return torch.stack([torch.stack([found[row, rank] for rank in ranks]) for row in rows])


def _bracket(ordered: Tensor, share: float, width: float) -> tuple[Tensor, Tensor]:
    """Two numbers of a sorted sample with a share of all numbers between them, very likely."""
    n = len(ordered)
    spread = width * math.sqrt(n * share * (1 - share)) + width
    low, high = math.floor(n * share - spread), math.ceil(n * share + spread)
    infinite = ordered.new_tensor(math.inf)
    return (
        ordered[low] if low >= 0 else -infinite,
        ordered[high] if high < n else infinite,
    )


def _counted(pieces: Pieces, values: Callable[[Piece], Tensor], brackets: dict) -> tuple:
    """Numbers below each bracket, at its lower end, and those above that up to its upper end."""
    below = dict.fromkeys(brackets, 0)
    at_low = dict.fromkeys(brackets, 0)
    inside: dict = {key: [] for key in brackets}
    for piece in pieces:
        numbers = values(piece)
        for key, (low, high) in brackets.items():
            row = numbers[key[0]]
            under = int((row <= low).sum())
            equal = int((row == low).sum()) if under and bool(low.isfinite()) else 0
            below[key] += under - equal
            at_low[key] += equal
            inside[key].append(row[(row > low) & (row <= high)])
    return below, at_low, inside


def _finite(numbers: Tensor) -> None:
    if not bool(numbers.isfinite().all()):
        raise ValueError("numbers that are not finite cannot be ranked")
