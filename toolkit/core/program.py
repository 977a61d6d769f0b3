"""Programs that end in good order when nobody reads what they print."""

from __future__ import annotations

import gc
import os
import select
import sys
from collections.abc import Callable
from io import UnsupportedOperation
from typing import TextIO

from toolkit.core.io import FULL

OBJECTS = 10_000
"""New objects after which the garbage collector looks at the young ones. Python's hundreds cost a
fifth of the time in which modules are imported and syntax trees are read."""


def run_program(main: Callable[[], int | None]) -> int:
    """Run a program and hand over all that it printed; returns its exit code.

    A reader that stops reading, as in ``| head -1``, ends it without a word and with the code
    that the shell gives programs ended by a closed pipe.

    The garbage collector of the process looks less often from then on: see :data:`OBJECTS`.
    """
    gc.set_threshold(OBJECTS, *gc.get_threshold()[1:])
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]
    try:
        try:
            return main() or 0
        finally:
            for stream in streams:
                stream.flush()
    except OSError as error:
        closed = [stream for stream in streams if _closed(stream)]
        full = error.errno in FULL and error.filename is None  # as what a stream raises
        if not closed and not full:
            raise
        for stream in closed:  # or the interpreter would fail once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):
            return 128 + 13  # SIGPIPE
        words = f"the output, or a file, cannot be written: {error.strerror}"
        print(f"error: {words}", file=sys.stderr)
        return 1


def _closed(stream: TextIO) -> bool:
    """Whether nothing can be written to a stream any more."""
    try:
        stream.flush()
        if not hasattr(select, "poll"):  # Windows
            return False
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except OSError as error:
        return not isinstance(error, UnsupportedOperation)  # a stream of a notebook has no number
