"""Results files: one JSON per chapter and scale, the source of the claims ledger.

Schema 2 of ``<slug>.<scale>.json`` is written by the lab's store. Read here are::

    {"schema": 2, "slug": str, "scale": "ci"|"cpu"|"gpu",
     "claims": [as Judged.record()], "facts": [as Fact.record()],
     "declaration": as register() returns it}
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.core.evidence.declaration import SCHEMA
from toolkit.core.evidence.judging import blocks_disagree
from toolkit.core.evidence.verdicts import NOT_TESTABLE, UNSTABLE, combine, verdict
from toolkit.core.io import read_json

SCALES = ("ci", "cpu", "gpu")
RESULTS_VARIABLE = "TOOLKIT_RESULTS"


def load_results(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the claims and facts of every results file of a folder, in one form.

    Args:
        folder: Where the ``<slug>.<scale>.json`` files lie. A missing folder holds no results.

    Returns:
        Ordered by slug, then ci, cpu, gpu; for each file ``schema``, ``slug``, ``scale``,
        ``claims`` (as :meth:`toolkit.core.evidence.Judged.record`), ``facts``, ``dropped`` (claims
        declared and then given up) and ``note``.

    Raises:
        ValueError: If a file is damaged, of another version or name, or holds a verdict that does
            not follow from its own numbers; naming it.
    """
    results = [_load(path) for path in sorted(Path(folder).glob("*.json"))]
    return sorted(results, key=lambda record: (record["slug"], SCALES.index(record["scale"])))


def _load(path: Path) -> dict[str, Any]:
    try:
        record = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}: record the chapter again.") from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise ValueError(
            f"{path.name} is not a results file of version {SCHEMA}: record the chapter again."
        )
    slug, scale = record.get("slug"), record.get("scale")
    if path.name != f"{slug}.{scale}.json" or scale not in SCALES:
        raise ValueError(
            f"{path.name} holds results of {slug} at scale {scale}: name and content must agree."
        )
    made = {"schema": schema, "slug": slug, "scale": scale, "dropped": [], "note": ""}
    try:
        declaration = record.get("declaration") or {}
        made |= {
            "claims": [check_verdicts(claim) for claim in record.get("claims", [])],
            "facts": record.get("facts", []),
            "dropped": declaration.get("dropped", []),
            "note": declaration.get("note", ""),
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path.name} is damaged: {what}. Tell the chapter again.") from error
    return made


def check_verdicts(claim: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a judged claim whose verdicts follow from its own numbers.

    Args:
        claim: As :meth:`toolkit.core.evidence.Judged.record`.

    Raises:
        ValueError: If a verdict was not given by the rules, naming the claim.
        KeyError, TypeError: If a field is missing or of the wrong kind.
    """
    words = []
    for part in claim["conditions"]:
        words.append(part["verdict"])
        if part["verdict"] == NOT_TESTABLE or part["method"] == "single":
            continue
        n = None if part["method"] == "exact" else part["n"]
        follows = verdict(part["low"], part["high"], claim["margin"], n)
        if follows != part["verdict"]:
            raise ValueError(
                f"claim {claim['id']!r}, condition {part['name']!r} says {part['verdict']!r}, but "
                f"{follows!r} follows from its interval"
            )
    pooled = combine(words)
    follows = UNSTABLE if blocks_disagree(claim["conditions"]) else pooled
    if claim["verdict"] != follows or claim["pooled"] != pooled:
        raise ValueError(
            f"claim {claim['id']!r} says {claim['verdict']!r}, but {follows!r} follows from its "
            "conditions"
        )
    return claim
