"""Shared by all tests: helpers are importable as ``tests.*``, and runs are reproducible."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


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
