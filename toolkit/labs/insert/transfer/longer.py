"""The same task for more steps: does the random start catch up?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from toolkit.core.seeds import generator
from toolkit.labs.beds import arms
from toolkit.labs.insert.transfer import world


def course(
    arm: str, shots: int, rate: float, head_rate: float, seed: int, scale: str, times: int
) -> dict[str, Any]:
    """Accuracy in per cent after so many times the usual steps, on the seed's half of the test."""
    model, adapted = world.prepared(arm, seed, scale)
    x, y = world.shots(seed, shots, scale)
    this, order = world.size(scale), generator(seed, "order")

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(times * this.steps):
            rows = torch.randperm(len(y), generator=order)[: this.batch]
            yield x[rows], y[rows]

    world.ended(adapted, model, times * this.steps, rate, head_rate, batches())
    images_, labels = world.judges(seed, scale)
    return {"accuracy": arms.judged(arms.scores(model, images_), labels)["accuracy"]}
