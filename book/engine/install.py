"""Putting a chapter's page and results into place, whole or not at all."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from typing import Any

from book.engine import key, record
from book.engine.plan import Failure, Task
from book.engine.project import SCALES, Project, sweep_leftovers, write
from book.engine.watch import Limits, run_chapter


def record_chapter(
    task: Task,
    project: Project,
    limits: Limits,
    progress: Callable[[int], None],
    stop: threading.Event,
) -> Failure | None:
    """Run a chapter and put its page and results into place. Hold the chapter's lock meanwhile.

    Args:
        task: what to run.
        project: where.
        limits: time and threads.
        progress: called with the number of the code cell that starts.
        stop: when set, the run is ended and :class:`~book.engine.watch.Stopped` raised.
    """
    chapter, scratch = task.chapter, task.chapter.scratch
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "results").mkdir(parents=True)
    (scratch / "cwd").mkdir()
    sweep_leftovers(chapter.page)
    sweep_leftovers(chapter.results(task.scale))
    try:
        result = run_chapter(task, project, limits, progress, stop)
        if "failed" in result:
            return _failure(task, **result["failed"])
        _install(task, project, limits, result)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return None


def refresh_chapter(task: Task, project: Project) -> None:
    """Give a page the source's new text and keep its outputs: no code changed."""
    provenance = {**task.recorded, "parts": task.parts, "key": key.digest(task.parts)}
    outputs = record.recorded_outputs(task.chapter)
    page = record.page(task.source, task.scale, outputs, provenance, project.repository)
    write(task.chapter.page, record.text_of(page))


def _failure(task: Task, message: str, cell: int | None = None, traceback: str = "") -> Failure:
    kept = task.chapter.page.is_file()
    return Failure(task.chapter.name, message, cell, len(task.source.code), traceback, kept)


def _install(task: Task, project: Project, limits: Limits, result: dict[str, Any]) -> None:
    """Put results and page into place, the page last: it carries the key that makes them count."""
    chapter = task.chapter
    results = chapter.scratch / "results" / chapter.results(task.scale).name
    found = results if results.is_file() else None
    outputs = record.clean(result["outputs"], project, str(chapter.scratch))
    provenance = {
        "chapter": chapter.name,
        "scale": task.scale,
        "device_name": result["device_name"],
        "threads": limits.threads,
        "versions": {**result["versions"], "toolkit": project.version},
        "date": record.today(),
        "seconds": result["seconds"],
        "seeds": record.seed_count(found),
        "results": found is not None,
        "links": result["links"],
        "key": key.digest(task.parts),
        "parts": task.parts,
    }
    page = record.page(task.source, task.scale, outputs, provenance, project.repository)
    text = record.text_of(page)
    if found is not None:
        write(chapter.results(task.scale), found.read_text(encoding="utf-8"))
    write(chapter.page, text)
    for other in SCALES:
        if other != task.scale or found is None:
            chapter.results(other).unlink(missing_ok=True)
