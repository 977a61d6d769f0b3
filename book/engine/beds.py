"""Test beds: what simple arms reach on them. They have results as labs do, and no chapter.

A bed's results lie in ``book/results/beds/<name>.<scale>.json``, measured by ``python -m
toolkit.labs.beds <name>``, and are told on one page. ``list`` says when they are stale; ``verify``
compares and renews them as it does the numbers of a lab.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from book.engine import key, lab
from book.engine.compare import Run, run_of
from book.engine.project import SCALES, EngineError, Project
from toolkit.core.runs import code, results
from toolkit.core.runs.provenance import pins

PAGE = "book/beds"
SEEDS = 2
"""As many as the command takes at least: a comparison at ``ci`` needs no more."""


@dataclass(frozen=True, order=True)
class Bed:
    """The results of one bed at one scale.

    Args:
        name: the bed's.
        scale: of its results.
        root: the project's folder.
    """

    name: str
    scale: str
    root: Path

    @property
    def slug(self) -> str:
        """Under which its results are kept."""
        return f"beds/{self.name}"

    @property
    def file(self) -> Path:
        """Its results."""
        return results.results_path(self.root / "book" / "results", self.slug, self.scale)


def every(project: Project) -> list[Bed]:
    """The beds that have results, by name."""
    folder = project.root / "book" / "results" / "beds"
    found = []
    for path in sorted(folder.glob("*.json")):
        name, _, scale = path.stem.partition(".")  # a table of a search has two words after it
        if scale in SCALES:
            found.append(Bed(name, scale, project.root))
    return found


def select(project: Project, names: Iterable[str]) -> list[Bed]:
    """The beds of these names, as ``beds/<name>``.

    Raises:
        EngineError: a name that is no bed with results.
    """
    known = every(project)
    if unknown := set(names) - {bed.slug for bed in known}:
        listed = ", ".join(bed.slug for bed in known) or "none"
        raise EngineError(f"there are no results of {sorted(unknown)[0]!r}; there are: {listed}")
    return [bed for bed in known if bed.slug in names]


def stale_reasons(bed: Bed, tracer: Callable[[str], code.Tracer]) -> list[str]:
    """What has changed since a bed was measured; nothing is run.

    Args:
        bed: which.
        tracer: of a scale, follows names in today's code.
    """
    document = lab.load(bed.file)
    if document.get("schema") != results.SCHEMA:
        return ["its results are of another format"]
    now = pins(bed.root)
    moved = any(source["constraints"] != now for source in document["provenance"])
    reasons = ["versions of packages changed"] if moved else []
    for function, digests in results.digests_by_function(document).items():
        try:
            today = tracer(bed.scale).of_name(function)
        except ValueError as error:
            reasons.append(str(error))
            continue
        for digest in sorted(digests - {code.digest(today)}):
            changed = code.differences(document["codes"][digest], today)
            reasons.append(key.shortened(changed))
    return reasons


def mark(stale: Iterable[Bed]) -> str:
    """The line that the page of the beds carries under its title; '' for none."""
    words = []
    for bed in stale:
        commits = {source["commit"][:9] for source in lab.load(bed.file).get("provenance", [])}
        at = ", ".join(sorted(filter(None, commits)))
        words.append(f"{bed.name} (commit {at})" if at else bed.name)
    return f"Measured with earlier code: {', '.join(words)}." if words else ""


def run(
    bed: Bed,
    project: Project,
    scale: str,
    folder: Path,
    stop: threading.Event,
    *,
    seconds: float,
    home: Path | None = None,
) -> Run:
    """Measure the reference arms of a bed in a folder of their own.

    Args:
        bed: which.
        project: whose toolkit does it.
        scale: ``ci``, ``cpu`` or ``gpu``.
        folder: takes the results.
        stop: when set, the run is ended and KeyboardInterrupt raised.
        seconds: the longest it may take.
        home: a folder to put before all others that Python imports from.
    """
    words = [sys.executable, "-m", "toolkit.labs.beds", bed.name, "--scale", scale]
    words += ["--seeds", str(SEEDS), "--to", str(folder)]
    try:
        lab.run_to_end(project, words, folder, stop, seconds=seconds, home=home)
    except lab.Ended as error:
        return Run(failed=str(error))
    file = results.results_path(folder, bed.slug, scale)
    return run_of([], lab.load(file)) if file.is_file() else Run(failed=f"wrote no {file.name}")
