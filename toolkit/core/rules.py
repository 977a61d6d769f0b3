"""Rules that turn an interval into one of four verdicts.

No verdict is ever typed by hand: a chapter states the rule before it sees the numbers.
The same margin works in both directions, so a rule can refute as easily as confirm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from toolkit.core.intervals import Interval

HOLDS = "holds"
IN_PART = "holds in part"
NOT_SEEN = "not seen here"
REFUTED = "refuted here"
VERDICTS = (HOLDS, IN_PART, NOT_SEEN, REFUTED)


@dataclass(frozen=True)
class Rule:
    """A condition on one interval. Build one with :func:`above`, :func:`below` and the like.

    Args:
        kind: ``"above"``, ``"below"`` or ``"within"``.
        low: Bound for ``above``, lower end for ``within``.
        high: Bound for ``below``, upper end for ``within``.
        margin: Smallest difference that matters, in the unit of the interval.
    """

    kind: str
    low: float | None = None
    high: float | None = None
    margin: float = 0.0

    def __post_init__(self) -> None:
        for name in ("low", "high", "margin"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} = {value}: a rule needs finite numbers.")
        if self.margin < 0:
            raise ValueError(f"margin = {self.margin}: give the size of the margin, not a sign.")
        if self.kind == "within" and self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high}): swap them.")

    def verdict(self, found: Interval) -> str:
        """Return the verdict on one interval.

        A single run has no interval. It can speak for a claim but never settle it: at best
        ``"holds in part"``, otherwise ``"not seen here"``.
        """
        if not found.known:
            point = Interval(found.estimate, found.estimate, found.estimate, 1, 1.0, "exact")
            return IN_PART if self.verdict(point) == HOLDS else NOT_SEEN
        if self.kind == "within":
            if self.low <= found.low and found.high <= self.high:
                return HOLDS
            return REFUTED if found.high < self.low or found.low > self.high else NOT_SEEN
        # "below" is "above" seen in a mirror
        sign, bound = (1, self.low) if self.kind == "above" else (-1, self.high)
        near, far = sorted((sign * (found.low - bound), sign * (found.high - bound)))
        if near > self.margin:
            return HOLDS
        if far < -self.margin:
            return REFUTED
        return IN_PART if near > 0 else NOT_SEEN

    def text(self) -> str:
        """Return the rule in words, for the page."""
        if self.kind == "within":
            return f"between {self.low:g} and {self.high:g}"
        bound = self.low if self.kind == "above" else self.high
        return f"{self.kind} {bound:g}" + (f" by more than {self.margin:g}" if self.margin else "")

    def record(self) -> dict[str, Any]:
        """Return the rule as plain data for the results file."""
        return asdict(self)


def above(value: float = 0.0, margin: float = 0.0) -> Rule:
    """The quantity exceeds ``value`` by more than ``margin``.

    For a paired difference leave ``value`` at 0. Verdicts, with both numbers measured from
    ``value``: whole interval above ``+margin`` *holds*; whole interval below ``-margin``
    *refuted here*; whole interval above 0 but not beyond the margin *holds in part* (the direction
    is sure, the size is not); anything else *not seen here*.
    """
    return Rule("above", low=float(value), margin=float(margin))


def below(value: float = 0.0, margin: float = 0.0) -> Rule:
    """The quantity lies below ``value`` by more than ``margin``: the mirror of :func:`above`."""
    return Rule("below", high=float(value), margin=float(margin))


def within(low: float, high: float) -> Rule:
    """The whole interval lies in ``[low, high]``; wholly outside refutes; else not seen here."""
    return Rule("within", low=float(low), high=float(high))


def equal(value: float, tolerance: float) -> Rule:
    """The quantity equals ``value`` up to ``tolerance``, shown by an interval that small.

    A wide interval that merely contains ``value`` does not show equality: *not seen here*.

    Raises:
        ValueError: If ``tolerance`` is negative.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance = {tolerance}: give a size, not a sign.")
    return within(value - tolerance, value + tolerance)


def combine(verdicts: Sequence[str], need: str = "all") -> str:
    """Return the verdict on a claim with several conditions.

    Args:
        verdicts: One verdict per condition, at least one.
        need: ``"all"``: the claim speaks of every condition. All hold: *holds*; some hold (wholly
            or in part): *holds in part*; none holds and one is refuted: *refuted here*.
            ``"any"``: one condition suffices. One holds: *holds*; one holds in part:
            *holds in part*; all refuted: *refuted here*. Otherwise *not seen here*.

    Raises:
        ValueError: If there is no verdict, an unknown one, or ``need`` is unknown.
    """
    unknown = [verdict for verdict in verdicts if verdict not in VERDICTS]
    if unknown or not verdicts:
        raise ValueError(f"verdicts = {list(verdicts)}: give one or more of {list(VERDICTS)}.")
    if need not in ("all", "any"):
        raise ValueError(f'need = {need!r}: choose "all" or "any".')
    some, every = (any, all) if need == "all" else (all, any)
    if every(verdict == HOLDS for verdict in verdicts):
        return HOLDS
    if any(verdict in (HOLDS, IN_PART) for verdict in verdicts):
        return IN_PART
    return REFUTED if some(verdict == REFUTED for verdict in verdicts) else NOT_SEEN
