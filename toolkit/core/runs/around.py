"""What surrounds a job in its process: children it may have, and what it changed, put back."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Iterator
from typing import Any

LONGEST = 10_000
"""Characters that are kept of what an error says."""


@contextlib.contextmanager
def job_in_process() -> Iterator[None]:
    """Let a block start processes, as DataLoader workers are; put folder and streams back after."""
    streams = sys.stdin, sys.stdout, sys.stderr
    try:
        folder = os.getcwd()
    except FileNotFoundError:  # it was removed
        folder = None
    process: Any = multiprocessing.current_process()
    # loky makes itself the start method of its workers, and its processes are not those of PyTorch;
    # pools of multiprocessing and of Dask forbid their workers children, which are ended with them
    method, daemon = multiprocessing.get_start_method(allow_none=True), process.daemon
    foreign = method is not None and method.startswith("loky")
    if foreign:
        usual = multiprocessing.get_all_start_methods()[0]
        multiprocessing.set_start_method(usual, force=True)
    if daemon:
        process._config["daemon"] = False
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams
        if daemon:
            process._config["daemon"] = True
        if foreign:
            multiprocessing.set_start_method(method, force=True)
        if folder is not None:
            with contextlib.suppress(OSError):  # removed by the job: the next one begins elsewhere
                os.chdir(folder)


def words_of(error: BaseException) -> str:
    """Kind and text of an error, also where asking for its text fails, and of limited length."""
    kind = type(error).__name__
    try:
        said = str(error)
    except BaseException as inner:  # what a text raises must not end more than its job
        said = f"(its text cannot be told: {type(inner).__name__})"
    if len(said) > LONGEST:
        said = f"{said[:LONGEST]} ... ({len(said)} characters)"
    # a lone half of a character of UTF-16 cannot be written
    return f"{kind}: {said}".encode("utf-8", "backslashreplace").decode("utf-8")
