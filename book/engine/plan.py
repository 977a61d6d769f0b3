"""Deciding what to do with each chapter, and why: its numbers and its page are stale apart."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from book.engine import key, lab
from book.engine.project import SCALES, Chapter, EngineError, Project
from book.engine.source import Source, read
from toolkit.core.runs.code import Tracer

RULES = """\
what is stale:
  Numbers are stale when the code, the data or the packages they were measured with have changed,
  a page when its cells, its text, the code of its views or the results it tells from have. A
  chapter without a lab measures in its own cells: there a changed cell makes its numbers stale.

what is run:
  `build` measures nothing. It tells a lab's page again whose numbers are fresh, refreshes text
  where only prose changed, keeps every page whose numbers are stale and marks it when rendered.
  `record` measures. Without --scale it keeps the scale of the page, and takes ci if there is none.
  With --scale a chapter whose page has that scale or a smaller one is brought to that scale. A
  fresh page of a larger scale is kept unless --force is given; a stale one is replaced, because
  you asked for this scale. Results belong to the page: those of its former scale are removed."""


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
        action: ``record`` (measure and tell), ``tell`` (run a lab's page over its results),
            ``refresh`` (only its text changed) or ``keep``.
        numbers: why its numbers are stale, in words; empty when fresh.
        page: why its page is stale, in words; empty when fresh.
        note: why a stale or smaller request is not followed, in words.
        afresh: whether a lab shall measure also what it has measured with the same code.
    """

    source: Source
    scale: str
    parts: dict[str, Any]
    action: str = "keep"
    numbers: list[str] = field(default_factory=list)
    page: list[str] = field(default_factory=list)
    note: str = ""
    recorded: dict[str, Any] | None = None
    afresh: bool = False

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
    return provenance, ""


def parted(chapter: Chapter, page: dict[str, Any]) -> str:
    """Whether a page and its results belong together: '' or what is wrong, in words."""
    told, file = page.get("results"), chapter.results(page["scale"])
    if not told:
        return ""
    if not file.is_file():
        return f"{file.name} is missing"
    if isinstance(told, dict) and told["sha256"] != lab.sha256(file):
        return f"{file.name} is not the one the page was told from"
    return ""


def assess(
    project: Project,
    chapters: Iterable[Chapter],
    *,
    scale: str | None = None,
    force: bool = False,
    measure: bool = False,
    tell: bool = False,
) -> tuple[list[Task], list[Failure]]:
    """What to do with each chapter; chapters that cannot be read come back as failures.

    Args:
        project: where they lie.
        chapters: which.
        scale: the scale asked for, None for the scale of each page.
        force: run whether or not it is needed.
        measure: whether stale numbers may be measured again.
        tell: measure nothing, tell the pages of labs that have results, stale or not.
    """
    tasks: list[Task] = []
    failures: list[Failure] = []
    tracer = functools.cache(functools.partial(Tracer, project.root))
    sources = _readable(chapters, failures)
    try:  # one process for all names; only if that fails, one for each chapter to say which
        every = key.data_hashes(project, (n for s in sources for n in s.settings.data))
    except EngineError:
        every = None
    unsure: dict[str, list[Task]] = {}
    for source in sources:
        try:
            data = key.data_hashes(project, source.settings.data) if every is None else every
            task = _stale(source, project, tracer, data, scale, unsure)
        except EngineError as error:
            failures.append(_unreadable(source.chapter, error))
            continue
        tasks.append(task)
    silent = _ask(project, unsure)
    failures += silent
    tasks = [t for t in tasks if t.chapter.name not in {failure.chapter for failure in silent}]
    for task in tasks:
        if tell:
            _to_tell(task, scale)
        elif measure:
            _to_record(task, scale, force)
        else:
            _to_build(task)
        if task.scale != task.parts["scale"]:
            names = task.source.settings.data
            data = key.data_hashes(project, names) if every is None else every
            task.parts = key.parts(task.source, project, task.scale, tracer(task.scale), data)
    return tasks, failures


def _ask(project: Project, unsure: Mapping[str, Sequence[Task]]) -> list[Failure]:
    """Ask labs what is stale, all of a scale at once; those that cannot say come back."""
    failures = []
    for scale, tasks in unsure.items():
        said = lab.stale_reasons(project, [task.chapter for task in tasks], scale)
        for task in tasks:
            answer = said[task.chapter]
            if isinstance(answer, EngineError):
                failures.append(_unreadable(task.chapter, answer))
            else:
                task.numbers += answer
    return failures


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


def _stale(
    source: Source,
    project: Project,
    tracer: Callable[[str], Tracer],
    data: dict,
    scale: str | None,
    unsure: dict[str, list[Task]],
) -> Task:
    """What is stale about a chapter's numbers and its page, at the scale the page has.

    Where only its lab knows, the task is put with the unsure of its scale.
    """
    chapter = source.chapter
    page, missing = recorded(chapter)
    at = page["scale"] if page else scale or _measured(chapter) or "ci"
    parts = key.parts(source, project, at, tracer(at), data)
    task = Task(source, at, parts, recorded=page)
    changed = key.differences(page["parts"], parts) if page else {}
    apart = parted(chapter, page) if page else ""
    if chapter.lab is None:
        task.numbers = [missing] if missing else [w for k, w in changed.items() if k != "text"]
        task.numbers += [apart] if apart else []
        task.page = [changed["text"]] if "text" in changed else []
        return task
    task.page = [missing] if missing else [w for k, w in changed.items() if k not in key.NUMBERS]
    task.page += [apart] if apart else []
    if not chapter.results(at).is_file():
        task.numbers = [f"never measured at {at}"]
        return task
    # a page from before its chapter had a lab says nothing about the lab's numbers
    told = page is not None and isinstance(page.get("results"), dict)
    task.numbers = [w for k, w in changed.items() if told and k in key.NUMBERS]
    task.afresh = bool(task.numbers)  # the lab knows its code; of packages and data it does not ask
    edited = page is None or not changed.keys().isdisjoint({"code", "format", "cells"})
    if edited or not lab.same_code(lab.load(chapter.results(at)), tracer(at)):
        unsure.setdefault(at, []).append(task)  # asking is slow, so only where it may be stale
    return task


def _measured(chapter: Chapter) -> str | None:
    """The largest scale a lab was measured at."""
    found = [s for s in SCALES if chapter.results(s).is_file()] if chapter.lab else []
    return found[-1] if found else None


def _to_build(task: Task) -> None:
    """What may be done without measuring."""
    only_text = task.page == ["text changed"]
    cells_kept = task.recorded and task.recorded["parts"].get("cells") == task.parts["cells"]
    if task.chapter.lab and task.page and not task.numbers:
        task.action = "refresh" if only_text else "tell"
    elif cells_kept and "text changed" in task.page:
        task.action = "refresh"  # the words are new, the outputs stay what they were
    elif task.recorded is None:
        why = (task.page or task.numbers)[0]
        task.note = f"{why}; `make record NAME={task.chapter.slug}` measures it"


def _to_record(task: Task, scale: str | None, force: bool) -> None:
    """What to do when stale numbers may be measured again."""
    held, order = (task.recorded["scale"] if task.recorded else None), SCALES.index
    larger = scale and held and order(scale) > order(held)
    if force or larger or task.numbers or (held is None and task.chapter.lab is None):
        task.action, task.scale = "record", scale or task.scale
        task.afresh = force or task.afresh
        if held and task.scale != held:
            task.numbers.append(f"scale: {held} -> {task.scale}")
        task.numbers = task.numbers or ["forced"]
    elif task.page:
        task.action = "refresh" if task.page == ["text changed"] else "tell"
    elif scale and scale != held:
        task.note = f"the page is fresh at the larger scale {held}; --force replaces it"


def _to_tell(task: Task, scale: str | None) -> None:
    """Tell a lab's page over the results that there are, of the largest scale if none is named.

    A page has results of one scale, and those of others go when it is told; a larger one's were
    dear, so they are not given up for a smaller one's.
    """
    measured = _measured(task.chapter)
    wanted, order = scale or measured or task.scale, SCALES.index
    if not task.chapter.lab or not task.chapter.results(wanted).is_file():
        task.note = f"nothing was measured at {wanted} that could be told"
    elif measured and order(measured) > order(wanted):
        task.note = f"it was measured at the larger scale {measured}; tell that"
    else:
        task.action, task.scale = "tell", wanted


def mark(task: Task) -> str:
    """The line a kept page of stale numbers carries under its title; '' for none."""
    if not task.numbers or task.recorded is None:
        return ""
    commit = task.recorded.get("commit") or ""
    where = f"commit {commit[:9]}; " if commit else ""
    first, more = task.numbers[0], len(task.numbers) - 1
    rest = f"; and {more} more" if more else ""
    return f"Its numbers were measured with earlier code ({where}what changed: {first}{rest})."


def without_gpu(tasks: Iterable[Task]) -> None:
    """Keep the stale ``gpu`` pages that nobody asked for by ``--scale``, and say so."""
    for task in tasks:
        if task.action == "record" and task.scale == "gpu":
            task.action = "keep"
            task.note = (
                "stale, but its page was recorded at gpu and there is no GPU here; the page is "
                f"kept (`record {task.chapter.slug} --scale cpu` replaces it)"
            )


def cuda_available() -> bool:
    """Whether PyTorch sees a GPU; False where PyTorch is not installed."""
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()
