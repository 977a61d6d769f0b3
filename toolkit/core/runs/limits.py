"""A time limit for one job, which holds in any thread and for code that never returns."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

GRACE = 5.0
"""Seconds that a job has to end after it was told to, before its process is ended."""


class JobTimeout(Exception):
    """The job ran longer than its limit."""


@contextlib.contextmanager
def time_limit(
    seconds: float | None, last_words: Callable[[], object] | None = None
) -> Iterator[None]:
    """Raise :class:`JobTimeout` in this thread when a block takes too long.

    Python code is interrupted, by a signal in a main thread and by an exception put into any other.
    Code that does not come back to Python cannot be interrupted, only its process ended.

    Args:
        seconds: The limit; None for no limit.
        last_words: Called before this process is ended, :data:`GRACE` after the limit. None where
            the process must not be ended because it is the caller's own.

    Raises:
        JobTimeout: The block took longer.
    """
    if seconds is None:
        yield
        return
    over = threading.Event()
    timers = []
    by_signal = hasattr(signal, "SIGALRM") and (
        threading.current_thread() is threading.main_thread()
    )
    if by_signal:

        def ring(*_: object) -> None:
            raise JobTimeout(f"it ran longer than its limit of {seconds:g} s")

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    else:
        thread = threading.get_ident()

        def interrupt() -> None:
            if not over.is_set():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread), ctypes.py_object(JobTimeout)
                )

        timers.append(threading.Timer(seconds, interrupt))
    if last_words is not None:

        def end() -> None:
            if not over.is_set():
                last_words()
                os._exit(1)

        timers.append(threading.Timer(seconds + GRACE, end))
        # a thread of C, for code that never lets another Python thread run
        faulthandler.dump_traceback_later(seconds + 2 * GRACE, exit=True, file=sys.__stderr__)
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    except JobTimeout as error:
        raise JobTimeout(f"it ran longer than its limit of {seconds:g} s") from error
    finally:
        over.set()
        if by_signal:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        for timer in timers:
            timer.cancel()
        if last_words is not None:
            faulthandler.cancel_dump_traceback_later()
