r"""Solvers as tables of numbers: how the next state is made of this one and of the predictions.

In a noisy state :math:`x = \alpha x_0 + s\varepsilon` with :math:`\sigma = s/\alpha` and
:math:`\lambda = -\ln\sigma`, every solver here is linear in the state and in the predicted clean
samples :math:`m_i`:

.. math:: x_{i+1} = \frac{s_{i+1}}{s_i}\,x_i + \sum_k w_k\,m_{i-k}

so a plan is no more than these weights, worked out before the first step. They hold in every view.

Sources: DDIM, Song et al., arXiv 2010.02502; Heun as in Karras et al., arXiv 2206.00364;
DPM-Solver++(2M), Lu et al., arXiv 2211.01095; UniPC, Zhao et al., arXiv 2302.04867.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from toolkit.core.sample.schedule import Level, Schedule


@dataclass(frozen=True)
class Move:
    """A state from the one before: ``keep`` times that, plus weighted predictions.

    Args:
        keep: factor of the state before.
        weights: of the predictions, the newest first.
    """

    keep: float
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Step:
    """One step down the levels.

    Args:
        predict: to the next level, from predictions up to this one.
        correct: to the next level once more, from the prediction there as well; it starts at the
            same state. None: the predicted state stays.
        again: ask the network once more, at the corrected state. False keeps the prediction that
            was made at the predicted one, which saves a call.
        blend: weights of the newest predictions, the newest first, whose sum takes the place of
            the newest before the step, and in the memory. They may be tensors, to be searched for.
    """

    predict: Move
    correct: Move | None = None
    again: bool = False
    blend: Sequence[float | Tensor] | None = None


class Plan:
    """A solver. One of your own gives ``steps``; a frozen dataclass serves well."""

    def steps(self, schedule: Schedule) -> list[Step]:
        """One entry for each step of a schedule.

        Raises:
            ValueError: the schedule does not suit the solver.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class DDIM(Plan):
    """First order, one call a step; the Euler step of the EDM view."""

    def steps(self, schedule: Schedule) -> list[Step]:
        """See :class:`Plan`."""
        return [Step(_first(*pair)) for pair in _pairs(schedule)]


@dataclass(frozen=True)
class Heun(Plan):
    """Second order, two calls a step: the slopes at both ends are averaged, in the EDM view.

    A last step to no noise is of first order, so ``n`` steps take ``2n - 1`` calls.
    """

    def steps(self, schedule: Schedule) -> list[Step]:
        """See :class:`Plan`."""
        found = []
        for here, there in _pairs(schedule):
            correct = None
            if there.std > 0:
                fall = here.sigma - there.sigma
                old = fall / (2 * here.sigma) * (1 - fall / there.sigma)
                new = fall / (2 * there.sigma)
                weights = there.alpha * new, there.alpha * old
                correct = Move(there.std / here.std, weights)
            found.append(Step(_first(here, there), correct, again=True))
        return found


@dataclass(frozen=True)
class DPMpp2M(Plan):
    """DPM-Solver++ of second order with two predictions in memory, one call a step.

    Args:
        lower_last: the last step is of first order, which steadies few steps. A step to no noise
            always is.
    """

    lower_last: bool = True

    def steps(self, schedule: Schedule) -> list[Step]:
        """See :class:`Plan`."""
        found, before = [], None
        for number, (here, there) in enumerate(_pairs(schedule)):
            move, last = _first(here, there), number == schedule.steps - 1
            if before is not None and there.std > 0 and not (last and self.lower_last):
                step = there.log_snr - here.log_snr
                share = step / (here.log_snr - before.log_snr) / 2
                (weight,) = move.weights
                move = Move(move.keep, (weight * (1 + share), -weight * share))
            found.append(Step(move))
            before = here
        return found


@dataclass(frozen=True)
class UniPC(Plan):
    """UniPC on predicted clean samples: a predictor of any order and a corrector, one call a step.

    The corrector uses the prediction made at the predicted state, which then stays in memory.

    Args:
        order: of the predictor, 1 to 3; the first and the last steps take less where the memory
            or what is left is short.
        variant: "bh1" or "bh2".
        corrector: False leaves the predictor alone.
        uncorrected: numbers of steps that are not corrected.

    Raises:
        ValueError: an order or variant that is not there.
    """

    order: int = 2
    variant: str = "bh2"
    corrector: bool = True
    uncorrected: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"order: 1, 2 or 3, got {self.order!r}")
        if self.variant not in ("bh1", "bh2"):
            raise ValueError(f'variant: "bh1" or "bh2", got {self.variant!r}')

    def steps(self, schedule: Schedule) -> list[Step]:
        """See :class:`Plan`; fewer steps than ``order`` are refused with ValueError."""
        if schedule.steps < self.order:
            raise ValueError(
                f"steps: {schedule.steps} steps are fewer than the order {self.order}; take more "
                "steps, or a lower order"
            )
        found = []
        for number in range(schedule.steps):
            left = schedule.steps - number
            order = min(self.order, number + 1, left)
            levels = schedule.levels[number - order + 1 : number + 2]
            correct = None
            if self.corrector and left > 1 and number not in self.uncorrected:
                correct = self._move(levels, corrected=True)
            found.append(Step(self._move(levels, corrected=False), correct))
        return found

    def _move(self, levels: Sequence[Level], corrected: bool) -> Move:
        """From the last but one level to the last, with as many predictions as there are."""
        *older, here, there = levels
        move, order = _first(here, there), len(levels) - 1
        if there.std == 0:
            return move
        step = there.log_snr - here.log_snr
        back = [(level.log_snr - here.log_snr) / step for level in reversed(older)]
        scale = -step if self.variant == "bh1" else math.expm1(-step)
        ends = [*back, 1.0] if corrected else back
        if len(ends) == 1 and (corrected or order == 2):
            shares = [0.5]
        else:
            rows = [[end**power for end in ends] for power in range(len(ends))]
            wanted = [
                math.factorial(n) * _remainder(n, -step) / scale for n in range(1, len(ends) + 1)
            ]
            shares = np.linalg.solve(np.array(rows), np.array(wanted)).tolist() if ends else []
        # a difference D_k = (m_k - m_0) / r_k adds -alpha * scale * share * D_k
        factors = [
            -there.alpha * scale * share / end for share, end in zip(shares, ends, strict=True)
        ]
        newest = move.weights[0] - sum(factors)
        if corrected:
            return Move(move.keep, (factors[-1], newest, *factors[:-1]))
        return Move(move.keep, (newest, *factors))


def _pairs(schedule: Schedule) -> list[tuple[Level, Level]]:
    return list(zip(schedule.levels[:-1], schedule.levels[1:], strict=True))


def _first(here: Level, there: Level) -> Move:
    """The step of first order: exact where the prediction does not change."""
    weight = there.alpha * (here.sigma - there.sigma) / here.sigma
    return Move(there.std / here.std, (weight,))


def _remainder(n: int, h: float) -> float:
    r""":math:`\sum_{k\ge1} h^k/(k+n)!`, what the exponential has beyond its first terms."""
    if abs(h) < 1:
        return sum(h**k / math.factorial(k + n) for k in range(1, 20))
    value = math.expm1(h) / h - 1
    for k in range(2, n + 1):
        value = value / h - 1 / math.factorial(k)
    return value


PLANS: dict[str, type[Plan]] = {
    "ddim": DDIM, "heun": Heun, "dpmpp_2m": DPMpp2M, "unipc": UniPC,
}  # fmt: skip
"""Solvers by name."""
