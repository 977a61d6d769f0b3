"""DistributedDataParallel on two gloo processes: one pair for all methods."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.contracts.rooms import cases
from tests.pairs import run_pair


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_train_as_one(tmp_path):
    run_pair(Path(__file__).parent / "two_processes.py", tmp_path)
    verdicts = json.loads((tmp_path / "verdicts.json").read_text())
    sound = {k: v for k, v in verdicts.items() if not k.startswith("broken")}
    broken = {k: v for k, v in verdicts.items() if k.startswith("broken")}
    slugs = {case.method.info.slug for case in cases(1)}
    assert {k.split()[0] for k in sound} == slugs
    assert set(sound.values()) == {"same"}, sound
    assert broken
    assert "same" not in broken.values(), broken
