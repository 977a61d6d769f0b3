"""Who joins and how many: importance, schedules, and the exact highest of several tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

LEFT_OUT = -math.inf
"""Score of what cannot join."""


def importance(gradient: Tensor, value: Tensor, exponent: float, epsilon: float) -> Tensor:
    r"""D3 importance :math:`|g| / (|\theta| + \epsilon)^p` of each entry.

    Where the power leaves the range of float32, its logarithm in float64, which ranks alike.
    """
    gradient = _wide(gradient).abs()
    if not exponent:
        return gradient
    size = _wide(value).abs() + epsilon
    if abs(exponent) * abs(math.log(max(epsilon, 1e-12))) < 60 and abs(exponent) <= 8:
        return gradient / size**exponent
    return gradient.double().log() - exponent * size.double().log()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.element_size() < 4 else tensor


def planned(schedule: str, budget: int, total_steps: int) -> list[int]:
    r"""How many scalars join at each step, :math:`u_0 \dots u_{T-1}`, with sum ``budget``.

    "uniform": :math:`\lfloor B/T \rfloor`, and one more in each of the first :math:`B \bmod T`
    steps. "once": all in the first. "front" and "back": falling or rising linearly. "every": the
    whole budget at each step, which adds up to more.
    """
    if schedule == "every":
        return [budget] * total_steps
    if schedule == "uniform":
        every, more = divmod(budget, total_steps)
        return [every + (t < more) for t in range(total_steps)]
    if schedule == "once":
        return [budget, *[0] * (total_steps - 1)]
    ends = [t * t * budget // total_steps**2 for t in range(total_steps + 1)]
    rising = [b - a for a, b in itertools.pairwise(ends)]
    return rising if schedule == "back" else rising[::-1]


def highest(scores: Sequence[Tensor], count: int, line: float = LEFT_OUT) -> list[Tensor]:
    """Indices of the ``count`` highest scores of several tensors together, in their order.

    Of equal ones the first in the first tensor join. Fewer are found where fewer can join.

    Args:
        scores: flat, :data:`LEFT_OUT` where an entry cannot join.
        count: how many.
        line: a guess below which none will join; it saves time and changes nothing.
    """
    floor = line - abs(line) / 2 if math.isfinite(line) else line
    few = [_top(s[s > floor], count) for s in scores]
    if sum(map(len, few)) < count and floor > LEFT_OUT:
        few = [_top(s[s > LEFT_OUT], count) for s in scores]
    home = few[0].device
    best = _top(torch.cat([f.to(home, torch.float64) for f in few]), count)
    if not len(best):
        return [s.new_zeros(0, dtype=torch.long) for s in scores]
    cut = float(best.min())
    above = [(s > cut).nonzero()[:, 0] for s in scores]
    left = len(best) - sum(map(len, above))
    found = []
    for s, own in zip(scores, above, strict=True):
        ties = (s == cut).nonzero()[:left, 0] if left else own[:0]
        left -= len(ties)
        found.append(torch.cat([own, ties]).sort().values)
    return found


def _top(scores: Tensor, count: int) -> Tensor:
    return scores if len(scores) <= count else scores.topk(count, sorted=False).values


def line_of(scores: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The lowest score that joined: a guess for the next step."""
    lowest = [float(s[i].min()) for s, i in zip(scores, found, strict=True) if len(i)]
    return min(lowest, default=LEFT_OUT)
