r"""Dynamic compensation: the newest prediction, moved a little in time.

Predictions :math:`m_i, m_{i-1}, \dots` at times :math:`t_i < t_{i-1} < \dots` lie on a polynomial
of degree K; its value at :math:`t' = \rho\,t_i + (1-\rho)\,t_{i-1}` takes the newest one's place.
The time stamp stays :math:`t_i`.

Source: Zhao et al., arXiv 2409.03755; official code ``wl-zhao/DC-Solver``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor

from toolkit.core.sample.loop import combined
from toolkit.core.sample.plans import Step
from toolkit.core.sample.schedule import Law, Schedule

Ratio: TypeAlias = float | Tensor
"""One compensation ratio; as a tensor it is the same for all samples, or broadcasts over them."""


def lagrange_weights(times: Sequence[float], ratio: Ratio) -> tuple[Any, ...]:
    r"""What each prediction counts for: :math:`\prod_{l\ne k}(t' - t_l)/(t_k - t_l)`, newest first.

    They sum to 1. Ratio 1 gives (1, 0, ...), ratio 0 gives (0, 1, 0, ...); above 1 extrapolates.

    Args:
        times: K + 1 of them, the newest first, so they rise.
        ratio: :math:`\rho`; a tensor gives weights of its shape, with gradients.

    Raises:
        ValueError: fewer than two times, or times that do not rise.
    """
    times = [float(t) for t in times]
    if len(times) < 2:
        raise ValueError(f"times: two or more, the newest first, got {len(times)}")
    if not all(a < b for a, b in itertools.pairwise(times)):
        raise ValueError(f"times: sampling times fall, so the newest first they rise; got {times}")
    at = ratio * times[0] + (1 - ratio) * times[1]
    found = []
    for k, own in enumerate(times):
        others = [t for l, t in enumerate(times) if l != k]
        found.append(math.prod(((at - t) / (own - t) for t in others), start=1.0))
    return tuple(found)


def compensated_prediction(
    predictions: Sequence[Tensor], times: Sequence[float], ratio: Ratio
) -> Tensor:
    """The prediction that takes the newest one's place.

    Args:
        predictions: K + 1 tensors of one shape, the newest first; of clean samples, or of noise.
        times: theirs.
        ratio: see :func:`lagrange_weights`.

    Raises:
        ValueError: numbers of predictions and times differ; and as :func:`lagrange_weights`.
    """
    if len(predictions) != len(times):
        raise ValueError(
            f"predictions: one for each of the {len(times)} times, got {len(predictions)}"
        )
    return combined(0.0, predictions[0], lagrange_weights(times, ratio), predictions)


def compensated(
    steps: Sequence[Step],
    schedule: Schedule,
    ratios: Sequence[Ratio],
    degree: int = 2,
    kept: int | None = None,
) -> list[Step]:
    """The steps of any solver, with the newest prediction compensated before each.

    Args:
        steps: a solver's, one per step of the schedule, as ``plan.steps(schedule)`` gives them.
        schedule: whose times count.
        ratios: one per step, the first step's first; numbers, or tensors to be searched for.
        degree: of the polynomial, K; the first K steps have too little history for it.
        kept: how many predictions are held; left out, as many as needed.

    Raises:
        ValueError: a list of another length, a number that is not finite, or a ratio that is not
            1 at a step with too little history.
    """
    if len(ratios) != schedule.steps or len(steps) != schedule.steps:
        raise ValueError(
            f"ratios: one for each of the {schedule.steps} steps, got {len(ratios)}; give 1 for "
            "steps that are not compensated"
        )
    made = []
    for number, (step, ratio) in enumerate(zip(steps, ratios, strict=True)):
        if not isinstance(ratio, Tensor):
            if not math.isfinite(ratio):
                raise ValueError(f"ratios: the ratio of step {number} is {ratio}, not finite")
            if ratio == 1:
                made.append(step)
                continue
        if not has_history(number, degree, kept):
            held = min(number + 1, kept or number + 1)
            raise ValueError(
                f"ratios: the ratio of step {number} is {ratio}, and degree {degree} needs "
                f"{degree + 1} predictions where {held} are held; give 1 there"
                + ("" if kept is None or kept > degree else ', or like="paper", which keeps more')
            )
        times = [level.time for level in schedule.levels[number - degree : number + 1]][::-1]
        made.append(replace(step, blend=lagrange_weights(times, ratio)))
    return made


def has_history(number: int, degree: int, kept: int | None = None) -> bool:
    """Whether the step of that number, the first 0, has K + 1 predictions to compensate from."""
    return min(number + 1, kept or number + 1) > degree


def refined(schedule: Schedule, law: Law, parts: int) -> Schedule:
    """The schedule with each step cut into parts of equal time; its own levels stay, bit for bit.

    Args:
        schedule: levels under the law.
        law: names the levels between.
        parts: of each step.

    Raises:
        ValueError: fewer than one part, or levels that are not the law's.
    """
    if parts < 1:
        raise ValueError(f"parts: at least 1, got {parts}")
    levels = list(schedule.levels[:1])
    for here, there in itertools.pairwise(schedule.levels):
        for level in (here, there):
            if level.std and not math.isclose(
                law.level(level.time).std / level.std, 1.0, rel_tol=1e-6
            ):
                raise ValueError(
                    f"law: at time {level.time:g} it has noise {law.level(level.time).std:.4g} and "
                    f"the schedule {level.std:.4g}; give the law that the schedule was made of"
                )
        fall = (there.time - here.time) / parts
        levels += [law.level(here.time + fall * n) for n in range(1, parts)]
        levels.append(there)
    return Schedule(tuple(levels))


def whole_times(steps: int, trained: int = 1000) -> list[int]:
    """The times of the official text-to-image code: whole numbers from T - 1 down to 0, as evenly
    as rounding lets them.

    Args:
        steps: how many; there is one time more.
        trained: T, the steps of training.

    Raises:
        ValueError: no step, or more than there are times.
    """
    if not 1 <= steps < trained:
        raise ValueError(f"steps: 1 to {trained - 1}, got {steps}")
    # halves are rounded to even, as NumPy does
    return [round((trained - 1) * n / steps) for n in range(steps, -1, -1)]


def states_at(
    times: Sequence[float],
    states: Sequence[Tensor],
    schedule: Schedule,
    like: str = "paper",
) -> list[Tensor]:
    """States of a stored reference run at the levels of a schedule but the first.

    Args:
        times: of the stored states, which fall.
        states: the stored states.
        schedule: the solver's.
        like: "paper" wants states at exactly these times. "code" takes the last that is stored
            before the time is reached, which is up to one reference step off.

    Raises:
        ValueError: numbers of times and states differ, a time that is not stored, or another word.
    """
    if len(times) != len(states):
        raise ValueError(f"states: one for each of the {len(times)} times, got {len(states)}")
    if like not in ("paper", "code"):
        raise ValueError(f'like: "paper" or "code", got {like!r}')
    found = []
    for level in schedule.levels[1:]:
        if like == "code":
            at = max((n for n, t in enumerate(times) if t > level.time), default=None)
        else:
            near = (n for n, t in enumerate(times) if math.isclose(t, level.time, abs_tol=1e-9))
            at = next(near, None)
        if at is None:
            raise ValueError(
                f"times: no stored state for time {level.time:g}; run the reference on a "
                "refinement of the schedule (refined)"
            )
        found.append(states[at])
    return found
