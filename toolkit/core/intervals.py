"""Confidence intervals for a handful of repeats.

Why two kinds of interval. Chapters repeat an experiment 3 to 5 times. A percentile bootstrap of
three values can only ever resample those three, so its 95 % interval is roughly their range and
covers the true mean far less often than it says. Student's t widens for few repeats, at the price
of assuming roughly normal noise. Below ten values :func:`interval` therefore uses t; from ten on
it uses the bias-corrected bootstrap (BCa), which assumes no shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FEW = 10
"""Fewer values than this get a t-interval; a bootstrap of them would be too narrow."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Args:
        estimate: The mean of the values, or the one value.
        low: Lower end; ``None`` for a single run, where no spread is known.
        high: Upper end; ``None`` for a single run.
        n: How many values went in.
        level: Confidence level, 0.95 by default.
        method: ``"t"``, ``"bootstrap"``, ``"single"`` (one run) or ``"exact"`` (not random).

    Raises:
        ValueError: If a number is not finite, the ends are out of order, or only one end is given.
    """

    estimate: float
    low: float | None
    high: float | None
    n: int
    level: float = 0.95
    method: str = "t"

    def __post_init__(self) -> None:
        for name in ("estimate", "low", "high"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(
                    f"{name} is {value}: an interval needs finite numbers. "
                    "Find the run that diverged, or report it as its own condition."
                )
        if (self.low is None) != (self.high is None):
            raise ValueError("low and high must both be numbers, or both None for a single run.")
        if self.low is not None and self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high}): swap them.")

    @property
    def known(self) -> bool:
        """Whether the spread is known (more than one run, or not random at all)."""
        return self.low is not None

    def __str__(self) -> str:
        return self.text()

    def text(self, unit: str = "") -> str:
        """Return e.g. ``0.31 [0.12, 0.50] points (n = 3)`` with digits that fit the spread."""
        tail = f" {unit}" if unit else ""
        if self.method == "exact":
            return f"{self.estimate:.6g}{tail} (exact)"
        if not self.known:
            return f"{self.estimate:.4g}{tail} (one run)"
        spread = self.high - self.low
        digits = _digits(spread if spread > 0 else abs(self.estimate))
        low, mid, high = (
            f"{v:.{digits}f}" if digits is not None else f"{v:.3g}"
            for v in (self.low, self.estimate, self.high)
        )
        return f"{mid} [{low}, {high}]{tail} (n = {self.n})"


def _digits(spread: float) -> int | None:
    """Decimals that show two significant digits of the spread; None where %g reads better."""
    if spread == 0 or not 1e-4 <= spread < 1e5:
        return None
    return max(0, 1 - math.floor(math.log10(spread)))


def exact(value: float) -> Interval:
    """Return a value without randomness (a count, an error of an identity) as an interval."""
    return Interval(float(value), float(value), float(value), 1, 1.0, "exact")


def single(value: float) -> Interval:
    """Return one run of something random. Its spread is unknown, so no verdict on it is firm."""
    return Interval(float(value), None, None, 1, 0.0, "single")


def interval(
    values: Sequence[float],
    level: float = 0.95,
    method: str = "auto",
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return mean and confidence interval of repeated measurements.

    Args:
        values: One finite number per repeat, at least two.
        level: Confidence level, in (0, 1).
        method: ``"auto"`` (t below ten values, else bootstrap), ``"t"`` or ``"bootstrap"``.
        resamples: Bootstrap resamples.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If there are fewer than two values, one is not finite, or an option is unknown.
    """
    if method not in ("auto", "t", "bootstrap"):
        raise ValueError(f'method = {method!r}: choose "auto", "t" or "bootstrap".')
    data = _values(values, level)
    if method == "bootstrap" or (method == "auto" and data.size >= FEW):
        return bootstrap(data, level, resamples, seed)
    from scipy import stats

    mean = float(data.mean())
    half = float(stats.t.ppf(0.5 + level / 2, data.size - 1) * data.std(ddof=1) / data.size**0.5)
    return Interval(mean, mean - half, mean + half, data.size, level, "t")


def bootstrap(
    values: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Return the BCa bootstrap interval of the mean (Efron 1987, through ``scipy.stats``).

    Args:
        values: At least ten finite numbers.
        level: Confidence level, in (0, 1).
        resamples: Bootstrap resamples.
        seed: Seed of the resampling.

    Raises:
        ValueError: If there are fewer than ten values: use :func:`interval`, which switches to t.
    """
    data = _values(values, level)
    if data.size < FEW:
        raise ValueError(
            f"values has {data.size} entries: a bootstrap of fewer than {FEW} is too narrow. "
            "Use evidence.interval(values), which takes a t-interval here."
        )
    mean = float(data.mean())
    if np.ptp(data) == 0:  # every resample is the same, and BCa would divide by zero
        return Interval(mean, mean, mean, data.size, level, "bootstrap")
    from scipy import stats

    result = stats.bootstrap(
        (data,),
        np.mean,
        confidence_level=level,
        n_resamples=resamples,
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    low, high = (float(end) for end in result.confidence_interval)
    return Interval(mean, low, high, data.size, level, "bootstrap")


def paired(
    a: Sequence[float] | Mapping[Any, float],
    b: Sequence[float] | Mapping[Any, float],
    level: float = 0.95,
) -> Interval:
    """Return the interval of ``a - b``, paired by seed.

    Both arms must have run on the same seeds: what a seed does to both cancels. Two mappings (or
    pandas Series) are matched by key, two sequences by position.

    Args:
        a: Results of the first arm, one per seed.
        b: Results of the second arm, in the same order or with the same keys.
        level: Confidence level, in (0, 1).

    Raises:
        ValueError: If lengths or keys differ, or fewer than two pairs remain.
    """
    keyed = [hasattr(arm, "keys") for arm in (a, b)]
    if any(keyed):
        if not all(keyed):
            raise ValueError("a and b must both be keyed by seed, or both be plain sequences.")
        keys = list(a.keys())
        if len(set(keys)) != len(keys) or len(b) != len(keys) or set(keys) != set(b.keys()):
            odd = sorted(map(str, set(keys) ^ set(b.keys())))
            raise ValueError(
                f"a and b do not share the same seeds (only in one, or repeated: {odd}). "
                "Run both arms on every seed."
            )
        a, b = [a[key] for key in keys], [b[key] for key in keys]
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if first.shape != second.shape:
        raise ValueError(
            f"a has shape {first.shape} but b has {second.shape}: "
            "a paired difference needs one value of each per seed."
        )
    return interval(first - second, level)


def _values(values: Sequence[float], level: float) -> np.ndarray:
    data = np.asarray(values, dtype=float)
    if data.ndim != 1:
        raise ValueError(f"values has shape {data.shape}: give one number per repeat.")
    if not 0 < level < 1:
        raise ValueError(f"level = {level}: choose a number between 0 and 1, such as 0.95.")
    bad = np.flatnonzero(~np.isfinite(data))
    if bad.size:
        raise ValueError(
            f"values[{bad[0]}] is {data[bad[0]]}: a diverged run cannot be averaged away. "
            "Report it as its own condition, or fix the run."
        )
    if data.size < 2:
        raise ValueError(
            f"values has {data.size} entries: an interval needs two or more repeats. "
            "For one run say so with evidence.single(value); "
            "for a number without randomness use evidence.exact(value)."
        )
    return data
