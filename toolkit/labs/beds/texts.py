"""SST-2 through the two upper blocks of MiniLM, on its whole test set of 1,821 sentences.

A thin layer over :mod:`toolkit.labs.beds.sentences`: the frozen blocks, the loop and the head with
a rate of its own are told there. Judged by log-loss and accuracy.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import nn

from toolkit.labs.beds import arms
from toolkit.labs.beds import sentences as text_beds
from toolkit.labs.beds.arms import Arm

JUDGED = "log-loss (nats), accuracy (%)"
START = {"head": 1.6e-2, "lora": 4e-3, "full": 2.5e-4, "full_twice": 2.5e-4}
"""Middle of the first rates tried; for "head" the rate of the head, 1e-3 in the other arms."""
SPLITS = (0,)
STEPS = {"ci": 6, "cpu": 80}
SIZES = {
    "ci": {"train": 20, "validation": 8, "test": 12, "tiny": True},
    "cpu": {"train": 1280, "validation": 800, "test": 1821, "tiny": False},
}


def load(scale: str = "cpu", seed: int = 0) -> text_beds.TextTask:
    """1,280 training sentences with as many of each label and 800 validation sentences, drawn anew
    for every seed, and all 1,821 test sentences; at ``ci`` up to 20, 8 and 12 generated ones.

    Raises:
        ValueError: an unknown scale.
        toolkit.core.data.DataError, PretrainedError: data or model are nowhere to be found.
    """
    sizes = SIZES[arms.sizes_of(scale)] | {"test": 1}  # the test part comes below
    task = text_beds.text_task("sst2", seed=seed, **sizes)
    return task._replace(test=_test(sizes["tiny"]))


@functools.lru_cache(maxsize=2)
def _test(tiny: bool) -> text_beds.Sentences:
    # the same for every seed, and a third of a run's time
    return text_beds.below(text_beds.tables("sst2", tiny)["test"], tiny=tiny)


def network(scale: str = "cpu") -> text_beds.UpperBlocks:
    """A fresh copy of the two upper blocks."""
    return text_beds.upper_blocks(arms.sizes_of(scale) == "ci")


def train(
    arm: str | Arm,
    rate: float,
    seed: int,
    *,
    scale: str = "cpu",
    rank: int = 8,
    steps: int | None = None,
    parts: tuple[str, ...] = ("validation", "test"),
    device: str = "cpu",
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Adapt the two blocks; see :func:`toolkit.labs.beds.sentences.text_train`.

    Args:
        arm: a reference arm by name, or :class:`~toolkit.labs.beds.arms.Arm` with any method.
            "nothing" is a head of zeros: log 2 nats, and always the same answer. Every method sits
            on the twelve linear layers of the blocks.
        rate: learning rate at its highest, of the blocks, and for "head" of the head.
        seed: of the sentences, the head, the method's start and the order.
        scale: "ci", "cpu" or "gpu".
        rank: of LoRA.
        steps: instead of the scale's.
        parts: which of "validation" and "test" to judge.
        device: where to train.

    Returns:
        The blocks, the method's handle or None, and a record: ``validation`` and ``test`` log-loss
        in nats, ``validation_accuracy`` and ``test_accuracy`` in percent, ``trained`` numbers, the
        head's included.

    Raises:
        ValueError: an unknown arm or scale, or an arm with layers of its own.
    """
    torch.set_num_threads(1)
    arm, task = arms.named(arm, rank), load(scale, seed)
    if arm.targets is not None:
        raise ValueError("targets: this bed adapts the twelve layers of its blocks, give none")
    if arm.part == "nothing":
        model, labels = network(scale), {part: getattr(task, part).labels for part in parts}
        found = {part: arms.judged(torch.zeros(len(y), 2), y) for part, y in labels.items()}
        record = {part: found[part]["loss"] for part in parts}
        record |= {f"{part}_accuracy": found[part]["accuracy"] for part in parts}
        return model, None, record | {"trained": 0}
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"rate: must be positive and finite, got {rate}")
    alone = arm.part == "head"
    model, adapted, raw = text_beds.text_train(
        task, arm.method, rate, seed,
        steps=max(1, round((steps or STEPS[arms.sizes_of(scale)]) * arm.longer)),
        options=dict(arm.options), parts=parts, device=device, blocks=not alone, loss=True,
        head_rate=rate if alone else text_beds.HEAD_RATE,
    )  # fmt: skip
    record = {part: raw[f"{part}_loss"] for part in parts}
    record |= {f"{part}_accuracy": raw[part] for part in parts}
    head = 2 * (task.train.hidden[0].shape[1] + 1)
    return model, adapted, record | {"trained": raw["trained"] + head}


def adapt(
    arm: str, rate: float, seed: int, scale: str = "cpu", rank: int = 8, split: int = 0,
    parts: tuple[str, ...] = ("validation", "test"),
) -> dict[str, Any]:  # fmt: skip
    """A reference arm as a job; see :func:`train`. There is one split, 0."""
    return train(arm, rate, seed, scale=scale, rank=rank, parts=tuple(parts))[2]
