"""The key of a page: everything its outputs depend on, part by part.

A page stores the parts it was recorded with. The parts that differ from those computed anew, for
the same scale and device class, say what is stale: numbers, page or both (see ``plan``).
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from book.engine.project import PACKAGE, EngineError, Project
from book.engine.source import Source, tags
from toolkit.core.runs import code
from toolkit.core.runs.provenance import pins

FORMAT = 2  # raise it when the engine starts to make different pages from the same parts
PARTS = ("cells", "code", "constraints", "data", "device", "format", "scale", "text")
NUMBERS = ("constraints", "data", "device", "scale")  # parts on which measuring itself depends
SHOWN = 4  # changed definitions that a message names
DATA_PROGRAM = (
    "import json, sys; from toolkit.core.data import hashes; "
    "print(json.dumps(hashes(sys.argv[1:]), sort_keys=True))"
)


def device_class(scale: str) -> str:
    return "cuda" if scale == "gpu" else "cpu"


def parts(
    source: Source, project: Project, scale: str, tracer: code.Tracer, data: Mapping[str, Any]
) -> dict[str, Any]:
    """The parts of a chapter's key at one scale.

    Args:
        source: the chapter as read.
        project: where it lies.
        scale: ``ci``, ``cpu`` or ``gpu``.
        tracer: finds the definitions its cells reach.
        data: hashes by name, at least of the data sets the chapter declares.
    """
    text = [["code" if c.cell_type == "code" else c.source, tags(c)] for c in source.run]
    links = [source.settings.paper, source.settings.code, project.repository]
    return {
        "cells": cells(source),
        "text": _hash([text, links]),
        "code": tracer.of_source(cell.source for cell in source.code),
        "constraints": pins(project.root),
        "data": {name: _hash(data[name]) for name in source.settings.data},
        "scale": scale,
        "device": device_class(scale),
        "format": FORMAT,
    }


def cells(source: Source) -> str:
    """Hash of the code cells."""
    return _hash([[c.source, "raises-exception" in tags(c)] for c in source.code])


def digest(parts: Mapping[str, Any]) -> str:
    """The key itself: one hash over all parts."""
    return _hash(parts)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """What changed between two sets of parts: the part's name and a few words.

    A page of format 1 knew the files its code lay in, not the definitions, and all pins as one:
    both count as changed by the part ``format``.
    """
    found: dict[str, str] = {}
    former = old.get("format") != FORMAT
    for name, value in new.items():
        before = old.get(name)
        if before == value or (name in ("code", "constraints") and former):
            continue
        if name == "code":
            found[name] = shortened(code.differences(before, value))
        elif name == "data":
            words = _mapping_differences(before if isinstance(before, dict) else {}, value)
            found[name] = f"data: {', '.join(words)}"
        elif name == "format":
            found[name] = "recorded before code was keyed by definition"
        elif name in ("scale", "device"):
            found[name] = f"{name}: {before} -> {value}"
        else:
            found[name] = {
                "cells": "code cells changed",
                "text": "text changed",
                "constraints": "versions of packages changed",
            }[name]
    return found


def shortened(words: list[str]) -> str:
    """The first changes, and how many more there are."""
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more


def _mapping_differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    words = [f"{k} changed" for k in new if k in old and old[k] != new[k]]
    words += [f"{k} new" for k in new if k not in old]
    words += [f"{k} no longer used" for k in old if k not in new]
    return words


def data_hashes(project: Project, names: Iterable[str]) -> dict[str, Any]:
    """Hashes of data sets, asked of the project's own ``toolkit.core.data`` in another process.

    Raises:
        EngineError: the toolkit does not know a name, or cannot be imported.
    """
    names = sorted(set(names))
    if not names:
        return {}
    if not any(
        (project.root / PACKAGE / "core" / f).is_file() for f in ("data.py", "data/__init__.py")
    ):
        raise EngineError(
            f"data sets {', '.join(names)} are declared, but {PACKAGE}/core/data.py, which knows "
            "their hashes, does not exist"
        )
    done = subprocess.run(
        [sys.executable, "-c", DATA_PROGRAM, *names],
        capture_output=True,
        text=True,
        cwd=project.root,
        env={**os.environ, "PYTHONPATH": str(project.root)},
        timeout=300,
    )
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise EngineError(f"hashes of the data sets {', '.join(names)}: {last}")
    found = json.loads(done.stdout.splitlines()[-1])
    if missing := [name for name in names if name not in found]:
        raise EngineError(f"toolkit.core.data.hashes gave no hash for {', '.join(missing)}")
    return found


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def file_hash(path: Path) -> str:
    # Line endings do not count: git may write them either way.
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()[:20]
