"""The results file of a lab: every run's record, checked one by one when it is read.

``<slug>.<scale>.json`` holds no date and no duration, so two recordings of the same code are equal
byte for byte. Those stand in ``times/<slug>.<scale>.json`` beside it. Numbers that are not finite
are ``null``: strict JSON has none.
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from toolkit.core import io
from toolkit.core.runs.jobs import digest

SCHEMA = 2
PARTS = ("provenance", "codes", "experiments", "tuning", "seeds")


def results_path(folder: Path, slug: str, scale: str) -> Path:
    """Where the results of a lab at one scale lie."""
    return folder / f"{slug}.{scale}.json"


def times_path(folder: Path, slug: str, scale: str) -> Path:
    """Where dates and durations of these results lie."""
    return folder / "times" / f"{slug}.{scale}.json"


def file_sha256(path: Path) -> str:
    """SHA-256 over a file's bytes: what a page names as the numbers it was told from."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check(job: Mapping[str, Any]) -> str:
    """A checksum over one job's arguments, record, error and code."""
    fields = {name: job.get(name) for name in ("args", "record", "error", "code")}
    return digest(json.dumps(fields, sort_keys=True))


def read(folder: Path | None, slug: str, scale: str) -> dict[str, Any] | None:
    """The results of a lab, without records that are damaged; None where there are none.

    Warns:
        RuntimeWarning: If the file or a record in it is damaged, by name: it is measured again.

    Raises:
        ValueError: If the file is of a later version than this code.
    """
    if folder is None:
        return None
    path = results_path(folder, slug, scale)
    try:
        document = io.read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _damaged(path.name, str(error))
        return None
    if not isinstance(document, dict):
        _damaged(path.name, "it holds no object")
        return None
    if document.get("schema") == 1:
        return None  # recorded inside a page, before labs
    if document.get("schema") != SCHEMA:
        raise ValueError(
            f"{path.name} has schema {document.get('schema')!r}, this code knows {SCHEMA}: use the "
            "code that wrote it, or remove the file to measure again."
        )
    missing = [part for part in PARTS if part not in document]
    if missing or (document.get("slug"), document.get("scale")) != (slug, scale):
        _damaged(path.name, f"parts {missing} are missing, or it is of another lab")
        return None
    for name, experiment in document["experiments"].items():
        whole = []
        for job in experiment["jobs"]:
            if isinstance(job, dict) and job.get("check") == check(job):
                whole.append(job)
            else:
                arguments = job.get("args") if isinstance(job, dict) else job
                _damaged(path.name, f"the record of {name} with {arguments} was altered")
        experiment["jobs"] = whole
    return document


def _damaged(name: str, why: str) -> None:
    warnings.warn(
        f"{name} is damaged ({why}): what it held is measured again.", RuntimeWarning, stacklevel=3
    )


def function_of(experiment: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    """The dotted name of the function that ran a job of an experiment; "" if it names none."""
    functions = experiment["functions"]
    return functions.get("*") or functions.get(arguments.get("arm"), "")


def digests_by_function(document: Mapping[str, Any]) -> dict[str, set[str]]:
    """Every function that gave numbers, or judged them, with the digests of the code it had."""
    found: dict[str, set[str]] = {}
    for experiment in document["experiments"].values():
        for job in experiment["jobs"]:
            found.setdefault(function_of(experiment, job["args"]), set()).add(job["code"])
    if judging := document.get("judging"):
        found.setdefault(judging["function"], set()).add(judging["code"])
    return found


def renewed(
    document: Mapping[str, Any], definitions: Callable[[str], Mapping[str, str]]
) -> dict[str, Any]:
    """The same numbers under the code keys of today, for numbers that a comparison has cleared.

    Args:
        document: the results.
        definitions: gives the definitions that a function of this dotted name can reach.
    """
    from toolkit.core.runs.code import digest as joined

    new = copy.deepcopy(dict(document))
    today = {name: dict(definitions(name)) for name in digests_by_function(document)}
    digests = {name: joined(found) for name, found in today.items()}
    codes = {}
    for experiment in new["experiments"].values():
        for job in experiment["jobs"]:
            name = function_of(experiment, job["args"])
            job["code"] = digests[name]
            job["check"] = check(job)
            codes[digests[name]] = today[name]
    new["codes"] = dict(sorted(codes.items()))
    if judging := new.get("judging"):
        judging["code"] = digests[judging["function"]]
    return new


def renewed_times(
    before: Mapping[str, Any], after: Mapping[str, Any], times: Mapping[str, Any]
) -> dict[str, Any]:
    """Dates and durations under the names that renewed runs have.

    Args:
        before: the results that the durations belong to.
        after: as :func:`renewed` returns them.
        times: as :func:`read_times` returns them.
    """
    names = {
        old["check"]: new["check"]
        for name, experiment in before["experiments"].items()
        for old, new in zip(experiment["jobs"], after["experiments"][name]["jobs"], strict=True)
    }
    took = times.get("jobs", {})
    return {**times, "jobs": {names.get(name, name): seconds for name, seconds in took.items()}}


def text(document: Mapping[str, Any]) -> str:
    """The file's text: one line per job, so that a change of one run is one line of a diff.

    Raises:
        ValueError: If a number is not finite.
    """
    marked: list[str] = []

    def mark(value: Any) -> str:
        marked.append(json.dumps(value, ensure_ascii=False, allow_nan=False))
        return f"@{len(marked) - 1}@"

    shown = dict(document)
    shown["experiments"] = {
        name: {**experiment, "jobs": [mark(job) for job in experiment["jobs"]]}
        for name, experiment in document["experiments"].items()
    }
    whole = json.dumps(shown, indent=1, ensure_ascii=False, allow_nan=False)
    for place, line in enumerate(marked):
        whole = whole.replace(f'"@{place}@"', line, 1)
    return whole + "\n"


def write(folder: Path, document: Mapping[str, Any]) -> Path:
    """Write a results file, whole or not at all."""
    path = results_path(folder, document["slug"], document["scale"])
    return io.write_text(path, text(document))


def write_times(folder: Path, slug: str, scale: str, times: Mapping[str, Any]) -> Path:
    """Write dates and durations beside the results."""
    return io.write_text(times_path(folder, slug, scale), json.dumps(times, indent=1) + "\n")


def read_times(folder: Path, slug: str, scale: str) -> dict[str, Any]:
    """Dates and durations; empty where there are none or the file cannot be read."""
    try:
        return io.read_json(times_path(folder, slug, scale))
    except (FileNotFoundError, ValueError):
        return {}
