"""Deciding which chapters to run, at which scale, and why."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from book.engine import key
from book.engine.project import SCALES, Chapter, EngineError, Project
from book.engine.source import Source, read
from book.engine.trace import Tracer

RULES = """\
which scale is run:
  Without --scale a stale chapter is recorded again at the scale of its page, and at ci if it has
  no page yet. A stale page of scale gpu is kept, and said so, where there is no GPU.
  With --scale a chapter whose page has that scale or a smaller one is brought to that scale. A
  fresh page of a larger scale is kept (the page is the largest scale run so far) unless --force
  is given; a stale page of a larger scale is replaced, because you asked for this scale.
  Results belong to the page: those of the page's former scale are removed with it.
  If only prose changed, the text is replaced and the recorded outputs stay; nothing runs."""


@dataclass
class Failure:
    """What went wrong with one chapter.

    Args:
        chapter: its name, ``part/slug``.
        message: one line.
        cell: number of the code cell, None when none was running.
        cells: number of code cells in the chapter.
        traceback: the cell's traceback, '' when there is none.
        kept: whether a good page of the chapter remains.
    """

    chapter: str
    message: str
    cell: int | None = None
    cells: int | None = None
    traceback: str = ""
    kept: bool = False

    @property
    def where(self) -> str:
        return (
            f"{self.chapter}, code cell {self.cell} of {self.cells}" if self.cell else self.chapter
        )


@dataclass
class Task:
    """A chapter and what to do with it.

    Args:
        action: ``record`` (run it), ``refresh`` (only its text changed) or ``keep``.
        reasons: why it is stale, in words; empty when fresh.
        note: why a stale or smaller request is not followed, in words.
    """

    source: Source
    scale: str
    parts: dict[str, Any]
    action: str = "keep"
    reasons: list[str] = field(default_factory=list)
    note: str = ""
    recorded: dict[str, Any] | None = None

    @property
    def chapter(self) -> Chapter:
        return self.source.chapter


def recorded(chapter: Chapter) -> tuple[dict[str, Any] | None, str]:
    """The provenance a page was recorded with, or None and why there is none."""
    try:
        notebook = json.loads(chapter.page.read_text(encoding="utf-8"))
        provenance = notebook["metadata"]["provenance"]
        if provenance["scale"] not in SCALES or not isinstance(provenance["parts"], dict):
            return None, "page was not recorded by this engine"
    except FileNotFoundError:
        return None, "never recorded"
    except (ValueError, KeyError, TypeError):
        return None, "page cannot be read"
    results = provenance.get("results")
    if results and not chapter.results(provenance["scale"]).is_file():
        return None, f"{chapter.results(provenance['scale']).name} is missing"
    return provenance, ""


def assess(
    project: Project,
    chapters: Iterable[Chapter],
    *,
    scale: str | None = None,
    force: bool = False,
) -> tuple[list[Task], list[Failure]]:
    """What to do with each chapter; chapters that cannot be read come back as failures.

    Args:
        project: where they lie.
        chapters: which.
        scale: the scale asked for, None for the scale of each page.
        force: run whether or not it is needed.
    """
    tasks: list[Task] = []
    failures: list[Failure] = []
    tracer = Tracer(project.root)
    sources = _readable(chapters, failures)
    try:  # one process for all names; only if that fails, one for each chapter to say which
        every = key.data_hashes(project, (n for s in sources for n in s.settings.data))
    except EngineError:
        every = None
    for source in sources:
        try:
            data = key.data_hashes(project, source.settings.data) if every is None else every
        except EngineError as error:
            failures.append(_unreadable(source.chapter, error))
            continue
        tasks.append(_task(project, source, tracer, data, scale, force))
    return tasks, failures


def _readable(chapters: Iterable[Chapter], failures: list[Failure]) -> list[Source]:
    found = []
    for chapter in chapters:
        try:
            found.append(read(chapter))
        except EngineError as error:
            failures.append(_unreadable(chapter, error))
    return found


def _unreadable(chapter: Chapter, error: EngineError) -> Failure:
    message = str(error).removeprefix(f"{chapter.name}: ")
    return Failure(chapter.name, message, kept=chapter.page.is_file())


def _task(
    project: Project, source: Source, tracer: Tracer, data: dict, scale: str | None, force: bool
) -> Task:
    page, missing = recorded(source.chapter)
    if page is None:
        target = scale or "ci"
        parts = key.parts(source, project, target, tracer, data)
        return Task(source, target, parts, "record", [missing])
    parts = key.parts(source, project, page["scale"], tracer, data)
    changed = key.differences(page["parts"], parts)
    task = Task(source, page["scale"], parts, "keep", list(changed.values()), recorded=page)
    order = SCALES.index
    if force or (scale and order(scale) > order(page["scale"])):
        task.action, task.scale = "record", scale or page["scale"]
        if task.scale != page["scale"]:
            task.reasons.append(f"scale: {page['scale']} -> {task.scale}")
        task.reasons = task.reasons or ["forced"]
    elif set(changed) == {"text"}:
        task.action = "refresh"
    elif changed:
        task.action, task.scale = "record", scale or page["scale"]
    elif scale and scale != page["scale"]:
        task.note = f"the page is fresh at the larger scale {page['scale']}; --force replaces it"
    if task.scale != page["scale"]:
        task.parts = key.parts(source, project, task.scale, tracer, data)
    return task


def without_gpu(tasks: Iterable[Task]) -> None:
    """Keep the stale ``gpu`` pages that nobody asked for by ``--scale``, and say so."""
    for task in tasks:
        if task.action == "record" and task.scale == "gpu":
            task.action = "keep"
            task.note = (
                "stale, but its page was recorded at gpu and there is no GPU here; the page is "
                f"kept (`run {task.chapter.slug} --scale cpu` replaces it)"
            )


def cuda_available() -> bool:
    """Whether PyTorch sees a GPU; False where PyTorch is not installed."""
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()
