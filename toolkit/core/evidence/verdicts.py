"""From an interval and a margin to a verdict, and from several verdicts to one.

The interval [l, u] is that of the effect in the claimed direction; the margin m > 0 is the smallest
effect that matters. In this order:

========================== =================================================================
no difference that matters -m < l and u < m: whatever effect there is, it is too small
holds                      l > m: the effect is there, and it matters
direction only             0 < l: the effect is there; whether it matters is not sure
refuted here               u < m: an effect of the claimed size is excluded
open                       none of these: both no effect and one that matters remain possible
========================== =================================================================

Before all of them stands *not testable here*, for an experiment that could not have told; see
:mod:`toolkit.core.evidence.judging`. So a claim is open exactly if its interval holds both 0 and m.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from toolkit.core.evidence.intervals import LEVEL, quantile

HOLDS = "holds"
DIRECTION = "direction only"
OPEN = "open"
NOT_TESTABLE = "not testable here"
NO_DIFFERENCE = "no difference that matters"
REFUTED = "refuted here"
VERDICTS = (HOLDS, DIRECTION, OPEN, NOT_TESTABLE, NO_DIFFERENCE, REFUTED)
"""Verdicts on one condition, from the strongest to the weakest."""

MIXED = "mixed"
UNSTABLE = "unstable"
CLAIM_VERDICTS = (*VERDICTS, MIXED, UNSTABLE)
"""Verdicts on a claim: those of a condition, and two that only a claim can get."""

LEAST = 8
"""Fewer repeats than this decide nothing."""
MOST = 1000
"""Beyond so many repeats the number that would settle a claim is not worked out."""


def verdict(low: float, high: float, margin: float, n: int | None = None) -> str:
    """Return the verdict on one effect, by the rule in the module's text.

    Args:
        low: Lower end of the effect's interval, in the claimed direction.
        high: Upper end.
        margin: The smallest effect that matters, above 0, in the same unit.
        n: How many repeats there were; fewer than 8 give ``"open"``. ``None`` leaves that out, for
            an effect without randomness and for one block of seeds alone.

    Raises:
        ValueError: If the margin is not positive and finite, or the ends are no interval.
    """
    check_margin(margin)
    if math.isnan(low) or math.isnan(high) or low > high:
        raise ValueError(f"[{low}, {high}] is no interval: give the lower end first.")
    if n is not None and n < LEAST:
        return OPEN
    if -margin < low and high < margin:
        return NO_DIFFERENCE
    if low > margin:
        return HOLDS
    if low > 0:
        return DIRECTION
    if high < margin:
        return REFUTED
    return OPEN


def check_margin(margin: float | None) -> None:
    """Refuse a margin that is not a positive finite number.

    Raises:
        ValueError: If it is none.
    """
    given = isinstance(margin, (int, float)) and not isinstance(margin, bool)
    if not given or not math.isfinite(margin) or margin <= 0:
        raise ValueError(
            f"margin = {margin}: give the smallest difference that matters, a positive number in "
            "the unit of the claim."
        )


def decided(word: str) -> bool:
    """Whether a verdict says something: neither open nor not testable."""
    return word not in (OPEN, NOT_TESTABLE)


def combine(verdicts: Sequence[str]) -> str:
    """Return the verdict on a claim that speaks of all its conditions.

    All hold: *holds*. One is refuted beside one that holds: *mixed*. Otherwise the weakest, in the
    order of :data:`VERDICTS`.

    Args:
        verdicts: One verdict per condition, at least one.

    Raises:
        ValueError: If there is no verdict, or an unknown one.
    """
    _known(verdicts)
    if REFUTED in verdicts and HOLDS in verdicts:
        return MIXED
    return max(verdicts, key=VERDICTS.index)


def _known(verdicts: Sequence[str]) -> None:
    unknown = [word for word in verdicts if word not in VERDICTS]
    if unknown or not verdicts:
        raise ValueError(f"verdicts = {list(verdicts)}: give one or more of {list(VERDICTS)}.")


def needed(ends: Callable[[int], tuple[float, float]], margin: float) -> int | None:
    """Return how many repeats would settle an open claim, were mean and spread to stay.

    Args:
        ends: Gives both ends of the interval for n repeats; it must narrow as n grows.
        margin: As for :func:`verdict`.

    Returns:
        The smallest n from 8 on that gives a verdict other than open; ``None`` if 1,000 would not.
    """

    def settles(n: int) -> bool:
        return verdict(*ends(n), margin) != OPEN

    if not settles(MOST):
        return None
    low, high = LEAST - 1, MOST  # narrowing intervals never become open again
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if settles(middle) else (middle, high)
    return high


def needed_text(n: int | None) -> str:
    """Return the number that would settle a claim, in words."""
    if n is None:
        return f"more than {MOST:,} repeats with this mean and spread would be needed to settle it"
    return f"about {n} repeats with this mean and spread would settle it"


# ---------------------------------------------------------------- errors to expect
def false_chance(sd: float, n: int, margin: float, level: float = LEVEL) -> float:
    r"""Return how likely *holds* or *direction only* is where the true effect is 0.

    For normal values with standard deviation ``sd``. Both verdicts need l > 0, which has
    probability (1 - level) / 2; those with u < m besides read *no difference that matters* and are
    no error. With h(s) the half-width at the measured spread s,

    .. math:: \frac{1-\text{level}}{2} -
        \mathrm{E}_s\,\bigl[\Phi\bigl(\tfrac{m-h(s)}{\sigma/\sqrt n}\bigr)
        - \Phi\bigl(\tfrac{h(s)}{\sigma/\sqrt n}\bigr)\bigr]_+

    Args:
        sd: Standard deviation of one paired difference, not negative, in the unit of the margin.
        n: Repeats. Fewer than 8 decide nothing, so the chance is 0.
        margin: The smallest difference that matters.
        level: Confidence level of the interval.
    """
    check_margin(margin)
    if n < LEAST or sd == 0:
        return 0.0
    import numpy as np
    from scipy.special import chdtri, ndtr

    error = sd / n**0.5
    probabilities = (np.arange(2000) + 0.5) / 2000
    spread = error * np.sqrt(chdtri(n - 1, probabilities) / (n - 1))  # of the mean, as measured
    half = quantile(n, level) * spread
    small = np.clip(ndtr((margin - half) / error) - ndtr(half / error), 0, None).mean()
    return float((1 - level) / 2 - small)


def missed_chance(n: int, level: float = LEVEL) -> float:
    """Return how likely *refuted here* or *no difference* is where the true effect is the margin.

    Both verdicts together mean u < m, and an interval lies wholly below the true effect with
    probability (1 - level) / 2, whatever the spread. Fewer than 8 repeats decide nothing.
    """
    return (1 - level) / 2 if n >= LEAST else 0.0
