"""Running a chapter aside, in a folder of its own: for ``make try`` and ``make verify``."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from book.engine import lab, record
from book.engine.compare import Run, compare, run_of
from book.engine.install import failure
from book.engine.plan import Failure, Task
from book.engine.project import Project, no_room
from book.engine.schedule import Budget
from book.engine.watch import Place, Stopped, run_chapter
from toolkit.core import io

VERDICT = re.compile(r"claims\[([^\]]+)\]\.verdict")
SHOWN = 12  # differences that are printed


def aside(
    task: Task,
    project: Project,
    scale: str,
    scratch: Path,
    budget: Budget,
    stop: threading.Event,
    *,
    home: Path | None = None,
    show: bool = False,
) -> tuple[Run, Failure | None]:
    """Run a chapter, and its lab if it has one, without touching its page or its results.

    Args:
        task: which chapter, as read in ``project``.
        project: whose toolkit it imports.
        scale: ``ci``, ``cpu`` or ``gpu``.
        scratch: folder that takes everything; what lies in its ``results`` is there for the lab.
        budget: time limits.
        stop: when set, the run is ended and KeyboardInterrupt raised.
        home: a folder to put before all others that Python imports from.
        show: whether the lab shows its progress.
    """
    chapter, limits = task.chapter, budget.limits(scale)
    results = scratch / "results"
    results.mkdir(parents=True, exist_ok=True)
    told = None
    if chapter.lab is not None:
        try:
            seconds = limits.chapter
            lab.measure(
                project, chapter, scale, results, stop, seconds=seconds, home=home, show=show
            )
        except lab.Ended as error:
            return Run(failed=str(error)), failure(task, str(error), traceback=error.words)
        told = results
    place = Place.inside(scratch, told, home)
    here = Task(task.source, scale, task.parts)
    try:
        result = run_chapter(here, project, limits, place, lambda _: None, stop)
    except Stopped as stopped:
        raise KeyboardInterrupt from stopped
    if "failed" in result:
        failed = failure(task, **result["failed"])
        return Run(failed=f"{failed.where}: {failed.message}"), failed
    file = results / chapter.results(scale).name
    outputs = record.clean(result["outputs"], project, str(scratch))
    return run_of(outputs, lab.load(file) if file.is_file() else None), None


def run(
    project: Project,
    tasks: list[Task],
    scale: str | None,
    budget: Budget,
    stop: threading.Event,
    say: Callable[[str], None],
) -> list[Failure]:
    """``try``: run each chapter aside and say what would differ from its page and results."""
    failures = []
    for task in tasks:
        chapter, at = task.chapter, scale or task.scale
        around = project.root / "_build" / "try"
        around.mkdir(parents=True, exist_ok=True)
        io.sweep(around)
        with io.scratch(around, chapter.slug) as scratch:
            if chapter.lab is not None and chapter.results(at).is_file():
                (scratch / "results").mkdir()  # what is measured already need not be again
                shutil.copy(chapter.results(at), scratch / "results")
            say(f"{chapter.name}: runs at {at}, in a scratch folder")
            found, failed = aside(task, project, at, scratch, budget, stop, show=True)
            if failed is not None:
                if words := no_room(project):
                    failed = replace(failed, message=f"{words} ({failed.message})")
                failures.append(failed)
                continue
        for line in _told(task, at, found):
            say(f"  {line}")
    return failures


def _told(task: Task, scale: str, found: Run) -> list[str]:
    chapter = task.chapter
    if task.recorded is None or task.recorded["scale"] != scale:
        there = f"its page is at {task.recorded['scale']}" if task.recorded else "it has no page"
        verdicts = [
            f"claim {match[1]}: {value}"
            for (kind, path), value in found.values.items()
            if kind == "results" and (match := VERDICT.fullmatch(str(path)))
        ]
        return [f"it runs; {there}, so there is nothing to compare with", *verdicts]
    file = chapter.results(scale)
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    before = run_of(record.recorded_outputs(chapter), results)
    differing = compare(before, found).differing
    if not differing:
        return ["every number and every printed word is what is recorded"]
    more = [f"and {len(differing) - SHOWN} more"] if len(differing) > SHOWN else []
    return [f"{len(differing)} places would differ:", *differing[:SHOWN], *more]
