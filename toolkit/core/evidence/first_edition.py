"""Claims as the chapters of the first edition state them: judged on the page, saved as JSON.

Nothing is decided here: rules live in :mod:`toolkit.core.evidence.rules`, verdicts in
:mod:`toolkit.core.evidence.verdicts`. New chapters declare their claims instead; see
:mod:`toolkit.core.evidence.claims`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolkit.core.evidence.intervals import Interval
from toolkit.core.evidence.results import EARLIER, plain, write
from toolkit.core.evidence.rules import NOTE, Rule, judge_earlier
from toolkit.core.evidence.table import ClaimsTable


@dataclass(frozen=True)
class EarlierClaim:
    """One judged claim of the first edition.

    Args:
        stated: The claim as in a results file of schema 1, without verdicts.
        judged: The same, judged; ``None`` if it is nothing but facts.
        facts: Its exact conditions.
    """

    stated: dict[str, Any]
    judged: dict[str, Any] | None
    facts: tuple[dict[str, Any], ...]

    @property
    def id(self) -> str:
        """Short name."""
        return self.stated["id"]

    @property
    def text(self) -> str:
        """The claim in a sentence."""
        return self.stated["text"]

    @property
    def conditions(self) -> tuple[dict[str, Any], ...]:
        """Judged conditions; exact ones are facts and not among them."""
        return tuple(self.judged["conditions"]) if self.judged else ()

    @property
    def verdict(self) -> str:
        """The verdict; ``"true"`` or ``"not true"`` for a claim that is nothing but facts."""
        if self.judged:
            return self.judged["verdict"]
        return "true" if all(fact["passed"] for fact in self.facts) else "not true"


class Claims:
    """Collects and judges the claims of one chapter of the first edition.

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
        self._claims: dict[str, EarlierClaim] = {}

    def __iter__(self):
        return iter(self._claims.values())

    def __getitem__(self, id: str) -> EarlierClaim:
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
    ) -> EarlierClaim:
        """Judge one claim by rule.

        Args:
            id: Short name, unique in the chapter (lower case, digits, hyphens).
            text: The claim in one plain sentence.
            paper: The paper's own figure as text; ``None`` if none is quoted.
            ours: Our interval, or several by condition name.
            holds: The rule for the interval, one for all conditions, or one per condition name.
            need: ``"all"`` or ``"any"``: how many conditions the claim speaks of.
            unit: Unit of the numbers, shown after them.
            note: What a reader must know to read the verdict.

        Returns:
            The judged claim. Running the same call again replaces it.

        Raises:
            ValueError: If ``id`` is malformed or taken by another claim, names do not match, or
                ``need`` is unknown.
            TypeError: If ``ours`` is no interval or ``holds`` no rule.
        """
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", id):
            raise ValueError(f"id = {id!r}: use lower-case letters, digits and hyphens.")
        if id in self._claims and self._claims[id].text != text:
            raise ValueError(f"id = {id!r} already names another claim: choose a new id.")
        if need not in ("all", "any"):
            raise ValueError(f'need = {need!r}: choose "all" or "any".')
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
                    "such as evidence.above(0, margin=1). Verdicts are not typed by hand."
                )
            rule = rules[name]
            conditions.append({"name": name, **asdict(found), "rule": rule.record()})
        stated = {
            "id": id,
            "text": text,
            "paper": paper,
            "unit": unit,
            "note": note,
            "need": need,
            "conditions": conditions,
        }
        judged, facts = judge_earlier(stated)
        self._claims[id] = EarlierClaim(stated, judged, tuple(facts))
        return self._claims[id]

    def table(self) -> ClaimsTable:
        """Return the claims as a table for the page, facts below."""
        return ClaimsTable(
            [claim.judged for claim in self if claim.judged],
            facts=[fact for claim in self for fact in claim.facts],
            caption=f"Claims, tested at scale {self.scale}",
            note=NOTE,
        )

    def record(self, measurements: Any = None) -> dict[str, Any]:
        """Return the whole results file as plain data, schema 1.

        Raises:
            ValueError: If a number is not finite, naming where it stands.
            TypeError: If a value has no JSON form, naming where it stands.
        """
        if measurements is not None and not isinstance(measurements, Mapping):
            measurements = {"runs": measurements}
        return {
            "schema": EARLIER,
            "slug": self.slug,
            "scale": self.scale,
            "seeds": self.seeds,
            "claims": [claim.stated | {"verdict": claim.verdict} for claim in self],
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
