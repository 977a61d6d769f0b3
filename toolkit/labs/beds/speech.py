"""Spoken digits by speakers whom the base has never heard: log-mel frames and a small transformer.

Six speakers, three splits that leave two of them out. A base learned from the other four; a run
adapts it to the two with ten recordings of each digit and speaker, and is judged on 600 others.
Pair arms within a split: the splits differ more than the arms do.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core import data
from toolkit.core.seeds import generator
from toolkit.core.train import rates
from toolkit.core.train.fit import fit
from toolkit.labs.beds import arms, bases, sounds
from toolkit.labs.beds.arms import Arm
from toolkit.labs.beds.networks import Sounds, build

JUDGED = "log-loss (nats), accuracy (%)"
TARGETS = "blocks.*"
"""A method sits on every linear layer of the blocks."""
START = {"head": 1.6e-2, "lora": 8e-3, "full": 1e-3, "full_twice": 1e-3}
"""Middle of the first rates tried."""
SPLITS = (0, 1, 2)
"""Split k leaves out speakers 2k and 2k + 1 in alphabetical order."""


@dataclass(frozen=True)
class Size:
    """Numbers of one scale. ``pool``: recordings of a digit and speaker that may be trained on or
    validated with, ``examples`` of which a seed draws for training; the others are the test."""

    width: int
    depth: int
    pretraining: int
    batch: int
    steps: int
    pool: int
    examples: int


SIZES = {
    "ci": Size(16, 1, 60, 16, 20, 4, 2),
    "cpu": Size(64, 4, 1500, 32, 150, 20, 10),
}


def size(scale: str) -> Size:
    """The sizes of a scale; ``gpu`` takes those of ``cpu``.

    Raises:
        ValueError: an unknown scale.
    """
    return SIZES[arms.sizes_of(scale)]


class Recordings(NamedTuple):
    """``frames`` (n, 48, 32), ``digit``, ``speaker`` and ``index``: (n,) int64; ``names``."""

    frames: Tensor
    digit: Tensor
    speaker: Tensor
    index: Tensor
    names: tuple[str, ...]


@functools.lru_cache(maxsize=2)
def load(scale: str = "cpu") -> Recordings:
    """All 3,000 recordings; at ``ci`` 360 generated tones through the same frames.

    Raises:
        ValueError: an unknown scale.
        toolkit.core.data.DataError: the recordings are nowhere to be found.
    """
    size(scale)
    found = sounds.tones() if scale == "ci" else data.load("fsdd")
    names, speaker = np.unique(found.speaker, return_inverse=True)
    digit, who, index = (
        torch.from_numpy(np.asarray(a).astype(np.int64))
        for a in (found.digit, speaker, found.index)
    )
    made = sounds.frames(found.recordings(), found.sample_rate)
    return Recordings(made, digit, who, index, tuple(str(name) for name in names))


def out(split: int) -> tuple[int, int]:
    """The two speakers that a split leaves out of the base.

    Raises:
        ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split: choose 0, 1 or 2, got {split!r}")
    return 2 * split, 2 * split + 1


def rows(split: int, seed: int, scale: str = "cpu") -> dict[str, Tensor]:
    """Places of the recordings in ``base``, ``train``, ``validation`` and ``test``.

    ``base``: the four other speakers. Of the two left out, recordings with an index below the
    pool's size go to ``train`` or ``validation`` as the seed draws, digit by digit and speaker by
    speaker; the rest is ``test``, the same for every seed.
    """
    this, every = size(scale), load(scale)
    held = torch.isin(every.speaker, torch.tensor(out(split)))
    pool = held & (every.index < this.pool)
    parts: dict[str, list[Tensor]] = {"train": [], "validation": []}
    draws = generator(seed, "recordings")
    for speaker in out(split):
        for digit in range(10):
            own = (pool & (every.speaker == speaker) & (every.digit == digit)).nonzero()[:, 0]
            own = own[torch.randperm(len(own), generator=draws)]
            parts["train"].append(own[: this.examples])
            parts["validation"].append(own[this.examples :])
    return {
        "base": (~held).nonzero()[:, 0],
        **{part: torch.cat(found) for part, found in parts.items()},
        "test": (held & ~pool).nonzero()[:, 0],
    }


def batches(
    every: Recordings, chosen: Tensor, steps: int, batch: int, draws: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """``steps`` varied batches of frames and digits; each recording once before any comes again."""
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(left) < batch:
            left = torch.cat([left, chosen[torch.randperm(len(chosen), generator=draws)]])
        some, left = left[:batch], left[batch:]
        yield sounds.varied(every.frames[some], draws), every.digit[some]


def pretrain(split: int = 0, scale: str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The base of a split: Adam on four speakers, rate 1e-3 falling along half a cosine."""
    this, every, draws = size(scale), load(scale), bases.seeded(split)
    model = build(functools.partial(empty, scale), draws)
    chosen = rows(split, 0, scale)
    fit(
        model, None, 1e-3 if scale != "ci" else 1e-2, 0,
        batches(every, chosen["base"], this.pretraining, this.batch, draws), F.cross_entropy,
        steps=this.pretraining, decay=lambda step, of: arms.warm(step, of) * rates.cosine(step, of),
    )  # fmt: skip
    test = chosen["test"]
    reached = arms.judged(arms.scores(bases.restored(model), every.frames[test]), every.digit[test])
    who = " and ".join(every.names[speaker] for speaker in out(split))
    quantity = f"accuracy (%) on {len(test)} recordings of {who}, unheard"
    return model, {"quantity": quantity, "reached": reached["accuracy"]}


def empty(scale: str = "cpu") -> Sounds:
    """The network without its training: 24 tokens of two frames."""
    this = size(scale)
    return Sounds(sounds.BANDS, sounds.FRAMES, 2, this.width, this.depth, 4, 10)


@functools.lru_cache(maxsize=4)
def _base(split: int, scale: str) -> nn.Module:
    if scale == "ci":
        return pretrain(split, "ci")[0].eval()
    return bases.fill(empty(scale), f"speech_{split}")


def network(split: int = 0, scale: str = "cpu") -> Any:
    """A fresh copy of the base of a split."""
    out(split)
    return arms.fresh(_base(split, scale))


def train(
    arm: str | Arm,
    rate: float,
    seed: int,
    *,
    split: int = 0,
    scale: str = "cpu",
    rank: int = 8,
    steps: int | None = None,
    beside: tuple[str, ...] = ("head",),
    parts: tuple[str, ...] = ("validation", "test"),
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Adapt the base of a split to its two speakers.

    Every seed draws its own ten recordings of each digit and speaker, their order and how they are
    varied; the rate falls along half a cosine after the warm-up.

    Args:
        arm: a reference arm by name, or :class:`~toolkit.labs.beds.arms.Arm` with any method.
        rate: learning rate at its highest.
        seed: of the recordings, their order, their variation and the method's start.
        split: 0, 1 or 2.
        scale: "ci", "cpu" or "gpu".
        rank: of LoRA.
        steps: instead of the scale's.
        beside: parameters that train beside a method.
        parts: which of "validation" and "test" to judge.

    Returns:
        The network, the method's handle or None, and a record: ``validation`` and ``test`` log-loss
        in nats, ``validation_accuracy`` and ``test_accuracy`` in percent, ``trained`` numbers.
    """
    torch.set_num_threads(1)
    arm, this, every = arms.named(arm, rank), size(scale), load(scale)
    model, chosen = network(split, scale), rows(split, seed, scale)

    def draw(count: int) -> Iterator[tuple[Tensor, Tensor]]:
        return batches(every, chosen["train"], count, this.batch, generator(seed, "order"))

    adapted, trained = arms.learn(
        model, arm, rate, seed, draw, F.cross_entropy, steps=steps or this.steps,
        decay=rates.cosine, targets=TARGETS, beside=beside,
    )  # fmt: skip
    record: dict[str, Any] = {}
    for part in parts:
        found = arms.judged(
            arms.scores(model, every.frames[chosen[part]]), every.digit[chosen[part]]
        )
        record |= {part: found["loss"], f"{part}_accuracy": found["accuracy"]}
    return model, adapted, record | {"trained": trained}


def adapt(
    arm: str, rate: float, seed: int, scale: str = "cpu", rank: int = 8, split: int = 0,
    parts: tuple[str, ...] = ("validation", "test"),
) -> dict[str, Any]:  # fmt: skip
    """A reference arm on one split as a job; see :func:`train`."""
    return train(arm, rate, seed, split=split, scale=scale, rank=rank, parts=tuple(parts))[2]
