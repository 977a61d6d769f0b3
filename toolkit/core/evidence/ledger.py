"""What the ledger counts over all chapters: verdicts, errors to expect, late claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.core.evidence.verdicts import (
    CLAIM_VERDICTS,
    NOT_TESTABLE,
    UNSTABLE,
    false_chance,
    missed_chance,
)


@dataclass(frozen=True)
class Counts:
    """Counts over many claims.

    Args:
        claims: How many claims were judged.
        verdicts: How often each verdict was given, every word of a claim's verdicts.
        false: How many claims would read *holds* or *direction only* at most, were every effect 0.
        missed: How many would read *refuted here* or *no difference that matters* at most, were
            every effect exactly as large as its margin.
        unstable: Claims on which blocks of seeds disagree.
        late: Claims added or changed after their first measurement.
        uncommitted: Claims whose declaration was not committed when they were first measured.
        dropped: Claims declared and then given up.
        facts: Facts, exact and not counted among the claims.
        facts_failed: Those of them that were found not to be so.
    """

    claims: int
    verdicts: dict[str, int]
    false: float
    missed: float
    unstable: int
    late: int
    uncommitted: int
    dropped: int
    facts: int
    facts_failed: int


def count(results: Sequence[Mapping[str, Any]]) -> Counts:
    """Count over results as :func:`toolkit.core.evidence.load_results` returns them."""
    claims = [claim for result in results for claim in result["claims"]]
    facts = [fact for result in results for fact in result["facts"]]
    words = [claim["verdict"] for claim in claims]
    return Counts(
        claims=len(claims),
        verdicts={word: words.count(word) for word in CLAIM_VERDICTS},
        false=sum(map(claim_false_chance, claims)),
        missed=sum(map(claim_missed_chance, claims)),
        unstable=words.count(UNSTABLE),
        late=sum(claim["late"] for claim in claims),
        uncommitted=sum(not claim["committed"] for claim in claims),
        dropped=sum(len(result["dropped"]) for result in results),
        facts=len(facts),
        facts_failed=sum(not fact["passed"] for fact in facts),
    )


def _judged_parts(claim: Mapping[str, Any]) -> list[tuple[float, int, float]] | None:
    """Spread, repeats and margin of each condition; None if one of them cannot be told."""
    parts = []
    for part in claim["conditions"]:
        if part["verdict"] == NOT_TESTABLE or not part["sd"]:
            return None
        parts.append((part["sd"], part["n"], claim["margin"]))
    return parts


def claim_false_chance(claim: Mapping[str, Any]) -> float:
    """Return how likely a claim is at most to read *holds* or *direction only* by chance.

    That needs every condition to read so, whether or not they depend on each other; so it is at
    most as likely as for the least likely of them.

    Args:
        claim: A judged claim, as recorded.
    """
    parts = _judged_parts(claim)
    if not parts:
        return 0.0
    return min(false_chance(sd, n, margin) for sd, n, margin in parts)


def claim_missed_chance(claim: Mapping[str, Any]) -> float:
    """Return how likely a claim is at most to be refuted by chance, with effects as its margin.

    One condition is enough for that, so the chances add up.

    Args:
        claim: A judged claim, as recorded.
    """
    return min(1.0, sum(missed_chance(n) for _, n, _ in _judged_parts(claim) or ()))
