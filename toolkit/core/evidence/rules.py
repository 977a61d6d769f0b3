"""Rules of the first edition, judged as the second edition judges.

Eight chapters state rules such as ``above(0)`` beside their claims instead of declaring them. The
words for them come from :func:`toolkit.core.evidence.verdict` like all others: without a margin, or
with fewer than 8 repeats, a claim is open; an exact number is a fact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from toolkit.core.evidence.claims import Fact
from toolkit.core.evidence.intervals import Interval, quantile
from toolkit.core.evidence.verdicts import (
    HOLDS,
    LEAST,
    NOT_TESTABLE,
    OPEN,
    REFUTED,
    combine,
    needed,
    needed_text,
    strongest,
    verdict,
)

NOTE = (
    "Judged by rules written before the second edition: what was given no margin, or was repeated "
    f"fewer than {LEAST} times, is open."
)
UNSAID = "unsaid"
"""Whose a claim is, where the first edition did not say."""


@dataclass(frozen=True)
class Rule:
    """A condition on one interval. Build one with :func:`above`, :func:`below` and the like.

    Args:
        kind: ``"above"``, ``"below"`` or ``"within"``.
        low: Bound for ``above``, lower end for ``within``.
        high: Bound for ``below``, upper end for ``within``.
        margin: Smallest difference that matters, in the unit of the interval; 0 for none given.

    Raises:
        ValueError: If a number is not finite, the margin negative or the ends out of order.
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

    def effect(self, low: float, high: float) -> tuple[float, float]:
        """Return the interval of the effect: in the claimed direction, counted from the bound."""
        if self.kind == "above":
            return low - self.low, high - self.low
        return self.high - high, self.high - low

    def passed(self, value: float) -> bool:
        """Whether a number without randomness satisfies the rule."""
        if self.kind == "within":
            return self.low <= value <= self.high
        return self.effect(value, value)[0] > self.margin

    def verdict(self, found: Interval) -> str:
        """Return the verdict on one interval, by the rules of the second edition."""
        return self.judged(found)["verdict"]

    def judged(self, found: Interval) -> dict[str, Any]:
        """Return ``verdict``, ``reason`` and ``n_needed`` for one interval."""
        if not found.known:
            return _open("one run shows no spread")
        if found.method != "exact" and found.low == found.high:
            why = "all repeats gave the same number, and that was not declared exact"
            return _open(why) | {"verdict": NOT_TESTABLE}
        if self.kind != "within" and not self.margin:
            return _open("no margin was declared")
        n = None if found.method == "exact" else found.n
        if self.kind == "within":
            return self._within(found, n)
        word = verdict(*self.effect(found.low, found.high), self.margin, n)
        if word != OPEN or n is None:
            return {"verdict": word, "reason": "", "n_needed": None}

        def ends(n: int) -> tuple[float, float]:
            half = quantile(n, found.level) * (found.sd or 0.0) / n**0.5
            return self.effect(found.estimate - half, found.estimate + half)

        n_needed = needed(ends, self.margin) if found.sd else None
        few = f"fewer than {LEAST} repeats decide nothing; " if n < LEAST else ""
        return _open(few + needed_text(n_needed)) | {"n_needed": n_needed}

    def _within(self, found: Interval, n: int | None) -> dict[str, Any]:
        if n is not None and n < LEAST:
            return _open(f"fewer than {LEAST} repeats decide nothing")
        if self.low <= found.low and found.high <= self.high:
            return {"verdict": HOLDS, "reason": "", "n_needed": None}
        if found.high < self.low or found.low > self.high:
            return {"verdict": REFUTED, "reason": "", "n_needed": None}
        return _open("the interval lies partly inside and partly outside")

    def text(self) -> str:
        """Return the rule in words, for the page."""
        if self.kind == "within":
            return f"between {self.low:g} and {self.high:g}"
        bound = self.low if self.kind == "above" else self.high
        return f"{self.kind} {bound:g}" + (f" by more than {self.margin:g}" if self.margin else "")

    def record(self) -> dict[str, Any]:
        """Return the rule as plain data for the results file."""
        return asdict(self)


def _open(reason: str) -> dict[str, Any]:
    return {"verdict": OPEN, "reason": reason, "n_needed": None}


def above(value: float = 0.0, margin: float = 0.0) -> Rule:
    """The quantity exceeds ``value``; differences up to ``margin`` do not matter."""
    return Rule("above", low=float(value), margin=float(margin))


def below(value: float = 0.0, margin: float = 0.0) -> Rule:
    """The quantity lies below ``value``: the mirror of :func:`above`."""
    return Rule("below", high=float(value), margin=float(margin))


def within(low: float, high: float) -> Rule:
    """The whole interval lies in ``[low, high]``; wholly outside refutes; else it is open."""
    return Rule("within", low=float(low), high=float(high))


def equal(value: float, tolerance: float) -> Rule:
    """The quantity equals ``value`` up to ``tolerance``, shown by an interval that small.

    Raises:
        ValueError: If ``tolerance`` is negative.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance = {tolerance}: give a size, not a sign.")
    return within(value - tolerance, value + tolerance)


def judge_earlier(claim: Mapping[str, Any]) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Judge a claim of the first edition anew.

    Args:
        claim: As in a results file of schema 1. Whatever verdict it holds is not read.

    Returns:
        The claim in the form that :meth:`toolkit.core.evidence.Judged.record` has, with ``note``,
        and with ``rule_text`` for every condition; ``None`` if all its conditions are exact. Then
        the facts, one for each exact condition.

    Raises:
        KeyError, TypeError, ValueError: If a field is missing or holds something impossible.
    """
    facts, parts, margins = [], [], set()
    for part in claim["conditions"]:
        rule = Rule(**part["rule"])
        fields = ("estimate", "low", "high", "n", "level", "method")
        found = Interval(*(part[name] for name in fields))
        if found.method == "exact":
            facts.append((part["name"], found.estimate, rule.passed(found.estimate)))
            continue
        margins.add(rule.margin)
        kept = {name: part[name] for name in ("name", *fields)}
        kept |= {"decides": False, "n_declared": None, "sd": found.sd, "blocks": [], "fixed": None}
        kept |= {"failed": None, "rule_text": rule.text(), "margin": rule.margin or None}
        parts.append(kept | rule.judged(found))
    made = [
        Fact(
            claim["id"] if len(facts) == 1 else f"{claim['id']}-{number}",
            f"{claim['text']} ({name})" if name else claim["text"],
            passed,
            value or None,  # a deviation of 0 is told by the mark; "0 numbers" reads as a count
            claim["unit"],
        ).record()
        for number, (name, value, passed) in enumerate(facts, 1)
    ]
    if not parts:
        return None, made
    words = [part["verdict"] for part in parts]
    word = strongest(words) if claim["need"] == "any" else combine(words)
    waiting = [part["n_needed"] for part in parts if part["verdict"] == OPEN]
    record = {
        "id": claim["id"],
        "text": claim["text"],
        "whose": UNSAID,
        "where": None,
        "figure": claim["paper"],
        "quantity": "",
        "unit": claim["unit"],
        "margin": margins.pop() or None if len(margins) == 1 else None,
        "reason": "",
        "note": claim["note"],
        "need": claim["need"],
        "verdict": word,
        "pooled": word,
        "late": False,
        "committed": True,
        "n_needed": None if not waiting or None in waiting else max(waiting),
        "conditions": parts,
    }
    return record, made
