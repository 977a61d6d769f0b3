"""Digits under a haze, a small network that never saw any, and features learned without labels."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.core import nets
from toolkit.core.seeds import generator
from toolkit.core.train import rates
from toolkit.core.train.fit import fit
from toolkit.labs.beds import arms, images

SIDE, CLASSES = 28, 10
HAZE = 0.6
"""Grey of the deepest haze."""
LEFT = 0.4
"""What the haze leaves of a digit's contrast."""
KINDS = ("own", "same")
"""A haze of each image's own depth, even over the image; and one for all that grows to a side."""


@dataclass(frozen=True)
class Size:
    """Numbers of one scale.

    Args:
        hidden: units of the black box.
        pretraining: its steps.
        shots: labelled images of each class.
        components: features that the encoder gives.
        steps: of a run with two directions a step.
        marks: steps after which a run is judged.
        judged: images that a run is judged on.
    """

    hidden: int
    pretraining: int
    shots: int
    components: int
    steps: int
    marks: tuple[int, ...]
    judged: int


SIZES = {
    "ci": Size(32, 100, 4, 100, 6, (2, 4, 6), 100),
    "cpu": Size(128, 800, 16, 100, 150, (5, 15, 50, 150), 1000),
}


def size(scale: str) -> Size:
    """The sizes of a scale; ``gpu`` takes those of ``cpu``."""
    return SIZES[arms.sizes_of(scale)]


class Task(NamedTuple):
    """What one seed works on: hazy images (n, 1, 28, 28) in [0, 1] and labels."""

    x: Tensor
    y: Tensor
    x_judged: Tensor
    y_judged: Tensor


@functools.lru_cache(maxsize=2)
def network(scale: str) -> Any:
    """The classifier that will be the black box: a small MLP, trained on clean digits."""
    this, parts, draws = size(scale), images.load(scale), generator(0, "black box")
    model = nets.mlp([SIDE * SIDE, this.hidden, CLASSES], generator=draws)
    x, y = parts.pool

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(this.pretraining):
            rows = torch.randint(len(y), (64,), generator=draws)
            yield images.moved(x[rows], 2, draws).flatten(1), y[rows]

    fit(model, None, 4e-3, 0, stream(), F.cross_entropy, steps=this.pretraining,
        decay=lambda step, of: arms.warm(step, of) * rates.cosine(step, of))  # fmt: skip
    return model.eval().requires_grad_(False)


def answers(scale: str) -> Any:
    """What the service offers: images (n, 1, 28, 28) to probabilities (n, 10)."""
    model = network(scale)
    return lambda x: model(x.flatten(1)).softmax(1)


@functools.lru_cache(maxsize=2)
def _components(scale: str) -> tuple[Tensor, Tensor]:
    x = images.load(scale).pool[0][:5000].flatten(1)
    mean = x.mean(0)
    values, axes = torch.linalg.eigh((x - mean).double().T.cov())
    kept = slice(-size(scale).components, None)
    return mean, (axes[:, kept] / values[kept].sqrt()).T.flip(0).float()


def encode(x: Tensor, scale: str) -> Tensor:
    """Principal components of clean unlabelled digits, each of spread 1 there: (n, components)."""
    mean, axes = _components(scale)
    return (x.flatten(1) - mean) @ axes.T


def hazed(x: Tensor, haze: Tensor) -> Tensor:
    """Images (n, 28, 28) under a haze (n or 1, 28 or 1, 28 or 1), all within [0, 1]."""
    return haze + LEFT * x


def haze(count: int, kind: str, seed: int, stream: str) -> Tensor:
    """Haze of ``count`` images: each its own depth, or one that grows to a side of the seed's."""
    if kind == "own":
        return HAZE * torch.rand(count, 1, 1, generator=generator(seed, "haze", stream))
    angle = 2 * math.pi * torch.rand((), generator=generator(seed, "side"))
    line = torch.linspace(-1, 1, SIDE)
    along = angle.cos() * line[:, None] + angle.sin() * line
    return HAZE * (0.5 + 0.5 * along).clamp(0, 1)[None]


def task(seed: int, kind: str, part: str, scale: str) -> Task:
    """Few labelled hazy images of each class, and those that a run is judged on.

    Args:
        seed: of both draws.
        kind: of :data:`KINDS`.
        part: ``validation`` or ``test``.
        scale: of the sizes.
    """
    this, every = size(scale), images.load(scale)
    x, y = every.pool
    order = torch.randperm(len(y), generator=generator(seed, "examples"))
    chosen = torch.cat([order[y[order] == c][: this.shots] for c in range(CLASSES)])
    held, labels = getattr(every, part)
    drawn = torch.randperm(len(labels), generator=generator(seed, part))[: this.judged]
    made = [
        hazed(images_, haze(len(images_), kind, seed, name))[:, None]
        for images_, name in ((x[chosen], "few"), (held[drawn], part))
    ]
    return Task(made[0], y[chosen], made[1], labels[drawn])
