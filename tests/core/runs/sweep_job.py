"""Jobs for the tests of sweeps, in a module of their own: worker processes import it.

PyTorch is imported by the one job that needs it, as each of many workers would take seconds for it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
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


class Mute(Exception):
    """An error whose text cannot be told."""

    def __str__(self):
        raise SystemExit


class Stuck(Exception):
    """An error that cannot be sent to another process."""

    def __init__(self):
        super().__init__("stuck")
        self.lock = threading.Lock()


class Foreign(BaseException):
    """An end that is no error."""


def ending(x, how):
    """End in a way that only job 1 has; the others say where they are."""
    if x == 1:
        if how == "mute":
            raise Mute
        if how == "stuck":
            raise Stuck
        if how == "foreign":
            raise Foreign("from elsewhere")
        if how == "cancelled":
            raise asyncio.CancelledError
        if how == "interrupted":
            raise KeyboardInterrupt
        if how == "long":
            raise ValueError("x" * 10**6)
        if how == "half":
            raise ValueError("\udc80")
        if how == "gone":
            os._exit(0)
        os.chdir("/")
        sys.stdout = None
    return {"folder": os.getcwd(), "talks": sys.stdout is not None}


def loading(x):
    """Read data with a worker process, as training jobs do."""
    import torch

    rows = torch.utils.data.TensorDataset(torch.arange(4.0) + x)
    loader = torch.utils.data.DataLoader(rows, batch_size=2, num_workers=1)
    return {"total": float(sum(batch[0].sum() for batch in loader))}
