"""How much to compute: `ci`, `cpu` or `gpu`.

A chapter names its scale once and picks every size from it, so that the same cells run in
seconds while testing, in minutes on a laptop, and in earnest on a GPU.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")

SCALES = ("ci", "cpu", "gpu")
_BUDGET = {"ci": 20, "cpu": 600, "gpu": 120}


@dataclass(frozen=True)
class Scale:
    """One scale.

    Attributes:
        name: `ci`, `cpu` or `gpu`.
        device: where the chapter's tensors live.
        dtype: the type of its parameters.
        threads: CPU threads a chapter may count on.
        seconds: the time a whole chapter should take at most.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    threads: int
    seconds: int

    def pick(self, *, ci: T, cpu: T, gpu: T) -> T:
        """The value for this scale."""
        return {"ci": ci, "cpu": cpu, "gpu": gpu}[self.name]


def scale(name: str) -> Scale:
    """The scale of that name.

    The environment variable TOOLKIT_SCALE, when set, wins over the argument: recorded
    chapters are run again at `ci` without being edited. Threads, seeds and the default
    device stay as they are.

    Args:
        name: `ci`, `cpu` or `gpu`.

    Raises:
        ValueError: any other name; the message suggests the nearest.
        RuntimeError: `gpu` on a machine where PyTorch sees no CUDA device.
    """
    forced = os.environ.get("TOOLKIT_SCALE")
    if forced:
        name = forced
    if name not in SCALES:
        near = difflib.get_close_matches(str(name).lower(), SCALES, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        where = " (from the environment variable TOOLKIT_SCALE)" if forced else ""
        raise ValueError(
            f"SCALE: unknown scale {name!r}{where}.{hint} Choose one of {', '.join(SCALES)}."
        )
    if name == "gpu" and not torch.cuda.is_available():
        raise RuntimeError(
            'SCALE: "gpu" needs a CUDA device and PyTorch sees none. Choose "cpu", or on Colab '
            "pick Runtime > Change runtime type > GPU and run again."
        )
    # Machines lend containers fewer cores than they have; the affinity says how many.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = min(2, cores or 1) if name == "ci" else (cores or 1)
    device = torch.device("cuda" if name == "gpu" else "cpu")
    return Scale(name, device, torch.float32, threads, _BUDGET[name])
