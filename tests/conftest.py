"""Shared by all tests: helpers are importable as ``tests.*``, and runs are reproducible."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest

# before torch or numpy is imported: processes work beside each other, each with one thread
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
    os.environ.setdefault(name, "1")

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests import budgets  # noqa: E402  (needs the path)


def pytest_configure(config: pytest.Config) -> None:
    """Sum what tests take, and hold the budgets of ``pyproject.toml``."""
    budgets.pytest_configure(config)


def pytest_collection_finish() -> None:
    """What is imported by now stays to the end, so garbage is not looked for in it again."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)  # Python looks for young garbage at every 700 new objects


@pytest.fixture(autouse=True)
def _fixed_global_seed():
    """Base models are drawn from torch's global generator; every test starts it anew."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    # torch.manual_seed also asks every kind of accelerator that was not started to remember the
    # seed, with a trace of the stack: a millisecond for each of thousands of tests
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)
