r"""How a budget is spent: the :math:`\tau` most sensitive scalars, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.select.spt.sensitivity import check


@dataclass(frozen=True)
class Decision:
    """What one tensor gets: its form, the marked entries, and the numbers it trains.

    ``form`` is "lora" or "adapter" (a matrix with a module), "whole" (a vector), "entries" (the
    marked ones alone) or "frozen".
    """

    form: str
    marked: int
    cost: int


@dataclass(frozen=True)
class Allocation:
    """The decisions for one :math:`\\tau`, by tensor, and what they cost with what is counted."""

    tau: int
    total: int
    decisions: dict[str, Decision]
    ranking: Ranking

    def index(self, name: str) -> Tensor:
        """The entries of a tensor that train by themselves, in the order of memory."""
        decision = self.decisions[name]
        if decision.form == "whole":
            return torch.arange(self.ranking.sizes[name], device=self.ranking.order.device)
        if decision.form == "entries":
            return self.ranking.top(name, self.tau)
        return self.ranking.order.new_empty(0)


class Ranking:
    """All scalars of several tensors, the most sensitive first; of equal ones the first.

    Args:
        scores: tensor name -> sensitivities.

    Raises:
        ValueError: a score is negative or not finite.
    """

    def __init__(self, scores: Mapping[str, Tensor]):
        check(scores)
        self.sizes = {name: score.numel() for name, score in scores.items()}
        flat = torch.cat([score.reshape(-1) for score in scores.values()])
        self.order = torch.argsort(flat, descending=True, stable=True)
        sizes = torch.tensor(list(self.sizes.values()), device=flat.device)
        self._owner = torch.repeat_interleave(sizes).to(torch.int32)[self.order]
        self._start = dict(zip(scores, (sizes.cumsum(0) - sizes).tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.order)

    def counts(self, taus: Sequence[int]) -> Tensor:
        """How many of the tau highest lie in each tensor, (taus, tensors); taus rise.

        Raises:
            ValueError: a tau below 1 or above the number of scalars.
        """
        if taus[0] < 1 or taus[-1] > len(self):
            raise ValueError(
                f"tau={taus[-1]}: the candidates are {len(self)} scalars; like='code' needs a "
                "model with 1,580,000, others take like='paper'"
            )
        ends = torch.tensor(taus, device=self.order.device)
        first = torch.bucketize(torch.arange(taus[-1], device=ends.device), ends, right=True)
        tensors = len(self.sizes)
        where = first * tensors + self._owner[: taus[-1]]
        cells = torch.bincount(where, minlength=len(taus) * tensors)
        return cells.view(len(taus), tensors).cumsum(0)

    def top(self, name: str, tau: int) -> Tensor:
        """Which entries of a tensor are among the tau highest, in the order of memory."""
        start = self._start[name]
        chosen = self.order[:tau]
        inside = (chosen >= start) & (chosen < start + self.sizes[name])
        return (chosen[inside] - start).sort().values


def rule(method: Any, shape: Sequence[int]) -> tuple[str, float, int]:
    """What a tensor of this shape gets as a whole, from how many marked scalars on, and its cost.

    Args:
        method: the :class:`~toolkit.select.spt.SPT`.
        shape: (m, n) of a matrix, (d,) of a vector.
    """
    if len(shape) == 1:
        whole = method.whole_vectors and method.half != "entries"
        return "whole", shape[0] / method.beta if whole else math.inf, shape[0]
    cost = method.cost(*shape)
    return method.structured, math.inf if method.half == "entries" else cost / method.alpha, cost


def decide(method: Any, shape: Sequence[int], marked: int) -> Decision:
    """What a tensor of this shape gets, with so many of its scalars marked; see :func:`rule`."""
    form, enough, cost = rule(method, shape)
    if marked >= enough:
        return Decision(form, marked, cost)
    if not marked or method.half == "structured":
        return Decision("frozen", marked, 0)
    return Decision("entries", marked, marked)


def allocate(
    method: Any,
    scores: Mapping[str, Tensor],
    counted: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
    taus: Sequence[int] | None = None,
) -> Allocation:
    r"""The allocation whose total is nearest to the budget, over a sweep of :math:`\tau`.

    A module costs more or less than the marks it replaces, so the total neither equals
    :math:`\tau` nor rises with it. Of equally near ones the largest :math:`\tau` is kept.

    Args:
        method: the :class:`~toolkit.select.spt.SPT`, with its budget.
        scores: tensor name -> sensitivities.
        counted: numbers that train in any case and are in the budget.
        shapes: (m, n) or (d,) by name, where it is not that of the scores.
        taus: the sweep; by default that of the method.

    Raises:
        ValueError: no budget, or one that nothing comes near to.
    """
    if method.budget is None:
        raise ValueError("budget=None: a plan needs one, such as SPT(budget=100_000)")
    if method.budget <= counted:
        raise ValueError(
            f"budget={method.budget}: the parameters that are counted in any case hold {counted} "
            "numbers already; raise it"
        )
    ranking = Ranking(scores)
    shapes = {n: (shapes or {}).get(n, tuple(s.shape)) for n, s in scores.items()}
    taus = sorted(method.sweep(len(ranking)) if taus is None else taus)
    counts = ranking.counts(taus)
    every = [rule(method, shape) for shape in shapes.values()]
    enough = torch.tensor([r[1] for r in every], dtype=torch.float64, device=counts.device)
    costs = torch.tensor([r[2] for r in every], device=counts.device)
    alone = torch.zeros_like(counts) if method.half == "structured" else counts
    totals = (counted + torch.where(counts >= enough, costs, alone).sum(1)).tolist()
    gaps = [abs(total - method.budget) for total in totals]
    k = max(range(len(taus)), key=lambda i: (-gaps[i], taus[i]))
    if gaps[k] > (method.budget if method.like == "code" else method.budget / 2):
        raise ValueError(
            f"budget={method.budget}: the nearest allocation takes {totals[k]} (the largest "
            f"{max(totals)}); change the budget, or lower the rank, so that tensors can take it"
        )
    decisions = {
        name: decide(method, shapes[name], marked)
        for name, marked in zip(scores, counts[k].tolist(), strict=True)
    }
    return Allocation(taus[k], totals[k], decisions, ranking)
