"""The claims table of a chapter: judged by rule, shown on the page, saved as JSON.

The results file is described in :mod:`toolkit.core.results`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolkit.core.claims_table import ClaimsTable
from toolkit.core.intervals import Interval
from toolkit.core.results import SCHEMA, plain, write
from toolkit.core.rules import Rule, combine


@dataclass(frozen=True)
class Claim:
    """One judged claim; the fields are those of the results file."""

    id: str
    text: str
    paper: str | None
    verdict: str
    unit: str
    note: str
    need: str
    conditions: tuple[dict[str, Any], ...]


class Claims:
    """Collects and judges the claims of one chapter.

    Args:
        slug: The chapter's slug.
        scale: A scale, or its name.
        seeds: The seeds of the runs, recorded in the results file.

    Raises:
        ValueError: If ``slug`` is not a plain lower-case name or ``scale`` is not known.
    """

    def __init__(self, slug: str, scale: Any, seeds: Sequence[int] = ()) -> None:
        self.slug, self.scale = slug, str(getattr(scale, "name", scale))
        if not re.fullmatch(r"[a-z0-9_]+", slug):
            raise ValueError(f"slug = {slug!r}: use lower-case letters, digits and underscores.")
        if self.scale not in ("ci", "cpu", "gpu"):
            raise ValueError(f'scale = {self.scale!r}: choose "ci", "cpu" or "gpu".')
        self.seeds = [int(seed) for seed in seeds]
        self._claims: dict[str, Claim] = {}

    def __iter__(self):
        return iter(self._claims.values())

    def __getitem__(self, id: str) -> Claim:
        return self._claims[id]

    def judge(
        self,
        id: str,
        text: str,
        paper: str | None,
        ours: Interval | Mapping[str, Interval],
        holds: Rule | Mapping[str, Rule],
        *,
        need: str = "all",
        unit: str = "",
        note: str = "",
    ) -> Claim:
        """Judge one claim by rule.

        Args:
            id: Short name, unique in the chapter (lower case, digits, hyphens).
            text: The claim in one plain sentence.
            paper: The paper's own figure as text; ``None`` if it gives none.
            ours: Our interval, or several by condition name.
            holds: The rule for the interval, one for all conditions, or one per condition name.
            need: ``"all"`` or ``"any"``: how many conditions the claim speaks of.
            unit: Unit of the numbers, shown after them.
            note: What a reader must know to read the verdict.

        Returns:
            The judged claim. Running the same call again replaces it.

        Raises:
            ValueError: If ``id`` is malformed or taken by another claim, or names do not match.
            TypeError: If ``ours`` is no interval or ``holds`` no rule.
        """
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", id):
            raise ValueError(f"id = {id!r}: use lower-case letters, digits and hyphens.")
        if id in self._claims and self._claims[id].text != text:
            raise ValueError(f"id = {id!r} already names another claim: choose a new id.")
        named = dict(ours) if isinstance(ours, Mapping) else {"": ours}
        rules = dict(holds) if isinstance(holds, Mapping) else dict.fromkeys(named, holds)
        if not named or set(named) != set(rules):
            raise ValueError(
                f"ours has conditions {list(named)} but holds has {list(rules)}: "
                "give one rule for all, or one for each."
            )
        conditions = []
        for name, found in named.items():
            if not isinstance(found, Interval):
                raise TypeError(
                    f"ours[{name!r}] is {type(found).__name__}: give an Interval, from "
                    "evidence.interval, paired, single or exact."
                )
            if not isinstance(rules[name], Rule):
                raise TypeError(
                    f"holds[{name!r}] is {type(rules[name]).__name__}: give a rule, "
                    "such as evidence.above(0). Verdicts are not typed by hand."
                )
            rule = rules[name]
            conditions.append(
                {
                    "name": name,
                    **asdict(found),
                    "rule": rule.record(),
                    "rule_text": rule.text(),
                    "verdict": rule.verdict(found),
                }
            )
        verdict = combine([part["verdict"] for part in conditions], need)
        claim = Claim(id, text, paper, verdict, unit, note, need, tuple(conditions))
        self._claims[id] = claim
        return claim

    def table(self) -> ClaimsTable:
        """Return the claims as a table for the page."""
        return ClaimsTable(list(self), f"Claims of the paper, tested at scale {self.scale}")

    def record(self, measurements: Any = None) -> dict[str, Any]:
        """Return the whole results file as plain data (schema in the module's text).

        Raises:
            ValueError: If a number is not finite, naming where it stands.
            TypeError: If a value has no JSON form, naming where it stands.
        """
        if measurements is not None and not isinstance(measurements, Mapping):
            measurements = {"runs": measurements}
        claims = [asdict(claim) | {"conditions": list(claim.conditions)} for claim in self]
        return {
            "schema": SCHEMA,
            "slug": self.slug,
            "scale": self.scale,
            "seeds": self.seeds,
            "claims": claims,
            "measurements": plain(measurements or {}, "measurements"),
        }

    def save(self, measurements: Any = None) -> Path | None:
        """Write ``<slug>.<scale>.json`` to the folder named by ``TOOLKIT_RESULTS``.

        Args:
            measurements: A dict of numbers, lists, dicts and DataFrames, or one DataFrame
                (stored as ``runs``).

        Returns:
            The file written, or ``None`` if the variable is unset, as in a reader's session.

        Raises:
            ValueError: If a number is not finite. Nothing is written then.
        """
        return write(self.record(measurements))
