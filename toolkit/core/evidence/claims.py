"""Claims and facts, declared before anything is measured.

>>> from toolkit.core.evidence import Claim, Condition
>>> rank = Claim(
...     id="rank",
...     text="Accuracy rises with rank.",
...     whose="paper",
...     where="section 4.2, table 3",
...     quantity="test accuracy, rank 8 minus rank 1",
...     unit="points",
...     margin=1.0,
...     reason="two pages of the book differ by less",
...     conditions=(Condition("digits", n=20, spread=1.2, support=(-100, 100)),),
... )

A declaration that could not hold, or could not be refuted, at its own n and spread is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.core.evidence.intervals import LEVEL, SCALES, quantile
from toolkit.core.evidence.verdicts import LEAST, MOST, check_margin

WHOSE = ("paper", "code", "ours")
MOST_CLAIMS = 6
"""So many claims a chapter may have."""


@dataclass(frozen=True)
class Condition:
    """One setting that a claim is tested in, with what is known of it beforehand.

    Args:
        name: The setting in words, such as ``"digits"``; shown in the table.
        n: How many seeds will be run at scale ``cpu``, at least 8.
        spread: Standard deviation of the effect of one seed (of the paired difference), from a
            pilot or the bed's table, in the unit of the claim. Above 0.
        support: Smallest and largest effect that is possible; ``None`` if nothing bounds it. The
            scale ``"bounded"`` needs it.
        decides: Whether this is the condition the claim stands on. It is marked in the table; all
            conditions count.
        grid: The fixed values that the claim is made against, three or more, where it says that
            something beats a fixed rule. All must be measured, and the best is taken.

    Raises:
        ValueError: If an argument is missing or impossible, naming it.
    """

    name: str
    n: int
    spread: float
    support: tuple[float, float] | None = None
    decides: bool = False
    grid: tuple[float | str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("name is empty: say in words which setting the condition is.")
        where = f"condition {self.name!r}"
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < LEAST:
            raise ValueError(
                f"{where}: n = {self.n}: declare {LEAST} seeds or more; fewer decide nothing."
            )
        if not math.isfinite(self.spread) or self.spread <= 0:
            raise ValueError(
                f"{where}: spread = {self.spread}: give the standard deviation of one seed's "
                "effect, above 0. What does not vary is a Fact."
            )
        if self.support is not None:
            low, high = self.support
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(
                    f"{where}: support = {self.support}: give the smallest and the largest effect, "
                    "or None."
                )
            object.__setattr__(self, "support", (float(low), float(high)))
        object.__setattr__(self, "grid", tuple(self.grid))
        if self.grid and len(set(self.grid)) < 3:
            raise ValueError(
                f"{where}: grid = {self.grid}: two ends are no grid, as a value between them may "
                "do better. Name three fixed values or more."
            )


@dataclass(frozen=True)
class Claim:
    """One claim, as declared before it is measured.

    Args:
        id: Short name, unique in the chapter (lower case, digits, hyphens).
        text: The claim in one plain sentence.
        whose: ``"paper"``, ``"code"`` (the published code) or ``"ours"``.
        where: Where it is said: section, table, file. ``None`` for a paper that was not read; must
            be ``None`` for a question of our own.
        figure: The source's own figure, as text; ``None`` if there is none to quote.
        quantity: What is measured, in words and in the claimed direction: "test accuracy, rank 8
            minus rank 1", or with ``better="less"`` "log-loss, rank 8 below rank 1".
        unit: Unit of the effect, such as ``"points"``. Must be ``"%"`` at scale ``"log"``.
        margin: The smallest effect that matters, above 0. One for all conditions.
        reason: Why a smaller effect does not matter.
        conditions: The settings it is tested in, at least one; at most one decides.
        than: The claimed effect is counted from here; 0 if the claim is "more than".
        scale: Working scale of the interval: ``"identity"``, ``"log"`` or ``"bounded"``; see
            :mod:`toolkit.core.evidence.intervals`. At ``"log"`` a paired effect is in per cent.
        better: ``"more"`` if the claim says that ours lies above theirs, ``"less"`` if below. The
            effect is counted in that direction either way.

    Raises:
        ValueError: If an argument is missing or impossible, or if the rule could not hold, or could
            not be refuted, at a condition's n and spread; with the n or margin that would do.
    """

    id: str
    text: str
    whose: str = ""
    where: str | None = None
    figure: str | None = None
    quantity: str = ""
    unit: str = ""
    margin: float | None = None
    reason: str = ""
    conditions: tuple[Condition, ...] = ()
    than: float = 0.0
    scale: str = "identity"
    better: str = "more"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", self.id):
            raise ValueError(f"id = {self.id!r}: use lower-case letters, digits and hyphens.")
        try:
            self._check()
        except ValueError as error:
            raise ValueError(f"claim {self.id!r}: {error}") from None

    def _check(self) -> None:
        object.__setattr__(self, "conditions", tuple(self.conditions))
        _check_source(self.whose, self.where, self.figure)
        check_margin(self.margin)
        for name in ("text", "quantity", "unit", "reason"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} is empty: {_WANTED[name]}.")
        if self.scale not in SCALES:
            raise ValueError(f"scale = {self.scale!r}: choose one of {', '.join(SCALES)}.")
        if self.better not in ("more", "less"):
            raise ValueError(f'better = {self.better!r}: choose "more" or "less".')
        if not math.isfinite(self.than):
            raise ValueError(f"than = {self.than}: give a finite number.")
        names = [part.name for part in self.conditions]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"conditions = {names}: name one or more, none twice.")
        if sum(part.decides for part in self.conditions) > 1:
            raise ValueError("more than one condition decides: mark the one the claim stands on.")
        for part in self.conditions:
            if self.scale == "bounded" and part.support is None:
                raise ValueError(
                    f'condition {part.name!r}: scale = "bounded" needs support, the smallest and '
                    "largest effect that is possible."
                )
            check_power(part, self.margin)


_WANTED = {
    "text": "give the claim in one plain sentence",
    "quantity": "say in words what is measured, and what minus what",
    "unit": 'name the unit of the effect, such as "points" or "nats per character"',
    "reason": "say why a smaller difference does not matter",
}


def _check_source(whose: str, where: str | None, figure: str | None) -> None:
    if whose not in WHOSE:
        raise ValueError(
            f'whose = {whose!r}: say who claims it: "paper", "code" (the published code) or "ours".'
        )
    if whose == "code" and not where:
        raise ValueError("where is missing: name the file and function of the published code.")
    if whose == "paper" and where is None and figure is not None:
        raise ValueError(
            "where is missing: a figure of the paper needs its section or table. For a paper that "
            "was not read leave out both."
        )
    if whose == "ours" and (where is not None or figure is not None):
        raise ValueError("where and figure must be None for a question of our own.")
    for name, words in (("where", where), ("figure", figure)):
        if words is not None and not words.strip():
            raise ValueError(f"{name} is empty: give words, or None.")


def half_width(n: int, spread: float, level: float = LEVEL) -> float:
    """Return the half-width of the interval to expect, t s / sqrt(n)."""
    return quantile(n, level) * spread / n**0.5


def check_power(part: Condition, margin: float) -> None:
    """Refuse a condition that cannot decide in both directions.

    With half-width h = t s / sqrt(n) at the declared n and spread: the rule can hold only if the
    largest possible effect less h exceeds the margin; it can be refuted only if with a true effect
    of 0 (or the smallest possible one, if that is larger) the interval's upper end, h above it,
    would lie below the margin.

    Args:
        part: The condition.
        margin: The smallest effect that matters.

    Raises:
        ValueError: If either fails, with the n or the margin that would do.
    """
    low, high = part.support or (-math.inf, math.inf)
    floor = max(0.0, low)
    half = half_width(part.n, part.spread)
    given = f"condition {part.name!r}: with n = {part.n} and spread {part.spread:g} the interval "
    given += f"is {half:.3g} wide on either side"
    if high - half <= margin:
        raise ValueError(
            f"{given}, so the claim could never hold: the largest possible effect {high:g} less "
            f"that does not exceed the margin {margin:g}. "
            + _remedy(part.spread, high - margin, f"a margin below {high - half:.3g}", high > half)
        )
    if floor + half >= margin:
        raise ValueError(
            f"{given}, so the claim could never be refuted: a true effect of {floor:g} would not "
            f"be told from the margin {margin:g}. "
            + _remedy(part.spread, margin - floor, f"a margin above {floor + half:.3g}", True)
        )


def _remedy(spread: float, room: float, margin: str, possible: bool) -> str:
    """Say which n makes the half-width smaller than the room there is, or which margin does."""
    n = next((n for n in range(LEAST, MOST + 1) if half_width(n, spread) < room), None)
    ways = [f"n = {n}"] if n else []
    ways += [margin] if possible else []
    if not ways:
        return "No n and no margin would do: choose another quantity."
    return f"It would take {' or '.join(ways)}."


@dataclass(frozen=True)
class Fact:
    """Something that is so or not, without randomness: a count, an identity, a shape.

    Args:
        id: Short name, unique in the chapter (lower case, digits, hyphens).
        text: The fact in one plain sentence.
        passed: Whether it was found to be so.
        value: The number found, printed as it is; ``None`` if there is none to show.
        unit: Unit of the number.

    Raises:
        ValueError: If ``id`` is malformed, ``text`` empty or ``value`` not finite.
        TypeError: If ``passed`` is not a truth value.
    """

    id: str
    text: str
    passed: bool
    value: float | int | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", self.id):
            raise ValueError(f"id = {self.id!r}: use lower-case letters, digits and hyphens.")
        if not self.text.strip():
            raise ValueError(f"fact {self.id!r}: text is empty: give the fact in one sentence.")
        if self.passed not in (True, False) or isinstance(self.passed, float):
            raise TypeError(
                f"fact {self.id!r}: passed is {self.passed!r}: give True or False, the outcome of "
                "a comparison."
            )
        object.__setattr__(self, "passed", bool(self.passed))
        if self.value is not None:
            number = self.value.item() if hasattr(self.value, "item") else self.value
            if isinstance(number, bool) or not math.isfinite(number):
                raise ValueError(f"fact {self.id!r}: value is {self.value}: give a finite number.")
            object.__setattr__(self, "value", number)

    @property
    def verdict(self) -> str:
        """``"true"`` or ``"not true"``."""
        return "true" if self.passed else "not true"

    def found(self) -> str:
        """Return the number as text, whole numbers whole: ``384 numbers``; empty without one."""
        if self.value is None:
            return ""
        whole = float(self.value).is_integer() and abs(self.value) < 1e15
        shown = f"{int(self.value):,}" if whole else f"{self.value:.3g}"
        return f"{shown} {self.unit}".strip()

    def record(self) -> dict[str, object]:
        """Return plain data for the results file."""
        return {
            "id": self.id,
            "text": self.text,
            "passed": self.passed,
            "value": self.value,
            "unit": self.unit,
        }


def check_set(claims: Sequence[Claim]) -> None:
    """Refuse a chapter's list of claims that is too long or names one twice.

    Raises:
        ValueError: If there are more than six, or an id stands twice.
    """
    ids = [claim.id for claim in claims]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise ValueError(f"claims {twice} are declared twice: choose other ids.")
    if len(ids) > MOST_CLAIMS:
        raise ValueError(
            f"{len(ids)} claims are declared, {MOST_CLAIMS} are allowed: keep those the chapter is "
            "about, the paper's first."
        )
