"""A process with all it started, and the end of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable

import psutil
from psutil import Process


def of(pid: int) -> dict[int, Process]:
    """The process and all it started, kernels in their own sessions included."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = Process(pid)
        return {p.pid: p for p in (process, *process.children(recursive=True))}
    return {}


def end(processes: Iterable[Process], seconds: float = 10) -> None:
    """Kill processes and return when they are gone, so that nobody meets one that still dies."""
    for process in (processes := list(processes)):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()  # psutil refuses when the number was given to another process
    deadline = time.monotonic() + seconds
    while any(map(_lives, processes)) and time.monotonic() < deadline:
        time.sleep(0.01)


def _lives(process: Process) -> bool:
    # one that died waits as a zombie for its parent, which may never ask
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
