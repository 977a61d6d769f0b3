"""A folder of finished jobs: one file each, checked when it is read.

``store.json`` names the function and the code, ``job-<key>.json`` holds a job that ended, and
``job-<key>.<caller>.tries`` counts how often a caller has started it. Several callers may work on
one folder. Files are JSON as Python writes it: a loss may be ``NaN`` or ``Infinity``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.core import io
from toolkit.core.runs.jobs import digest

CHECK = "check"
FIELDS = ("job", "status", "error", "seconds", "rows")


def job_path(folder: Path, key: str) -> Path:
    """Where the record of a job lies."""
    return folder / f"job-{key}.json"


def record(path: Path | None) -> dict[str, Any] | None:
    """The record of a job that ended, or ``None``; see :func:`read`."""
    found = read(path, "status")
    if found is None or path is None:
        return None
    if missing := [field for field in FIELDS if field not in found]:
        _damaged(path, f"it has no {missing[0]!r}")
        return None
    rows, job = found["rows"], found["job"]
    whole = isinstance(rows, list) and all(isinstance(part, dict) for part in (job, *rows))
    if not whole or found["status"] not in ("done", "failed"):
        _damaged(path, "it is no record of a job")
        return None
    return found


def read(path: Path | None, field: str) -> dict[str, Any] | None:
    """The record in a file, or ``None`` where there is no file or a damaged one.

    Args:
        path: The file; None reads nothing.
        field: A field that the record must have.

    Warns:
        RuntimeWarning: If the file is damaged, by its name: its job will be measured again.
    """
    if path is None:
        return None
    try:
        record = io.read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _damaged(path, str(error))
        return None
    if not isinstance(record, dict) or field not in record:
        _damaged(path, f"it has no {field!r}")
        return None
    check = record.pop(CHECK, None)
    if check is not None and check != digest(json.dumps(record)):
        _damaged(path, "its content does not match its checksum")
        return None
    return record


def _damaged(path: Path, why: str) -> None:
    warnings.warn(
        f"{path.name} is damaged ({why}): what it held is measured again.",
        RuntimeWarning,
        stacklevel=4,
    )


def write(path: Path | None, record: Mapping[str, Any]) -> None:
    """Write a record with its checksum, whole or not at all; None writes nothing."""
    if path is None:
        return
    text = json.dumps(dict(record) | {CHECK: digest(json.dumps(record))})
    io.write_text(path, text + "\n")


def open_store(folder: Path, code: Mapping[str, Any], keys: list[str], accept: bool) -> None:
    """Write ``store.json``, unless the folder holds results that are not this code's.

    Args:
        folder: The store.
        code: ``function``, ``version`` and ``files``, as the caller has them.
        keys: Keys of the caller's jobs, in order.
        accept: Keep results of other code.

    Raises:
        ValueError: If the store is of another function, or of other code; what changed is named.
    """
    old = read(folder / "store.json", "jobs") or {**code, "jobs": []}
    if not old["jobs"] and any(folder.glob("job-*.json")):
        old["version"], old["files"] = "unknown", {}
    if old["function"] != code["function"]:
        raise ValueError(
            f"{folder} holds results of {old['function']}, not of {code['function']}: name another "
            "folder."
        )
    if old["version"] != code["version"] and not accept:
        before, now = old["files"], code["files"]
        words = [f"{name} changed" for name in now if before.get(name, now[name]) != now[name]]
        words += [f"{name} is new" for name in now if name not in before]
        words += [f"{name} is gone" for name in before if name not in now]
        if not before or not now:
            words = [f"version {old['version']!r}, now {code['version']!r}"]
        more = f" and {len(words) - 5} more" if len(words) > 5 else ""
        raise ValueError(
            f"{folder} holds results of other code ({', '.join(words[:5])}{more}): name another "
            "folder, or keep its results with accept_other_code=True."
        )
    write(folder / "store.json", {**code, "jobs": list(dict.fromkeys(old["jobs"] + keys))})
