"""Comparing the chapters of a commit with today's, exactly, at ``ci``, on one machine.

This is what makes the core safe to change: where nothing differs and every changed function ran,
numbers that are stale only through code are good, and their keys are renewed.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import filelock

from book.engine import probe, ran, renew
from book.engine.clear import Side
from book.engine.compare import compare
from book.engine.origin import git
from book.engine.plan import Task, assess
from book.engine.project import PACKAGE, Chapter, EngineError, Project
from book.engine.schedule import Budget
from book.engine.source import Source, read
from book.engine.trial import aside

SCALE = "ci"
SHOWN = 12  # differences that are printed of a chapter


@dataclass
class Row:
    """What came of one chapter.

    Args:
        name: the chapter.
        verdict: ``same``, ``differs``, ``failed`` or ``not compared``.
        words: what else there is to say, a line each.
        unstable: what differs between two runs of the base's own code.
    """

    name: str
    verdict: str
    words: list[str] = field(default_factory=list)
    unstable: list[str] = field(default_factory=list)

    @property
    def bad(self) -> bool:
        return self.verdict in ("differs", "failed")


def run(
    project: Project,
    chapters: list[Chapter],
    base: str,
    budget: Budget,
    stop: threading.Event,
    say: Callable[[str], None],
) -> list[Row]:
    """Compare chapters with those of a commit and renew what the comparison clears.

    Args:
        project: today's.
        chapters: which of them.
        base: the commit.
        budget: time limits.
        stop: when set, the run is ended and KeyboardInterrupt raised.
        say: prints one line.

    Raises:
        EngineError: ``base`` is no commit here, or holds no chapters that can be compared.
    """
    commit = _commit(project, base)
    tasks, failures = assess(project, chapters)
    rows = [Row(f.chapter, "failed", [f.message]) for f in failures]
    with _checked_out(project, commit) as former:
        sides = Side(former.root), Side(project.root)
        same, called, probes = [], set(), []
        for task in tasks:
            say(f"{task.chapter.name}: runs at {SCALE}, with {commit[:9]} and as it is now")
            row, base_source, here = _compared(task, project, former, budget, stop)
            rows.append(row)
            called |= here
            if base_source is not None:
                same.append((row, task, base_source))
            for line in [row.verdict, *row.words][:SHOWN]:
                say(f"  {line}")
        with _emptied(project.root / "_build" / "verify" / "probes") as place:
            for found in probe.run(project, former, place):
                rows.append(Row(found.name, found.verdict, found.words))
                for line in [f"{found.name}: {found.verdict}", *found.words]:
                    say(line)
                probes.append(found)
        # a function that ran in one of the chapters was compared there, whoever else reaches it
        called = probe.cleared(called, probes)
        for row, task, base_source in same:
            row.words = renew.renew(task, base_source, project, sides, called)
            say(f"{row.name}: {'; '.join(row.words)}")
    return rows


def _commit(project: Project, base: str) -> str:
    if git(project.root, "rev-parse", "--git-dir") is None:
        raise EngineError(f"{project.root} is no git repository, so no commit can be compared with")
    found = git(
        project.root, "rev-parse", "--verify", "-q", "--end-of-options", f"{base}^{{commit}}"
    )
    if not found:
        raise EngineError(f"BASE {base!r} is no commit here; see `git log --oneline`, or fetch it")
    tree = git(project.root, "ls-tree", "-d", "--name-only", found, "book/chapters", PACKAGE) or ""
    for folder in ("book/chapters", PACKAGE):
        if folder not in tree.splitlines():
            raise EngineError(
                f"BASE {base!r} has no folder {folder}: it is of another format, or of a time "
                "before it; choose a later commit"
            )
    return found


@contextlib.contextmanager
def _checked_out(project: Project, commit: str) -> Iterator[Project]:
    """The commit's files in a folder of their own, removed however this ends."""
    folder = project.root / "_build" / "verify"
    locks = project.root / "_build" / "engine" / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(locks / "verify.lock", timeout=0).acquire()
    except filelock.Timeout as error:
        raise EngineError("another `verify` is at work here; wait for its end") from error
    with lock:
        _remove(project, folder)  # what a killed run left
        try:
            tree = folder / "base"
            if git(project.root, "worktree", "add", "--detach", "-f", str(tree), commit) is None:
                raise EngineError(f"git could not check {commit[:9]} out into {tree}")
            former = Project(tree)
            if not former.chapters:
                raise EngineError(f"BASE {commit[:9]} has no chapters; choose a later commit")
            yield former
        finally:
            _remove(project, folder)


def _remove(project: Project, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    git(project.root, "worktree", "prune")


@contextlib.contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compared(
    task: Task,
    project: Project,
    former: Project,
    budget: Budget,
    stop: threading.Event,
) -> tuple[Row, Source | None, set[str]]:
    """How a chapter compares and, where it is the same, its source at the base and what ran."""
    name = task.chapter.name
    twin = former.chapters.get(task.chapter.slug)
    if twin is None:
        return Row(name, "not compared", ["the base has no such chapter"]), None, set()
    if bool(twin.lab) != bool(task.chapter.lab):
        return Row(name, "not compared", ["only one of the two has a lab"]), None, set()
    try:
        base = Task(read(twin), SCALE, task.parts)
    except EngineError as error:
        return Row(name, "failed", [f"at the base: {error}"]), None, set()
    with _emptied(project.root / "_build" / "verify" / "runs") as place:
        home = ran.prepare(project.root, place / "ran")
        before, failed = aside(base, former, SCALE, place / "before", budget, stop)
        if failed is not None:
            return Row(name, "failed", [f"at the base: {before.failed}"]), None, set()
        now, failed = aside(task, project, SCALE, place / "now", budget, stop, home=home)
        if failed is not None:
            return Row(name, "failed", [f"today: {now.failed}"]), None, set()
        found = compare(before, now)
        if found.differing:
            again, failed = aside(base, former, SCALE, place / "again", budget, stop)
            if failed is not None:
                words = [f"at the base, a second time: {again.failed}"]
                return Row(name, "failed", words), None, set()
            found = compare(before, now, again)
        called = ran.called(place / "ran")
    if found.differing:
        return Row(name, "differs", found.differing, found.unstable), None, set()
    return Row(name, "same", [], found.unstable), base.source, called


def table(rows: list[Row]) -> str:
    """One line a chapter, with what was left out as not reproducible."""
    width = max((len(row.name) for row in rows), default=0)
    lines = [""]
    for row in rows:
        count = f" in {len(row.words)} places" if row.verdict == "differs" else ""
        words = "" if row.verdict == "differs" else "; ".join(row.words)
        lines.append(f"{row.name:{width}}  {row.verdict}{count}{': ' if words else ''}{words}")
        if row.unstable:
            lines.append(f"{'':{width}}  not reproducible, left out: {', '.join(row.unstable)}")
    bad = sum(row.bad for row in rows)
    chapters = sum(not row.name.startswith("probe ") for row in rows)
    return "\n".join([*lines, f"{chapters} chapters, {bad} differ or failed"])
