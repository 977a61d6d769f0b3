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
        ValueError: a rank outside, or a number that is not finite.
    """
    if any(not 0 <= rank < pieces.count for rank in ranks):
        raise ValueError(f"ranks {list(ranks)} of {pieces.count} numbers: count from 0")
    step = max(1, pieces.count // SAMPLE)
    sample = torch.cat([values(piece.every(step)) for piece in pieces], dim=1).sort(dim=1).values
    if not bool(sample.isfinite().all()):
        raise ValueError("numbers that are not finite cannot be ranked")
    if step == 1:
        return sample[:, list(ranks)]
    found = sample.new_empty((len(sample), len(ranks)))
    open_ = [(row, i) for row in range(len(sample)) for i in range(len(ranks))]
    width = 4.0
    while open_:
        lows, highs = torch.full_like(found, -math.inf), torch.full_like(found, math.inf)
        for row, i in open_:
            lows[row, i], highs[row, i] = _bracket(sample[row], ranks[i] / pieces.count, width)
        up_to, inside = _counted(pieces, values, lows, highs)
        missed = []
        for row, i in open_:
            place, middle = ranks[i] - up_to[i][row], torch.cat(inside[row, i])
            if 0 <= place < len(middle):
                found[row, i] = middle.kthvalue(int(place) + 1).values
            else:
                missed.append((row, i))
        # many equal numbers at a bracket's end: it is the answer, or a wider bracket has it
        open_ = _at_the_end(pieces, values, ranks, lows, missed, found) if missed else []
        width *= 16
    return found


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


def _counted(
    pieces: Pieces, values: Callable[[Piece], Tensor], lows: Tensor, highs: Tensor
) -> tuple[list[list[int]], dict[tuple[int, int], list[Tensor]]]:
    """How many numbers do not exceed each bracket's lower end, and those above it up to the upper.

    Args:
        pieces: as above.
        values: as above.
        lows: (rows, ranks).
        highs: (rows, ranks).

    Returns:
        Counts by rank and row, and (row, rank) -> numbers.
    """
    up_to = [[0] * len(lows) for _ in range(lows.shape[1])]
    inside: dict[tuple[int, int], list[Tensor]] = {
        (row, i): [] for row in range(len(lows)) for i in range(lows.shape[1])
    }
    for piece in pieces:
        numbers = values(piece)
        for i in range(lows.shape[1]):
            above = numbers > lows[:, i, None]
            counts = above.shape[1] - torch.count_nonzero(above, dim=1)
            above &= numbers <= highs[:, i, None]
            for row, count in enumerate(counts.tolist()):
                up_to[i][row] += count
                inside[row, i].append(numbers[row][above[row]])
    return up_to, inside


def _at_the_end(
    pieces: Pieces, values: Callable[[Piece], Tensor], ranks: Sequence[int], lows: Tensor,
    missed: list[tuple[int, int]], found: Tensor,
) -> list[tuple[int, int]]:  # fmt: skip
    """Settle the ranks that fall on their bracket's lower end; those that are still open."""
    below = dict.fromkeys(missed, 0)
    equal = dict.fromkeys(missed, 0)
    for piece in pieces:
        numbers = values(piece)
        for row, i in missed:
            below[row, i] += int(torch.count_nonzero(numbers[row] < lows[row, i]))
            equal[row, i] += int(torch.count_nonzero(numbers[row] == lows[row, i]))
    still = []
    for row, i in missed:
        if 0 <= ranks[i] - below[row, i] < equal[row, i]:
            found[row, i] = lows[row, i]
        else:
            still.append((row, i))
    return still
