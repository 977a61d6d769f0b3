"""Several chapters at once, within the machine's memory and GPU, under one progress bar."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import filelock

from book.engine.install import record_chapter, refresh_chapter
from book.engine.plan import Failure, Task, assess, recorded
from book.engine.progress import Progress
from book.engine.project import EngineError, Project, no_room
from book.engine.record import SIZE_LIMIT
from book.engine.watch import Limits, Stopped

MEASURING = threading.Lock()  # a lab uses all cores by itself: one at a time
CELL_SECONDS = {"ci": 300, "cpu": 1800, "gpu": 1800}
CHAPTER_SECONDS = {"ci": 900, "cpu": 7200, "gpu": 7200}


@dataclass(frozen=True)
class Budget:
    """What a run may use.

    Args:
        jobs: chapters at once.
        memory: GiB of memory for all of them.
        gpu_memory: GiB of GPU memory for all of them.
        cores: processor cores, shared out as threads.
        cell_timeout: seconds per cell, None for the scale's own.
        timeout: seconds per chapter, None for the scale's own.
        grace: seconds before the engine ends a cell that its kernel's client could not end.
    """

    jobs: int
    memory: float
    gpu_memory: float
    cores: int
    cell_timeout: int | None = None
    timeout: int | None = None
    grace: float = 20.0

    def limits(self, scale: str) -> Limits:
        return Limits(
            cell=self.cell_timeout or CELL_SECONDS[scale],
            chapter=self.timeout or CHAPTER_SECONDS[scale],
            threads=max(1, self.cores // self.jobs),
            grace=self.grace,
        )


def run_tasks(
    tasks: list[Task], project: Project, budget: Budget, say: Callable[[str], None], force: bool
) -> list[Failure]:
    """Run every task that wants it, as many at once as the budget allows.

    Args:
        tasks: what to do; tasks with action ``keep`` are left alone.
        project: where.
        budget: of the machine.
        say: prints one line.
        force: record even what another engine has just recorded.

    Returns:
        What failed, in the order of the tasks.

    Raises:
        KeyboardInterrupt: the engine was asked to stop; every chapter's process has been ended.
    """
    todo = [t for t in tasks if t.action != "keep"]
    for task in tasks:
        if task.action == "keep":
            _tidy(task)
    # The longest first, so that no long chapter runs alone at the end.
    todo.sort(key=lambda t: -(t.recorded or {}).get("seconds", 0))
    order = {t.chapter.name: place for place, t in enumerate(tasks)}
    progress, stop = Progress(todo, say), threading.Event()
    running: dict[Future, Task] = {}
    failures: list[Failure] = []
    with stopping(stop), ThreadPoolExecutor(budget.jobs, thread_name_prefix="chapter") as pool:
        try:
            while todo or running:
                for task in list(todo):
                    if fits(task, list(running.values()), budget):
                        todo.remove(task)
                        limits = budget.limits(task.scale)
                        arguments = (task, project, limits, progress, stop, force)
                        running[pool.submit(_one, *arguments)] = task
                for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    failure = future.result()
                    failures += [failure] if failure else []
                if stop.is_set():
                    raise KeyboardInterrupt
        except BaseException:
            stop.set()
            raise
        finally:
            progress.close()
    return sorted(failures, key=lambda f: order[f.chapter])


def _tidy(task: Task) -> None:
    """Remove what a run left that was killed between installing its page and cleaning up."""
    chapter = task.chapter
    if not chapter.scratch.exists():
        return
    chapter.lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(chapter.lock, timeout=0):
            shutil.rmtree(chapter.scratch, ignore_errors=True)
    except filelock.Timeout:
        return  # another engine is at work there


def fits(task: Task, running: list[Task], budget: Budget) -> bool:
    """Whether a chapter may start beside those running. Alone, any chapter may."""
    if not running:
        return True
    together = [*running, task]
    memory = sum(t.source.settings.memory_gib for t in together)
    gpu = sum(t.source.settings.gpu_gib for t in together if t.scale == "gpu")
    own_gpu = task.scale != "gpu" or gpu <= budget.gpu_memory
    return len(together) <= budget.jobs and memory <= budget.memory and own_gpu


def _one(
    task: Task,
    project: Project,
    limits: Limits,
    progress: Progress,
    stop: threading.Event,
    force: bool,
) -> Failure | None:
    """One chapter in its thread, under its lock."""
    name = task.chapter.name
    try:
        with _locked(task, progress, stop) as waited:
            other = waited or recorded(task.chapter)[0] != task.recorded
            current = _again(task, project, force) if other else task
            if current.action == "keep":
                progress.line(f"{name}: recorded by the other engine meanwhile, nothing to do")
                return None
            if current.action == "refresh":
                refresh_chapter(current, project)
                progress.line(f"{name}: text refreshed, recorded outputs kept")
                return None
            cell = functools.partial(progress.cell, name)
            measures = current.chapter.lab and current.action == "record"
            if measures:
                progress.line(f"{name}: its lab measures at {current.scale}")
            with MEASURING if measures else contextlib.nullcontext():
                failure = record_chapter(current, project, limits, cell, stop)
            if failure and (words := no_room(project)):
                failure = dataclasses.replace(failure, message=f"{words} ({failure.message})")
            progress.line(f"{name}: FAILED" if failure else _recorded_line(current))
            return failure
    except (Stopped, KeyboardInterrupt):
        return None
    except Exception as error:  # the trouble of one chapter must not end the others
        text = "" if isinstance(error, EngineError) else traceback.format_exc()
        kept = task.chapter.page.is_file()
        words = no_room(project, error) or f"{type(error).__name__}: {error}"
        return Failure(name, words, traceback=text, kept=kept)
    finally:
        progress.done(name)


def _recorded_line(task: Task) -> str:
    size = task.chapter.page.stat().st_size
    done = "recorded" if task.action == "record" else "told again"
    line = f"{task.chapter.name}: {done} at {task.scale}, {size / 1000:.0f} kB"
    if size > SIZE_LIMIT:
        line += f"; WARNING: over {SIZE_LIMIT // 1000} kB, make its figures lighter"
    return line


def _again(task: Task, project: Project, force: bool) -> Task:
    """The task as it stands after another engine held the chapter."""
    measure = task.action == "record"
    scale = task.scale if measure else None
    chapters = [task.chapter]
    tasks, failures = assess(project, chapters, scale=scale, force=force, measure=measure)
    if failures:
        raise EngineError(failures[0].message)
    return tasks[0]


@contextlib.contextmanager
def _locked(task: Task, progress: Progress, stop: threading.Event) -> Iterator[bool]:
    """Hold the chapter's lock; yields whether another engine had to be waited for."""
    path = task.chapter.lock
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, waited = filelock.FileLock(path), False
    while True:
        try:
            lock.acquire(timeout=0 if not waited else 0.5)
            break
        except filelock.Timeout:
            if not waited:
                progress.line(f"{task.chapter.name}: another engine is at it, waiting")
            waited = True
            if stop.is_set():
                raise Stopped from None
    try:
        yield waited
    finally:
        lock.release()


@contextlib.contextmanager
def stopping(stop: threading.Event | None = None) -> Iterator[threading.Event]:
    """Let an ordinary kill end the chapters' processes as Ctrl-C does: it sets ``stop``."""
    stop = stop or threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
