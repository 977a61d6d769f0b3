"""Jobs as plain data: a function's arguments, its record, and the key that names both."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

OWN = ("status", "error", "seconds")
"""Columns that a table of jobs adds to arguments and results."""


def grid(**axes: Any) -> list[dict[str, Any]]:
    """Every combination of the axes' values; the last axis changes fastest.

    Args:
        axes: A list of values each. A text or number alone counts as one value. A value that is
            itself a list goes into another list.

    Raises:
        ValueError: If an axis has no value.
    """
    values = []
    for name, axis in axes.items():
        many = isinstance(axis, Iterable) and not isinstance(axis, (str, Mapping))
        values.append(list(axis.tolist() if hasattr(axis, "tolist") else axis) if many else [axis])
        if not values[-1]:
            raise ValueError(f"axis {name} is empty, so there is no job: give it a value.")
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*values)]


def digest(text: str | bytes) -> str:
    """Sixteen hex digits of SHA-256; line endings do not count."""
    data = text.encode() if isinstance(text, str) else text
    # git may write line endings either way
    return hashlib.sha256(data.replace(b"\r\n", b"\n")).hexdigest()[:16]


def function_name(function: Any) -> str:
    """``module.qualified_name`` of a job's function.

    Raises:
        TypeError: If it has no name to keep results under.
    """
    if not hasattr(function, "__qualname__"):
        raise TypeError(f"{function!r} has no name to keep results under: wrap it in a function.")
    return f"{function.__module__}.{function.__qualname__}"


def key(name: str, job: Mapping[str, Any], code: str = "") -> str:
    """The key of a job: its function's name, its arguments in any order, and maybe its code."""
    arguments = json.dumps(dict(job), sort_keys=True)
    return digest(f"{name} {arguments}" + (f" {code}" if code else ""))


def keyed(name: str, jobs: Sequence[Mapping[str, Any]], code: str = "") -> dict[str, dict]:
    """The jobs by key, in order.

    Raises:
        TypeError: If a job is no dict of plain values by name.
        ValueError: If there is no job, one is there twice, or an argument has a name of ours.
    """
    found: dict[str, dict[str, Any]] = {}
    for i, job in enumerate(jobs):
        if not isinstance(job, Mapping) or not all(isinstance(word, str) for word in job):
            raise TypeError(f"jobs[{i}] is {job!r}, not a dict of arguments by name.")
        for argument, value in job.items():
            if argument in OWN:
                raise ValueError(f"jobs[{i}] has {argument!r}, a column of the table: rename it.")
            if not is_plain(value):
                raise TypeError(
                    f"jobs[{i}][{argument!r}] is a {type(value).__name__}, or holds what is not "
                    "plain: give text, numbers, bools, None or lists, and build the rest inside."
                )
        word = key(name, job, code)
        if word in found:
            raise ValueError(f"jobs[{i}] is there twice ({dict(job)}): tell repeats by a seed.")
        found[word] = dict(job)
    if not found:
        raise ValueError("jobs is empty: give at least one, as in grid(seed=[0]).")
    return found


def is_plain(value: Any) -> bool:
    """Whether a value is text, a number, a bool, None or a list of these."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (str, int, float))


def rows_of(result: Any, job: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows that a job returned.

    Raises:
        TypeError: If it returned neither a dict nor a list of dicts.
        ValueError: If a result has the name of an argument or of a column of ours.
    """
    rows = [result] if isinstance(result, Mapping) else result
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise TypeError(f"a job returns a dict or a list of dicts, not {result!r}")
    if taken := {name for row in rows for name in row} & {*job, *OWN}:
        raise ValueError(f"results named {sorted(taken)} are columns already: rename them")
    return rows


def record_of(
    job: Mapping[str, Any],
    version: str | None,
    rows: Sequence[Mapping[str, Any]] = (),
    error: str | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """What is kept of a job that ended, as plain data.

    Raises:
        TypeError: If a result is no plain value.
    """
    record: dict[str, Any] = {
        "job": job,
        "version": version,
        "status": "failed" if error else "done",
    }
    record |= {"error": error, "seconds": seconds, "rows": rows}
    # to text and back, so that a table in memory is the one that a store gives
    text = json.dumps(record, default=_number, ensure_ascii=False)
    # half a character, as from a damaged file name, fits in no table and no file
    return json.loads(text.encode("utf-8", "replace"))


def _number(value: Any) -> Any:
    if hasattr(value, "tolist"):  # NumPy's and torch's numbers and arrays
        return value.tolist()
    raise TypeError(f"a result is a {type(value).__name__}: return numbers, text, bools and lists")


def finite(value: Any) -> Any:
    """The value with None where a number is not finite: strict JSON has no such numbers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def table(records: Sequence[Mapping[str, Any]]) -> Any:
    """One row per job or more: arguments, results, then ``status``, ``error``, ``seconds``."""
    import pandas as pd  # here, so that workers need not load it

    rows = [
        {**record["job"], **row, **{name: record[name] for name in OWN}}
        for record in records
        for row in record["rows"] or [{}]
    ]
    arguments = dict.fromkeys(name for record in records for name in record["job"])
    results = dict.fromkeys(name for row in rows for name in row if name not in OWN)
    columns = {}
    for name in [*arguments, *(n for n in results if n not in arguments), *OWN]:
        values = [row.get(name) for row in rows]
        # an argument of None stays None, and the whole numbers beside it stay whole
        keep = (name in arguments or name == "error") and None in values
        columns[name] = pd.Series(values, dtype=object if keep else None)
    return pd.DataFrame(columns)
