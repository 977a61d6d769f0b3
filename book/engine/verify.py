"""Comparing the chapters of a commit with today's, exactly, at ``ci``, on one machine.

This is what makes the core safe to change: where nothing differs and every changed function ran,
numbers that are stale only through code are good, and their keys are renewed. Test beds are
compared like chapters.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from book.engine import beds, former, probe, ran, renew
from book.engine.clear import Side
from book.engine.compare import Run, compare
from book.engine.plan import Task, assess
from book.engine.project import Chapter, EngineError, Project
from book.engine.schedule import Budget
from book.engine.source import read
from book.engine.trial import aside

SCALE = "ci"
SHOWN = 12  # differences that are printed of a chapter


@dataclass
class Row:
    """What came of one chapter.

    Args:
        name: the chapter, bed or probe.
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


Renewal = Callable[[set[str]], list[str]]
"""Called with the functions that were compared; says what it did, or what speaks against it."""


@dataclass
class Compared:
    """How one chapter or bed compares.

    Args:
        row: what came of it.
        renewal: renews its keys; None where the two sides are not the same.
        called: functions of today's toolkit that it called.
    """

    row: Row
    renewal: Renewal | None = None
    called: set[str] = field(default_factory=set)


def run(
    project: Project,
    chapters: list[Chapter],
    of_beds: list[beds.Bed],
    base: str,
    budget: Budget,
    stop: threading.Event,
    say: Callable[[str], None],
) -> list[Row]:
    """Compare chapters and beds with those of a commit and renew what the comparison clears.

    Args:
        project: today's.
        chapters: which of them.
        of_beds: which beds.
        base: the commit.
        budget: time limits.
        stop: when set, the run is ended and KeyboardInterrupt raised.
        say: prints one line.

    Raises:
        EngineError: ``base`` is no commit here, or holds no chapters that can be compared.
    """
    commit = former.commit_of(project, base)
    tasks, failures = assess(project, chapters)
    rows = [Row(f.chapter, "failed", [f.message]) for f in failures]
    with former.checked_out(project, commit) as earlier:
        sides = Side(earlier.root), Side(project.root)
        steps = [
            (task.chapter.name, functools.partial(_chapter, task, sides)) for task in tasks
        ] + [(bed.slug, functools.partial(_bed, bed, sides)) for bed in of_beds]
        same, called, probes = [], set(), []
        for name, step in steps:
            say(f"{name}: runs at {SCALE}, with {commit[:9]} and as it is now")
            found = step(project, earlier, budget, stop)
            rows.append(found.row)
            called |= found.called
            if found.renewal is not None:
                same.append(found)
            for line in [found.row.verdict, *found.row.words][:SHOWN]:
                say(f"  {line}")
        with _emptied(project.root / "_build" / "verify" / "probes") as place:
            for tried in probe.run(project, earlier, place):
                rows.append(Row(tried.name, tried.verdict, tried.words))
                for line in [f"{tried.name}: {tried.verdict}", *tried.words]:
                    say(line)
                probes.append(tried)
        # a function that ran in one of the chapters was compared there, whoever else reaches it
        called = probe.cleared(called, probes)
        for found in same:
            found.row.words = found.renewal(called)
            say(f"{found.row.name}: {'; '.join(found.row.words)}")
    return rows


@contextlib.contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _chapter(
    task: Task,
    sides: tuple[Side, Side],
    project: Project,
    earlier: Project,
    budget: Budget,
    stop: threading.Event,
) -> Compared:
    """A chapter, with its lab if it has one."""
    name = task.chapter.name
    twin = earlier.chapters.get(task.chapter.slug)
    if twin is None:
        return Compared(Row(name, "not compared", ["the base has no such chapter"]))
    if bool(twin.lab) != bool(task.chapter.lab):
        return Compared(Row(name, "not compared", ["only one of the two has a lab"]))
    try:
        base = Task(read(twin), SCALE, task.parts)
    except EngineError as error:
        return Compared(Row(name, "failed", [f"at the base: {error}"]))

    def once(side: Project, place: Path, home: Path | None) -> Run:
        one = base if side is earlier else task
        return aside(one, side, SCALE, place, budget, stop, home=home)[0]

    renewal = functools.partial(renew.renew, task, base.source, project, sides)
    return _compared(name, once, project, earlier, renewal)


def _bed(
    bed: beds.Bed,
    sides: tuple[Side, Side],
    project: Project,
    earlier: Project,
    budget: Budget,
    stop: threading.Event,
) -> Compared:
    """The reference arms of a bed."""
    seconds = budget.limits(SCALE).chapter

    def once(side: Project, place: Path, home: Path | None) -> Run:
        return beds.run(bed, side, SCALE, place, stop, seconds=seconds, home=home)

    renewal = functools.partial(renew.renew_bed, bed, sides)
    return _compared(bed.slug, once, project, earlier, renewal)


def _compared(
    name: str,
    once: Callable[[Project, Path, Path | None], Run],
    project: Project,
    earlier: Project,
    renewal: Renewal,
) -> Compared:
    """Run with the base's code and with today's and, where they differ, with the base's again."""
    with _emptied(project.root / "_build" / "verify" / "runs") as place:
        home = ran.prepare(project.root, place / "ran")
        before = once(earlier, place / "before", None)
        if before.failed:
            return Compared(Row(name, "failed", [f"at the base: {before.failed}"]))
        now = once(project, place / "now", home)
        if now.failed:
            return Compared(Row(name, "failed", [f"today: {now.failed}"]))
        found = compare(before, now)
        if found.differing:
            again = once(earlier, place / "again", None)
            if again.failed:
                words = [f"at the base, a second time: {again.failed}"]
                return Compared(Row(name, "failed", words))
            found = compare(before, now, again)
        called = ran.called(place / "ran")
    if found.differing:
        return Compared(Row(name, "differs", found.differing, found.unstable))
    return Compared(Row(name, "same", [], found.unstable), renewal, called)


def table(rows: list[Row]) -> str:
    """One line for each chapter, bed and probe, with what was left out as not reproducible."""
    width = max((len(row.name) for row in rows), default=0)
    lines = [""]
    for row in rows:
        count = f" in {len(row.words)} places" if row.verdict == "differs" else ""
        words = "" if row.verdict == "differs" else "; ".join(row.words)
        lines.append(f"{row.name:{width}}  {row.verdict}{count}{': ' if words else ''}{words}")
        if row.unstable:
            lines.append(f"{'':{width}}  not reproducible, left out: {', '.join(row.unstable)}")
    bad = sum(row.bad for row in rows)
    of_beds = sum(row.name.startswith("beds/") for row in rows)
    chapters = sum(not row.name.startswith("probe ") for row in rows) - of_beds
    compared = f"{chapters} chapters, {of_beds} beds" if of_beds else f"{chapters} chapters"
    return "\n".join([*lines, f"{compared}, {bad} differ or failed"])
