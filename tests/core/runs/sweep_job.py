"""Jobs for the tests of sweeps, in a module of their own: worker processes import it."""

from __future__ import annotations

import os
import signal
import time
import uuid
from pathlib import Path


def square(x, scale=1.0):
    return {"value": x * x * scale, "even": x % 2 == 0}


def marked(x, marks, nap=0.0, bad=None):
    """Leave a file for each call, with the process in its name, then sleep, then answer."""
    begun = Path(marks) / f"{x}.{os.getpid()}.{uuid.uuid4().hex}"
    begun.touch()
    time.sleep(nap)
    if x == bad:
        raise ArithmeticError(f"no answer for {x}")
    begun.with_suffix(".end").touch()
    return {"value": x / 3, "label": f"job {x}"}


def ordered(x, marks, after):
    """End only when ``after`` other jobs have ended."""
    while len(list(Path(marks).glob("*.end"))) < after:
        time.sleep(0.01)
    (Path(marks) / f"{x}.end").touch()
    return {"value": x / 3, "turn": after}


def deadly(x, marks, killer, once=False):
    """Die without a word where ``x`` is the killer, each time or only the first time."""
    (Path(marks) / f"{x}.{uuid.uuid4().hex}").touch()
    if x == killer and not (once and len(list(Path(marks).glob(f"{x}.*"))) > 1):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
    return {"value": x}
