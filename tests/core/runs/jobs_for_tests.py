"""Jobs for the tests of runs, in a module of their own: worker processes import it."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import time
from pathlib import Path


def _mark(marks: str | None, name: str) -> None:
    if marks:
        Path(marks, f"{name}.{time.monotonic_ns()}").touch()


def bowl(arm: str, rate: float, seed: int, best: float = 0.01, marks: str | None = None):
    """A loss that is least at one rate."""
    _mark(marks, f"{arm}-{rate:g}-{seed}")
    return {"validation": math.log(rate / best) ** 2 + 0.001 * seed, "test": float(seed)}


def other_bowl(arm: str, rate: float, seed: int, best: float = 0.01, marks: str | None = None):
    """The same for another arm."""
    return bowl(arm, rate, seed, best, marks)


def troubled(seed: int, trouble: str, marks: str | None = None):
    """A job with seed 1 in trouble."""
    _mark(marks, str(seed))
    if seed == 1:
        if trouble == "raises":
            raise ArithmeticError("no answer")
        if trouble == "diverges":
            raise FloatingPointError("the loss is not finite")
        if trouble == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if trouble == "never ends":
            while True:
                time.sleep(0.01)
        if trouble == "hangs outside Python":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            ctypes.CDLL(None).sleep(600)
        if trouble == "no number":
            return {"value": object()}
        if trouble == "nested":
            return {"value": {"deep": 1.0}}
        if trouble == "several rows":
            return [{"value": 1.0}, {"value": 2.0}]
    return {"value": seed / 3, "curve": [0.5, float("inf")], "bad": float("nan")}
