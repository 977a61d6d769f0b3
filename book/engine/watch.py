"""Keeping an eye on one running chapter: its process, its kernel and its time."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from book.engine import family, record
from book.engine.plan import Task
from book.engine.project import Project
from toolkit.core import io

ENGINE_HOME = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "LOKY_MAX_CPU_COUNT",
)


@dataclass(frozen=True)
class Limits:
    """Time limits and threads of one chapter.

    Args:
        cell: seconds one cell may take.
        chapter: seconds the whole chapter may take.
        threads: threads its process may use.
        grace: seconds beyond ``cell`` before the engine itself ends a cell that the kernel's
            client could not end.
    """

    cell: int
    chapter: int
    threads: int
    grace: float = 20.0


@dataclass(frozen=True)
class Place:
    """Where a run keeps its files.

    Args:
        scratch: working folder, emptied by whoever owns it.
        results: folder that results are written to, or read from.
        tell: whether the chapter may only read results, not measure.
        home: a folder to put before all others that Python imports from; None for none.
    """

    scratch: Path
    results: Path
    tell: bool = False
    home: Path | None = None

    @classmethod
    def inside(cls, scratch: Path, told: Path | None = None, home: Path | None = None) -> Place:
        """A place whose results lie in the scratch folder, or which tells those in ``told``."""
        return cls(scratch, told or scratch / "results", told is not None, home)


class Stopped(Exception):
    """The engine was asked to stop while the chapter ran."""


def run_chapter(
    task: Task,
    project: Project,
    limits: Limits,
    place: Place,
    progress: Callable[[int], None],
    stop: threading.Event,
) -> dict[str, Any]:
    """Execute a chapter in a process of its own and return what it gave.

    Args:
        task: what to run.
        project: whose toolkit it imports.
        limits: time and threads.
        place: where it works and keeps its results.
        progress: called with the number of the code cell that starts.
        stop: when set, the run is ended and :class:`Stopped` raised.

    Returns:
        What :func:`book.engine.worker.run` returns, or ``failed`` when the process was ended.
    """
    temporary = Path(tempfile.gettempdir())  # addresses of IPC sockets must be short
    io.sweep(temporary)
    with io.scratch(temporary, "k") as sockets:
        return _supervise(task, project, limits, place, progress, stop, sockets)


def _supervise(
    task: Task,
    project: Project,
    limits: Limits,
    place: Place,
    progress: Callable[[int], None],
    stop: threading.Event,
    sockets: Path,
) -> dict[str, Any]:
    scratch = place.scratch
    (scratch / "cwd").mkdir(parents=True, exist_ok=True)
    place.results.mkdir(parents=True, exist_ok=True)
    notebook = scratch / "chapter.ipynb"
    notebook.write_text(record.text_of(record.prepared(task.source, project.repository)), "utf-8")
    job = {
        "notebook": str(notebook),
        "scratch": str(scratch),
        "cwd": str(scratch / "cwd"),
        "sockets": str(sockets),
        "slug": task.chapter.slug,
        "scale": task.scale,
        "seed": task.source.seed,
        "cell_timeout": limits.cell,
        "parent": os.getpid(),
        "paper": task.source.settings.paper,
        "code": task.source.settings.code,
    }
    (scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")
    read_end, write_end = os.pipe()
    with open(scratch / "log", "wb") as log, os.fdopen(read_end, "rb", buffering=0) as events:
        try:
            process = subprocess.Popen(
                # by its path, not as a module: the project may hold an engine of another time
                [sys.executable, "-P", WORKER, scratch / "job.json", str(write_end)],
                cwd=scratch / "cwd",
                env=_environment(project, place, limits.threads),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[write_end],
                start_new_session=True,
            )
        finally:
            os.close(write_end)
        problem = _watch(process, events, limits, progress, stop)
    result = scratch / "result.json"
    if problem is not None:
        return {"failed": problem}
    if process.returncode or not result.is_file():
        words = (scratch / "log").read_text(encoding="utf-8", errors="replace").strip()
        last = words.splitlines()[-1] if words else f"exit code {process.returncode}"
        return {"failed": {"message": f"its process ended early: {last}", "traceback": words}}
    return json.loads(result.read_text(encoding="utf-8"))


def _environment(project: Project, place: Place, threads: int) -> dict[str, str]:
    dropped = ("TOOLKIT_SCALE", "TOOLKIT_TELL", "MPLBACKEND")
    env = {k: v for k, v in os.environ.items() if k not in dropped}
    paths = [str(place.home or ""), str(project.root), str(ENGINE_HOME), env.get("PYTHONPATH", "")]
    return {
        **env,
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
        **({"TOOLKIT_TELL": "1"} if place.tell else {}),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(p for p in paths if p)),
        "PYTHONHASHSEED": "0",
        "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel of this environment, not of the user's home
        "TOKENIZERS_PARALLELISM": "false",
        "TOOLKIT_RESULTS": str(place.results),
    }


def _watch(
    process: subprocess.Popen,
    events: Any,
    limits: Limits,
    progress: Callable[[int], None],
    stop: threading.Event,
) -> dict[str, Any] | None:
    """Follow a run to its end; say what was wrong if the engine had to end it."""
    started = cell_started = time.monotonic()
    cell, buffer, members = 0, b"", {}
    with selectors.DefaultSelector() as selector:
        selector.register(events, selectors.EVENT_READ)
        try:
            while True:
                members.update(family.of(process.pid))
                if selector.select(timeout=0.5):
                    chunk = os.read(events.fileno(), 65536)
                    if not chunk:  # the worker closed its end: it has finished or died
                        process.wait(timeout=60)
                        return None
                    buffer += chunk
                    *lines, buffer = buffer.split(b"\n")
                    for line in lines:
                        cell, cell_started = json.loads(line)["cell"], time.monotonic()
                        progress(cell)
                now = time.monotonic()
                if stop.is_set():
                    raise Stopped
                if now - started > limits.chapter:
                    words = f"ended: the chapter ran longer than {limits.chapter} s"
                    return {"message": words, "cell": cell or None}
                if cell and now - cell_started > limits.cell + limits.grace:
                    words = f"ended: it ran longer than the cell timeout of {limits.cell} s"
                    return {"message": words, "cell": cell}
        except subprocess.TimeoutExpired:
            return {"message": "ended: its process hung after its last cell"}
        finally:
            members.update(family.of(process.pid))
            family.end(members.values())
            process.wait()
