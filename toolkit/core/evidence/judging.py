"""From measured runs to a judged claim.

A condition is *not testable here*, whatever its interval, if the bed could not have told: fewer
than two pairs of runs ended; the positive control does not beat doing nothing by the margin; the
two arms gave bit for bit the same results; or nothing varies and that was not declared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from toolkit.core.evidence.claims import Claim, Condition
from toolkit.core.evidence.declaration import declare
from toolkit.core.evidence.effects import Effect, effect, over_nothing
from toolkit.core.evidence.intervals import LEVEL, Interval
from toolkit.core.evidence.measured import Measured, best_fixed, pairs
from toolkit.core.evidence.verdicts import (
    LEAST,
    NOT_TESTABLE,
    OPEN,
    UNSTABLE,
    combine,
    decided,
    needed,
    needed_text,
    verdict,
)


@dataclass(frozen=True)
class Judged:
    """A judged claim.

    Args:
        claim: The claim as declared.
        verdict: One of the six words, ``"mixed"`` or ``"unstable"``.
        pooled: The verdict on all seeds together; differs from ``verdict`` only if unstable.
        conditions: Plain data per condition; see :meth:`record`.
        n_needed: How many repeats would settle it if it is open; ``None`` if it is not, or if more
            than 1,000 would be needed.
        late: Whether the claim was added or changed after its first measurement.
        committed: Whether the declaring file was committed when it was first measured.
    """

    claim: Claim
    verdict: str
    pooled: str
    conditions: tuple[dict[str, Any], ...]
    n_needed: int | None = None
    late: bool = False
    committed: bool = True

    def record(self) -> dict[str, Any]:
        """Return plain data for the results file.

        The claim's own fields and its ``hash``, then ``verdict``, ``pooled``, ``late``,
        ``committed``, ``n_needed`` and ``conditions``: for each ``name``, ``decides``, ``n``,
        ``n_declared``, ``estimate``, ``low``, ``high``, ``level``, ``method``, ``sd`` (of one
        effect), ``verdict``, ``reason`` (in words, where it is open or not testable), ``n_needed``,
        ``blocks`` (the verdict of each block alone), ``failed`` (runs of either arm, of how many)
        and ``fixed`` (the best fixed value, where there is a grid).
        """
        declared = asdict(self.claim)
        del declared["conditions"]
        return declared | {
            "hash": declare([self.claim]).claims[self.claim.id],
            "verdict": self.verdict,
            "pooled": self.pooled,
            "late": self.late,
            "committed": self.committed,
            "n_needed": self.n_needed,
            "conditions": [dict(part) for part in self.conditions],
        }


def judge(
    claim: Claim,
    measured: Mapping[str, Measured],
    *,
    late: bool = False,
    committed: bool = True,
) -> Judged:
    """Judge a declared claim by its own rule.

    Args:
        claim: The claim.
        measured: The runs of each condition, by its name.
        late: Whether the claim is late; see :mod:`toolkit.core.evidence.declaration`.
        committed: Whether the declaring file was committed.

    Returns:
        The judged claim.

    Raises:
        ValueError: If names of conditions differ, the same runs count as two conditions, an effect
            is impossible by the declared support, or the scale does not suit the results.
        TypeError: If a condition's value is no :class:`Measured`.
    """
    names = [part.name for part in claim.conditions]
    if set(names) != set(measured):
        raise ValueError(
            f"claim {claim.id!r} declares conditions {names} but {list(measured)} were measured: "
            "give exactly the declared ones."
        )
    for name in names:
        if not isinstance(measured[name], Measured):
            kind = type(measured[name]).__name__
            raise TypeError(f"claim {claim.id!r}: measured[{name!r}] is a {kind}: give Measured.")
    judged: list[Any] = []
    seen: dict[Any, str] = {}
    for part in claim.conditions:
        where = f"claim {claim.id!r}, condition {part.name!r}"
        try:
            found = _Found(claim, part, measured[part.name])
            judged.append(found.record())
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        same = seen.setdefault(found.fingerprint, part.name) if found.fingerprint else part.name
        if same != part.name:
            raise ValueError(
                f"{where} holds the same runs as {same!r}: one experiment is one condition."
            )
    pooled = combine([part["verdict"] for part in judged])
    waiting = [part["n_needed"] for part in judged if part["verdict"] == OPEN]
    return Judged(
        claim,
        UNSTABLE if blocks_disagree(judged) else pooled,
        pooled,
        tuple(judged),
        None if not waiting or None in waiting else max(waiting),
        late,
        committed,
    )


def judge_all(
    claims: Sequence[Claim],
    measured: Mapping[str, Mapping[str, Measured]],
    declaration: Mapping[str, Any] | None = None,
) -> list[Judged]:
    """Judge all claims of a chapter.

    Args:
        claims: The declared claims.
        measured: By claim and condition.
        declaration: The results file's part of that name, from
            :func:`toolkit.core.evidence.register`; says which claims are late. ``None`` at scale
            ``ci``, where nothing is late.

    Raises:
        ValueError: If a claim was not measured, something was that is not declared, the declaration
            is of other claims, or as :func:`judge`.
    """
    now = declare(claims)
    if set(now.claims) != set(measured):
        raise ValueError(
            f"claims {list(now.claims)} are declared but {list(measured)} were measured: give "
            "exactly those."
        )
    if declaration is not None and declaration["hash"] != now.hash:
        raise ValueError(
            "the declaration is of other claims: register these ones first, with evidence.register."
        )
    found = []
    for claim in claims:
        entry: Mapping[str, Any] = {"late": False, "commit": "-"}
        if declaration is not None:
            entry = declaration["claims"][claim.id]
        made = judge(claim, measured[claim.id], late=entry["late"], committed=bool(entry["commit"]))
        found.append(made)
    return found


def blocks_disagree(parts: Iterable[Mapping[str, Any]]) -> bool:
    """Whether blocks of seeds alone give decided and different verdicts.

    Asked of every condition, and of the claim where all conditions have equally many blocks.

    Args:
        parts: Conditions as recorded; of each only ``blocks`` is read.
    """
    told = [part["blocks"] for part in parts]
    columns = [list(row) for row in told if row]
    if told and all(told) and len({len(row) for row in told}) == 1:
        columns.append([combine(block) for block in zip(*told, strict=True)])
    return any(len({word for word in row if decided(word)}) > 1 for row in columns)


class _Found:
    """One condition while it is judged."""

    def __init__(self, claim: Claim, part: Condition, measured: Measured) -> None:
        self.claim, self.part, self.measured = claim, part, measured
        theirs: Any = measured.theirs
        self.fixed: dict[str, Any] | None = None
        if part.grid and not measured.grid:
            raise ValueError("the claim is against a grid: give theirs as runs by fixed value.")
        if measured.grid:
            theirs, self.fixed = self._best()
        self.compared = theirs is not None
        self.pairs, self.failed = pairs(measured.ours, theirs)
        self.fingerprint = tuple(self.pairs.values())

    def _best(self) -> tuple[dict[int, float | None], dict[str, Any]]:
        grid: Any = self.measured.theirs
        declared = self.part.grid
        if declared and set(map(str, declared)) != set(map(str, grid)):
            raise ValueError(
                f"the grid {list(declared)} is declared but {list(grid)} was measured: run every "
                "declared value, and no other."
            )
        best = best_fixed(grid, self.claim.better, set(self.measured.ours))
        return best.runs, {"value": best.value, "of": len(grid), "on_edge": best.on_edge}

    def _effect(self, seeds: Iterable[int]) -> Effect:
        return effect(self.claim, [self.pairs[seed] for seed in seeds], self.part.support)

    def record(self) -> dict[str, Any]:
        """The condition as plain data, judged."""
        n = len(self.pairs)
        data: dict[str, Any] = {
            "name": self.part.name,
            "decides": self.part.decides,
            "n": n,
            "n_declared": self.part.n,
            "estimate": None,
            "low": None,
            "high": None,
            "level": LEVEL,
            "method": "exact" if self.measured.exact else "t",
            "sd": None,
            "verdict": NOT_TESTABLE,
            "reason": "no pair of runs ended" if self.compared else "no run ended",
            "n_needed": None,
            "blocks": [],
            "failed": self.failed,
            "fixed": self.fixed,
        }
        if not n:
            return data
        if n == 1 and not self.measured.exact:
            estimate = self._effect([*self.pairs] * 2).estimate
            data |= {"estimate": estimate, "method": "single", "level": 0.0, "verdict": OPEN}
            return data | {"reason": "one run shows no spread"}
        found = self._effect([*self.pairs] * (2 if n == 1 else 1))
        low, high = found.ends()
        data |= {"estimate": found.estimate, "low": low, "high": high, "sd": found.sd}
        return data | self._judged(found, low, high)

    def _judged(self, found: Effect, low: float, high: float) -> dict[str, Any]:
        margin, n = self.claim.margin, len(self.pairs)
        if self.measured.exact and not found.still:
            raise ValueError(
                "the effect is declared exact but differs between seeds: leave exact=False."
            )
        reason = self._untestable(found)
        if reason:
            return {"verdict": NOT_TESTABLE, "reason": reason}
        word = verdict(low, high, margin, None if self.measured.exact else n)
        made: dict[str, Any] = {"verdict": word, "reason": "", "blocks": self._blocks()}
        if word == OPEN and not self.measured.exact:
            made["n_needed"] = needed(found.ends, margin)
            few = f"fewer than {LEAST} repeats decide nothing; " if n < LEAST else ""
            made["reason"] = few + needed_text(made["n_needed"])
        return made

    def _untestable(self, found: Effect) -> str:
        """Why the bed could not have told; empty if it could."""
        if self.compared and all(a == b for a, b in self.pairs.values()):
            return "both arms gave bit for bit the same results: they may be one and the same"
        if found.still and not self.measured.exact:
            return "all repeats gave the same number, and that was not declared exact"
        if self.measured.control is None:
            return ""
        ended, _ = pairs(self.measured.control, self.measured.nothing)
        if len(ended) < 2:
            return "fewer than two runs of the positive control ended"
        gain = over_nothing(self.claim, list(ended.values()), self.compared)
        low, high = gain.ends()
        if low > self.claim.margin:
            return ""
        shown = Interval(gain.estimate, low, high, len(ended)).text(self.claim.unit)
        return f"the positive control does not beat doing nothing by the margin: {shown}"

    def _blocks(self) -> list[str]:
        """The verdict of each block of seeds alone, without the rule on their number."""
        words = []
        for block in self.measured.blocks or ():
            seeds = [seed for seed in block if seed in self.pairs]
            found = self._effect(seeds) if len(seeds) > 1 else None
            if found is None or found.still:
                words.append(NOT_TESTABLE)
            else:
                words.append(verdict(*found.ends(), self.claim.margin))
        return words
