"""Results files: one JSON per chapter and scale, the source of the claims ledger.

Schema of ``<slug>.<scale>.json`` (version 1)::

    {"schema": 1, "slug": str, "scale": "ci"|"cpu"|"gpu", "seeds": [int, ...],
     "claims": [{"id": str, "text": str, "paper": str|null, "verdict": one of the four,
                 "unit": str, "note": str, "need": "all"|"any",
                 "conditions": [{"name": str, "estimate": number, "low": number|null,
                                 "high": number|null, "n": int, "level": number,
                                 "method": "t"|"bootstrap"|"single"|"exact",
                                 "rule": {"kind", "low", "high", "margin"},
                                 "rule_text": str, "verdict": one of the four}, ...]}, ...],
     "measurements": {name: number|string|bool|null|list|object}}

A DataFrame among the measurements becomes a list of records, one object per row. Numbers are
finite; ``null`` says that a value does not exist.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from toolkit.core.intervals import Interval
from toolkit.core.rules import VERDICTS

SCHEMA = 1
RESULTS_VARIABLE = "TOOLKIT_RESULTS"


def write(record: Mapping[str, Any]) -> Path | None:
    """Write one results file to the folder named by ``TOOLKIT_RESULTS``, whole or not at all.

    Args:
        record: As described in the module's text.

    Returns:
        The file written, or ``None`` if the variable is unset, as in a reader's session.
    """
    folder = os.environ.get(RESULTS_VARIABLE)
    if not folder:
        return None
    target = Path(folder) / f"{record['slug']}.{record['scale']}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    return target


def plain(value: Any, where: str) -> Any:
    """Return ``value`` as JSON data, or say where it cannot be."""
    if hasattr(value, "to_dict") and hasattr(value, "columns"):
        value = value.to_dict(orient="records")
    elif hasattr(value, "detach"):
        value = value.detach().cpu().tolist()
    elif hasattr(value, "tolist"):  # numpy arrays and scalars, pandas Series
        value = value.tolist()
    if isinstance(value, Interval):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}[{str(key)!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(
                f"{where} is {value}: results hold finite numbers only. "
                "Store None where a value does not exist."
            )
        return value
    raise TypeError(
        f"{where} is a {type(value).__name__}, which has no JSON form: "
        "convert it to numbers, strings, lists, dicts or a DataFrame."
    )


def load_results(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return every results file of a folder, ordered by slug, then ci, cpu, gpu.

    Args:
        folder: Where the ``<slug>.<scale>.json`` files lie. A missing folder holds no results.

    Raises:
        ValueError: If a file is not a results file of this version, naming it.
    """
    results = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path.name} is not readable JSON ({error}): record the chapter again."
            ) from error
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise ValueError(
                f"{path.name} is not a results file of version {SCHEMA}: record the chapter again."
            )
        if path.name != f"{record.get('slug')}.{record.get('scale')}.json":
            raise ValueError(
                f"{path.name} holds results of {record.get('slug')} at scale "
                f"{record.get('scale')}: name and content must agree."
            )
        verdicts = {claim.get("verdict") for claim in record.get("claims", [])}
        odd = sorted(verdicts.difference(VERDICTS), key=str)
        if odd:
            raise ValueError(f"{path.name} holds unknown verdicts {odd}: choose from {VERDICTS}.")
        results.append(record)
    order = {"ci": 0, "cpu": 1, "gpu": 2}
    return sorted(results, key=lambda record: (record["slug"], order[record["scale"]]))
