"""Hangs, kills and crowds: what the engine does when things go wrong or at once."""

from __future__ import annotations

import errno
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from book.engine import notebooks
from book.engine.plan import Task, without_gpu
from book.engine.project import Chapter, write
from book.engine.schedule import Budget, fits
from book.engine.source import Settings, Source
from tests.book.engine_toy import Toy, kill9, until
from toolkit.core import io

WAIT = "import time; time.sleep(60)"
STUBBORN = """
    import time
    while True:
        try:
            time.sleep(60)
        except BaseException:
            print("no")
    """


def gated(gate: Path) -> str:
    """A cell that ends when the file ``gate`` is there, or after 40 s."""
    return f"""
        import os, time
        for _ in range(800):
            if os.path.exists({str(gate)!r}):
                break
            time.sleep(0.05)
        """


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path / "project")


def test_a_hanging_cell_is_ended_and_named(toy: Toy) -> None:
    toy.chapter("polite", WAIT)
    toy.chapter("stubborn", "print('a')", STUBBORN)
    toy.chapter("quick", "print('done')")
    said = toy.engine("record", "--jobs", "3", "--cell-timeout", "3", code=1)
    ended = "ended: it ran longer than the cell timeout of 3 s"
    assert f"alpha/polite, code cell 2 of 2: {ended}" in said
    assert f"alpha/stubborn, code cell 3 of 3: {ended}" in said
    assert "alpha/quick: recorded" in said
    assert toy.processes() == []


def test_a_cell_that_silences_its_own_client_is_ended_too(toy: Toy) -> None:
    # The worker is stopped from inside the kernel, so that its own timeout never comes.
    stop = "import os, signal, time; os.kill(os.getppid(), signal.SIGSTOP); time.sleep(60)"
    toy.chapter("mute", stop)
    said = toy.engine("record", "--cell-timeout", "2", "--grace", "1", code=1)
    assert "alpha/mute, code cell 2 of 2: ended: it ran longer than the cell timeout of 2 s" in said
    assert toy.processes() == []


def test_a_slow_chapter_is_ended_at_its_wall_clock_limit(toy: Toy) -> None:
    toy.chapter("slow", *["import time; time.sleep(1)"] * 60)
    said = toy.engine("record", "--timeout", "4", code=1)
    found = re.search(
        r"alpha/slow, code cell (\d+) of 61: ended: the chapter ran longer than 4 s", said
    )
    assert found
    assert int(found[1]) < 10
    assert toy.processes() == []


def test_kill_9_leaves_every_page_readable_and_the_next_run_resumes(toy: Toy) -> None:
    toy.chapter("first", toy.count("first"))
    toy.chapter("second", "print('old')")
    toy.engine("record")
    old = toy.text("second")
    toy.chapter("first", toy.count("first"), "print('new')")
    gate = toy.root / "gate"
    toy.chapter("second", toy.count("second"), gated(gate))
    engine = toy.start("record", "--jobs", "2")
    until(lambda: toy.runs("second") and b"new" in toy.text("first"))
    kill9(engine)
    assert json.loads(toy.text("first"))
    assert toy.text("second") == old
    until(lambda: toy.processes() == [], seconds=15)  # no kernel outlives its engine for long

    gate.touch()
    said = toy.engine("record")
    assert "alpha/second: recorded" in said
    assert "alpha/first" not in said
    assert (toy.runs("first"), toy.runs("second")) == (2, 2)
    assert toy.leftovers() == []


def test_what_a_killed_try_left_is_removed_by_the_next(toy: Toy) -> None:
    gate = toy.root / "gate"
    toy.chapter("first", toy.count("first"), gated(gate))
    engine = toy.start("try", "--scale", "ci")
    until(lambda: toy.runs("first"))
    folder = toy.root / "_build" / "try"
    io.sweep(folder)
    assert len(list(folder.iterdir())) == 1  # it lives and works
    kill9(engine)
    assert len(list(folder.iterdir())) == 1
    gate.touch()
    toy.engine("try", "--scale", "ci")
    assert list(folder.iterdir()) == []


def test_a_full_disk_is_named_with_its_folder(toy: Toy, monkeypatch) -> None:
    toy.chapter("first", "1 / 0")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(notebooks, "write", full)
    said = toy.engine("notebooks", code=2)
    words = f"no space left on the disk that holds {toy.root / '_build'}: free some"
    assert said.startswith(f"error: {words}")
    # a program of its own that failed for it says only what it noticed
    usage = shutil.disk_usage(toy.root)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    said = toy.engine("record", code=1)
    assert words in said
    assert "ZeroDivisionError" in said


def test_a_kill_after_the_page_was_installed_leaves_nothing_for_ever(toy: Toy) -> None:
    toy.chapter("first", toy.count("first"))
    toy.engine("record")
    scratch = toy.root / "_build" / "engine" / "alpha" / "first"
    scratch.mkdir(parents=True)
    (scratch / "job.json").write_text("{}")
    toy.engine("record")
    assert toy.leftovers() == []
    assert toy.runs("first") == 1


def test_an_ordinary_kill_ends_the_kernels_as_well(toy: Toy) -> None:
    toy.chapter("one", toy.count("one"), WAIT)
    engine = toy.start("record")
    until(lambda: toy.runs("one"))
    engine.terminate()
    said, _ = engine.communicate(timeout=30)
    assert engine.returncode == 130
    assert "finished chapters are kept" in said
    assert toy.processes() == []


def test_two_engines_at_once_do_the_work_once(toy: Toy) -> None:
    gate = toy.root / "gate"
    for slug in ("one", "two"):
        toy.chapter(slug, toy.count(slug), gated(gate))
    first = toy.start("record", "--jobs", "2")
    until(lambda: toy.runs("one") and toy.runs("two"))
    second = toy.start("record", "--jobs", "2")
    waiting = [second.stdout.readline() for _ in range(2)]
    assert all("another engine is at it, waiting" in line for line in waiting), waiting
    gate.touch()
    said = [engine.communicate(timeout=60)[0] for engine in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    assert said[0].count("recorded at ci") == 2
    assert said[1].count("recorded by the other engine meanwhile, nothing to do") == 2
    for slug in ("one", "two"):
        assert toy.runs(slug) == 1
        assert toy.page(slug)["nbformat"] == 4
    assert toy.leftovers() == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "page.ipynb"
    write(file, "old")

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def task(scale: str = "ci", recorded: str | None = None, **settings: float) -> Task:
    chapter = Chapter("alpha", "one", Path("/nowhere"))
    source = Source(chapter, [], "One", Settings(**settings), seed=0)
    page = {"scale": recorded} if recorded else None
    return Task(source, scale, {}, "record", ["changed"], recorded=page)


@dataclass(frozen=True)
class Case:
    running: list[Task]
    new: Task
    fits: bool


@pytest.mark.parametrize(
    "case",
    [
        Case([], task(memory_gib=100.0), True),  # alone, whatever it takes
        Case([task(memory_gib=4.0)], task(memory_gib=4.0), True),
        Case([task(memory_gib=4.0)], task(memory_gib=4.5), False),
        Case([task()] * 3, task(), False),  # as many as there are jobs
        Case([task("gpu", gpu_gib=10.0)], task("gpu", gpu_gib=10.0), True),
        Case([task("gpu", gpu_gib=10.0)], task("gpu", gpu_gib=11.0), False),
        Case([task("gpu", gpu_gib=10.0)], task("cpu", gpu_gib=11.0), True),  # needs no GPU at cpu
    ],
)
def test_chapters_share_memory_gpu_and_jobs(case: Case) -> None:
    budget = Budget(jobs=3, memory=8.0, gpu_memory=20.0, cores=6)
    assert fits(case.new, case.running, budget) is case.fits
    assert budget.limits("ci").threads == 2


def test_a_stale_gpu_page_is_kept_where_there_is_no_gpu() -> None:
    on_gpu, on_cpu = task("gpu", recorded="gpu"), task("cpu", recorded="cpu")
    without_gpu([on_gpu, on_cpu])
    assert (on_gpu.action, on_cpu.action) == ("keep", "record")
    assert "no GPU here" in on_gpu.note
