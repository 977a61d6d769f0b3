"""Putting a chapter's results and page into place, whole or not at all."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from book.engine import key, lab, record
from book.engine.origin import origin
from book.engine.plan import Failure, Task
from book.engine.project import SCALES, Project, write
from book.engine.watch import Limits, Place, run_chapter
from toolkit.core.io import sweep


def record_chapter(
    task: Task,
    project: Project,
    limits: Limits,
    progress: Callable[[int], None],
    stop: threading.Event,
) -> Failure | None:
    """Measure, if the task says so, run the chapter and put what came of it into place.

    Hold the chapter's lock meanwhile. Results go first, the page last: it names the results it
    was told from, so that a page beside other results is known as stale.

    Args:
        task: what to run.
        project: where.
        limits: time and threads.
        progress: called with the number of the code cell that starts.
        stop: when set, the run is ended and :class:`~book.engine.watch.Stopped` raised.
    """
    chapter, scratch = task.chapter, task.chapter.scratch
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for place in (chapter.page, chapter.results(task.scale), chapter.times(task.scale)):
        sweep(place.parent)
    whence = origin(project, chapter, task.scale)
    try:
        if chapter.lab is not None:
            return _tell(task, project, limits, progress, stop, whence)
        result = run_chapter(task, project, limits, Place.inside(scratch), progress, stop)
        if "failed" in result:
            return failure(task, **result["failed"])
        found = scratch / "results" / chapter.results(task.scale).name
        _install(task, project, limits, result, found if found.is_file() else None, whence)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return None


def _tell(
    task: Task,
    project: Project,
    limits: Limits,
    progress: Callable[[int], None],
    stop: threading.Event,
    whence: dict[str, Any],
) -> Failure | None:
    """A chapter with a lab: its numbers come from the store, its page only reads them."""
    chapter = task.chapter
    results = chapter.results(task.scale)
    if task.action == "record":
        folder = results.parent
        if task.afresh:
            folder = lab.emptied(chapter, task.scale, chapter.scratch / "measured")
        try:
            seconds = limits.chapter
            lab.measure(project, chapter, task.scale, folder, stop, seconds=seconds, show=True)
            if task.afresh:
                _bring(folder, results, chapter.times(task.scale))
        except lab.Ended as error:
            return failure(task, str(error), traceback=error.words)
    before = lab.sha256(results)
    place = Place.inside(chapter.scratch, results.parent)
    result = run_chapter(task, project, limits, place, progress, stop)
    if "failed" in result:
        return failure(task, **result["failed"])
    if lab.sha256(results) != before:
        return failure(task, f"{results.name} changed while the page was told from it; run again")
    _install(task, project, limits, result, results, whence)
    return None


def _bring(folder: Path, results: Path, times: Path) -> None:
    """Put what was measured in a folder of its own into place."""
    if (folder / "times" / times.name).is_file():
        write(times, (folder / "times" / times.name).read_text(encoding="utf-8"))
    write(results, (folder / results.name).read_text(encoding="utf-8"))


def refresh_chapter(task: Task, project: Project) -> None:
    """Give a page the source's new text and keep its outputs: no code changed."""
    parts = {**task.recorded["parts"], "text": task.parts["text"]}
    provenance = {**task.recorded, "parts": parts, "key": key.digest(parts)}
    outputs = record.recorded_outputs(task.chapter)
    scale = task.recorded["scale"]
    page = record.page(task.source, scale, outputs, provenance, project.repository)
    write(task.chapter.page, record.text_of(page))


def failure(task: Task, message: str, cell: int | None = None, traceback: str = "") -> Failure:
    kept = task.chapter.page.is_file()
    return Failure(task.chapter.name, message, cell, len(task.source.code), traceback, kept)


def _install(
    task: Task,
    project: Project,
    limits: Limits,
    result: dict[str, Any],
    found: Path | None,
    whence: dict[str, Any],
) -> None:
    """Put results and page into place, the page last: it carries the key that makes them count."""
    chapter = task.chapter
    target = chapter.results(task.scale)
    outputs = record.clean(result["outputs"], project, str(chapter.scratch))
    provenance = {
        "chapter": chapter.name,
        "scale": task.scale,
        "device_name": result["device_name"],
        "threads": limits.threads,
        "versions": {**result["versions"], "toolkit": project.version},
        **whence,
        "date": record.today(),
        "seconds": result["seconds"],
        "seeds": record.seed_counts(found),
        "results": {"file": target.name, "sha256": lab.sha256(found)} if found else None,
        "links": result["links"],
        "key": key.digest(task.parts),
        "parts": task.parts,
    }
    if chapter.lab is not None:
        provenance |= record.measured_dates(chapter.times(task.scale))
    page = record.page(task.source, task.scale, outputs, provenance, project.repository)
    text = record.text_of(page)
    if found is not None and found != target:
        write(target, found.read_text(encoding="utf-8"))
    write(chapter.page, text)
    for other in SCALES:
        if other != task.scale or found is None:
            chapter.results(other).unlink(missing_ok=True)
            chapter.times(other).unlink(missing_ok=True)
