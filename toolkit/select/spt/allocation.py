r"""How a budget is spent: the :math:`\tau` most sensitive scalars, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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

    def counts(self, taus: Sequence[int]) -> Iterator[tuple[int, dict[str, int]]]:
        """Each tau, in rising order, and how many of the tau highest lie in each tensor.

        Raises:
            ValueError: a tau below 1 or above the number of scalars.
        """
        done, total = 0, torch.zeros(len(self.sizes), dtype=torch.long, device=self.order.device)
        for tau in sorted(taus):
            if not 1 <= tau <= len(self):
                raise ValueError(
                    f"tau={tau}: the candidates are {len(self)} scalars; like='code' needs a model "
                    "with 1,580,000, others take like='paper'"
                )
            total = total + torch.bincount(self._owner[done:tau], minlength=len(self.sizes))
            done = tau
            yield tau, dict(zip(self.sizes, total.tolist(), strict=True))

    def top(self, name: str, tau: int) -> Tensor:
        """Which entries of a tensor are among the tau highest, in the order of memory."""
        start = self._start[name]
        chosen = self.order[:tau]
        inside = (chosen >= start) & (chosen < start + self.sizes[name])
        return (chosen[inside] - start).sort().values


def decide(method: Any, shape: Sequence[int], marked: int) -> Decision:
    """What a tensor of this shape gets, with so many of its scalars marked.

    Args:
        method: the :class:`~toolkit.select.spt.SPT`.
        shape: (m, n) of a matrix, (d,) of a vector.
        marked: its scalars among the tau most sensitive.
    """
    whole = method.half != "entries"
    if len(shape) == 1:
        if whole and method.whole_vectors and marked >= shape[0] / method.beta:
            return Decision("whole", marked, shape[0])
    elif whole and marked >= (cost := method.cost(*shape)) / method.alpha:
        return Decision(method.structured, marked, cost)
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
    best, best_gap, largest = None, method.budget, 0
    for tau, counts in ranking.counts(method.sweep(len(ranking)) if taus is None else taus):
        decisions = {n: decide(method, shapes[n], marked) for n, marked in counts.items()}
        total = counted + sum(d.cost for d in decisions.values())
        largest = max(largest, total)
        if abs(total - method.budget) <= best_gap:
            best_gap = abs(total - method.budget)
            best = Allocation(tau, total, decisions, ranking)
    if best is None or (method.like == "paper" and 2 * best_gap > method.budget):
        nearest = "no allocation comes near" if best is None else f"the nearest takes {best.total}"
        raise ValueError(
            f"budget={method.budget}: {nearest} (the largest takes {largest}); change the budget, "
            "or lower the rank, so that tensors can take it"
        )
    return best
