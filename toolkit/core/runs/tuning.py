"""One search for the best rate, the same for every arm, on runs that are used for nothing else."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NEAR = 2.0
"""Largest step between the best rate and its neighbours at the end of a search."""
LEAST_SEEDS = 3


@dataclass(frozen=True)
class Tuned:
    """What a search found for one arm.

    Args:
        rate: The chosen rate.
        score: Its mean validation score.
        scores: Mean score for every rate tried; ``inf`` or ``-inf`` where a run diverged.
        on_edge: Whether the best rate is the smallest or largest tried.
    """

    rate: float
    score: float
    scores: dict[float, float]
    on_edge: bool


Evaluate = Callable[[list[tuple[str, float]]], Mapping[tuple[str, float], float]]


def best(scores: Mapping[float, float], better: str = "min") -> Tuned:
    """The best rate of those tried.

    Args:
        scores: Mean score per rate. A score that is not finite counts as worst.
        better: ``"min"`` for a loss, ``"max"`` for an accuracy.

    Raises:
        ValueError: If ``better`` is unknown, there is no rate, or every rate diverged.
    """
    if better not in ("min", "max"):
        raise ValueError(f'better = {better!r}: choose "min" or "max".')
    if not scores:
        raise ValueError("scores: there is no rate to choose from.")
    worst = math.inf if better == "min" else -math.inf
    clean = {
        rate: scores[rate] if math.isfinite(scores[rate]) else worst for rate in sorted(scores)
    }
    rate = (min if better == "min" else max)(clean, key=clean.__getitem__)
    if not math.isfinite(clean[rate]):
        raise ValueError(f"every rate in {list(clean)} diverged: extend the grid downwards.")
    return Tuned(rate, clean[rate], clean, rate in (min(clean), max(clean)))


def search(
    evaluate: Evaluate,
    starts: Mapping[str, float],
    *,
    better: str = "min",
    factor: float = 4.0,
    width: int = 3,
    extensions: int = 4,
    near: float | None = NEAR,
) -> dict[str, Tuned]:
    """Find a rate for every arm, each in the same way.

    ``width`` rates around the arm's start, ``factor`` apart. While the best lies on the edge of
    what was tried, one more rate on that side, at most ``extensions`` times. Then the gaps beside
    the best are halved, on a logarithmic scale, until no neighbour is further than ``near`` away.

    Args:
        evaluate: Takes pairs of arm and rate, all to be run at once; returns a mean score for each.
        starts: Middle of the first rates, per arm.
        better: ``"min"`` or ``"max"``.
        factor: Between neighbouring first rates.
        width: How many first rates; 1 takes the start alone.
        extensions: How often an arm may look further.
        near: Largest factor between the best and its neighbours in the end; None does not refine.

    Returns:
        Arm -> :class:`Tuned`.

    Raises:
        ValueError: If an option is out of range, or all rates of an arm diverged.
    """
    if width < 1 or extensions < 0 or factor <= 1 or (near is not None and near <= 1):
        raise ValueError(
            f"width = {width}, extensions = {extensions}, factor = {factor}, near = {near}: give "
            "a width of 1 or more, 0 or more extensions, and factors above 1."
        )
    # rates are kept as exponents of the factor, so that equal rates are equal numbers
    todo: dict[str, list[float]] = {arm: [k - width // 2 for k in range(width)] for arm in starts}
    tried: dict[str, dict[float, float]] = {arm: {} for arm in starts}
    spent = dict.fromkeys(starts, 0)
    while todo:
        asked = {
            (arm, power): (arm, _rate(starts[arm], factor, power))
            for arm, powers in todo.items()
            for power in powers
        }
        scores = evaluate(list(asked.values()))
        for (arm, power), pair in asked.items():
            tried[arm][power] = scores[pair]
        todo = {}
        for arm, powers in tried.items():
            if width == 1:
                continue
            more = _more(powers, better, factor, near, extensions - spent[arm])
            if more:
                spent[arm] += more[0] < min(powers) or more[0] > max(powers)
                todo[arm] = more
    return {
        arm: best({_rate(starts[arm], factor, p): s for p, s in powers.items()}, better)
        for arm, powers in tried.items()
    }


def _rate(start: float, factor: float, power: float) -> float:
    return float(f"{start * factor**power:.6g}")


def _more(
    powers: Mapping[float, float], better: str, factor: float, near: float | None, left: int
) -> list[float]:
    """The exponents to try next for one arm; none when its search is over."""
    found = best(powers, better)
    at, order = found.rate, sorted(powers)
    if found.on_edge and left > 0:
        return [order[0] - 1] if at == order[0] else [order[-1] + 1]
    if near is None:
        return []
    place = order.index(at)
    beside = [order[i] for i in (place - 1, place + 1) if 0 <= i < len(order)]
    step = math.log(near) / math.log(factor)
    return [(at + other) / 2 for other in beside if abs(other - at) > step * (1 + 1e-9)]


def check(
    found: Mapping[str, Tuned],
    seeds: Sequence[int],
    reported: Sequence[int],
    *,
    better: str,
    nothing: float | None = None,
) -> list[str]:
    """What is wrong with a search, in words; nothing when its rates may be reported on.

    Args:
        found: Of :func:`search`.
        seeds: Seeds of its runs.
        reported: Seeds of the runs that will be reported.
        better: ``"min"`` or ``"max"``.
        nothing: The score of doing nothing, on the same quantity; None where there is none.
    """
    wrong = []
    if len(set(seeds)) < LEAST_SEEDS:
        wrong.append(
            f"tuned on {len(set(seeds))} seeds: use {LEAST_SEEDS} or more, so that no single run "
            "decides"
        )
    if shared := sorted(set(seeds) & set(reported)):
        wrong.append(f"seeds {shared} are used for tuning and for reporting: keep them apart")
    for arm, tuned in found.items():
        if tuned.on_edge and len(tuned.scores) > 1:
            wrong.append(
                f"arm {arm!r}: its best rate {tuned.rate:g} lies on the edge of what was tried "
                f"({', '.join(f'{rate:g}' for rate in tuned.scores)}): start elsewhere, or allow "
                "more extensions"
            )
        worse = nothing is not None and (
            tuned.score > nothing if better == "min" else tuned.score < nothing
        )
        if worse:
            wrong.append(
                f"arm {arm!r}: tuned to {tuned.score:.4g}, worse than doing nothing "
                f"({nothing:.4g}): the arm is broken or its search looked in the wrong place"
            )
    return wrong


def tune(
    run: Callable[[float], float | Sequence[float]], rates: Sequence[float], better: str = "min"
) -> Tuned:
    """Choose a learning rate from a given grid on validation data.

    Args:
        run: Takes a rate and returns a validation score, or several (one per seed).
        rates: The grid. Give every arm the same one.
        better: ``"min"`` for a loss, ``"max"`` for an accuracy.

    Returns:
        The best rate with all scores. A diverged run (score not finite) counts as worst.

    Raises:
        ValueError: If the grid is empty, repeats itself or holds a rate that is not positive and
            finite, ``better`` is unknown, or every rate diverged.

    Warns:
        UserWarning: If the best rate lies on the edge of the grid, so a better one may lie outside.
    """
    if better not in ("min", "max"):
        raise ValueError(f'better = {better!r}: choose "min" or "max".')
    grid = sorted(float(rate) for rate in rates)
    if not grid or len(set(grid)) != len(grid):
        raise ValueError("rates must hold at least one rate and none twice.")
    if any(not (math.isfinite(rate) and rate > 0) for rate in grid):
        raise ValueError(f"rates = {grid}: every rate must be positive and finite.")
    found = best({r: float(np.mean(np.asarray(run(r), dtype=float))) for r in grid}, better)
    if found.on_edge:
        warnings.warn(
            f"the best rate {found.rate:g} lies on the edge of the grid "
            f"{[f'{r:g}' for r in grid]}: extend the grid on that side for every arm.",
            stacklevel=2,
        )
    return found
