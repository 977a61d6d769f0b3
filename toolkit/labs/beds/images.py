"""Handwritten digits of 28 x 28 pixels that are turned or inverted: a small CNN and a small ViT.

The bases read upright digits. Judged on MNIST's 10,000 test images by log-loss and accuracy.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core import data, nets
from toolkit.core.seeds import generator
from toolkit.core.train import rates
from toolkit.core.train.fit import fit
from toolkit.labs.beds import arms, bases
from toolkit.labs.beds.arms import Arm

NETS = ("vit", "cnn")
SHIFTS = ("rotated", "inverted")
JUDGED = "log-loss (nats), accuracy (%)"
TARGETS = {"vit": ["blocks.*"], "cnn": [nn.Conv2d]}
"""A method sits on every linear layer of the ViT's blocks, on every convolution of the CNN."""
START = {
    "vit": {"head": 3e-2, "lora": 8e-3, "full": 2e-3, "full_twice": 2e-3},
    "cnn": {"head": 4e-2, "lora": 4e-3, "full": 2e-3, "full_twice": 2e-3},
}
"""Middle of the first rates tried."""
SPLITS = (0,)


@dataclass(frozen=True)
class Size:
    """Numbers of one scale: of the networks, pretraining and a run."""

    width: int
    depth: int
    channels: tuple[int, ...]
    pretraining: dict[str, int]
    examples: int
    batch: int
    steps: int
    validation: int


SIZES = {
    "ci": Size(16, 1, (8, 16), {"vit": 60, "cnn": 40}, 128, 16, 10, 100),
    "cpu": Size(64, 4, (24, 48, 96), {"vit": 2500, "cnn": 1500}, 1000, 32, 200, 5000),
}


def size(scale: str) -> Size:
    """The sizes of a scale; ``gpu`` takes those of ``cpu``.

    Raises:
        ValueError: an unknown scale.
    """
    return SIZES[arms.sizes_of(scale)]


class Parts(NamedTuple):
    """Pairs of images (n, 28, 28) in [0, 1] and labels (n,): ``pool`` (what the base learned from
    and what a seed draws its examples from), ``validation``, ``test``."""

    pool: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@functools.lru_cache(maxsize=2)
def load(scale: str = "cpu") -> Parts:
    """MNIST: 55,000 training images, the last 5,000 of the training set, 10,000 test images.

    At ``ci``, scikit-learn's digits of 8 x 8 pixels, enlarged: 1,337, 100 and 360 of them.

    Raises:
        ValueError: an unknown scale.
        toolkit.core.data.DataError: MNIST is nowhere to be found.
    """
    held = size(scale).validation
    found = data.load("digits" if scale == "ci" else "mnist")
    x, last = (torch.from_numpy(part) for part in (found.x_train, found.x_test))
    if scale == "ci":
        x, last = (
            F.interpolate(part[:, None], size=(28, 28), mode="bilinear")[:, 0] for part in (x, last)
        )
    else:
        x, last = x.float() / 255, last.float() / 255
    y, y_last = torch.from_numpy(found.y_train), torch.from_numpy(found.y_test)
    return Parts((x[:-held], y[:-held]), (x[-held:], y[-held:]), (last, y_last))


def shifted(images: Tensor, shift: str) -> Tensor:
    """Images after the shift: "rotated" by 90 degrees against the clock, or "inverted" in grey.

    Raises:
        ValueError: an unknown shift.
    """
    if shift not in SHIFTS:
        raise ValueError(f"shift: choose one of {', '.join(SHIFTS)}, got {shift!r}")
    return images.rot90(1, (1, 2)) if shift == "rotated" else 1 - images


class Grey(nn.Module):
    """Adds the channel axis that a convolutional network wants; the parts keep their names."""

    def __init__(self, network: nets.ConvNet) -> None:
        super().__init__()
        self.blocks, self.head = network.blocks, network.head

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 28, 28) to scores (batch, 10)."""
        return self.head(self.blocks(images[:, None]).mean((-2, -1)))


def empty(net: str, scale: str, draws: torch.Generator | None = None) -> Any:
    """A network of the bed without its training.

    Raises:
        ValueError: an unknown network.
    """
    if net not in NETS:
        raise ValueError(f"net: choose one of {', '.join(NETS)}, got {net!r}")
    this = size(scale)
    if net == "vit":
        return nets.digits_transformer(this.width, this.depth, 4, 10, 7, 28, generator=draws)
    return Grey(nets.convnet(1, this.channels, 10, generator=draws))


def moved(images: Tensor, most: int, draws: torch.Generator) -> Tensor:
    """Each image shifted by up to ``most`` pixels along both axes, zeros coming in."""
    count, side = images.shape[0], images.shape[-1]
    padded = F.pad(images, (most,) * 4)
    down, right = torch.randint(2 * most + 1, (2, count, 1), generator=draws)
    rows, columns = down + torch.arange(side), right + torch.arange(side)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def pretrain(net: str = "vit", scale: str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The base: Adam on upright images, 64 a step, the rate falling along half a cosine from 2e-3
    (ViT, images moved by up to 2 pixels) or 4e-3 (CNN)."""
    this, parts, draws = size(scale), load(scale), bases.seeded()
    model, steps = empty(net, scale, draws), this.pretraining[net]
    x, y = parts.pool

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(steps):
            rows = torch.randint(len(y), (64,), generator=draws)
            yield (moved(x[rows], 2, draws) if net == "vit" else x[rows]), y[rows]

    rate = 1e-2 if scale == "ci" else {"vit": 2e-3, "cnn": 4e-3}[net]
    fit(
        model, None, rate, 0, stream(), F.cross_entropy, steps=steps,
        decay=lambda step, of: arms.warm(step, of) * rates.cosine(step, of),
    )  # fmt: skip
    reached = arms.judged(arms.scores(bases.restored(model), parts.test[0]), parts.test[1])
    return model, {
        "quantity": "accuracy (%) on upright test images",
        "reached": reached["accuracy"],
    }


@functools.lru_cache(maxsize=4)
def _base(net: str, scale: str) -> nn.Module:
    if scale == "ci":
        return pretrain(net, "ci")[0].eval()
    return bases.fill(empty(net, scale), f"images_{net}")


def network(net: str = "vit", scale: str = "cpu") -> Any:
    """A fresh copy of a base."""
    return arms.fresh(_base(net, scale))


def train(
    arm: str | Arm,
    rate: float,
    seed: int,
    *,
    net: str = "vit",
    shift: str = "rotated",
    scale: str = "cpu",
    rank: int = 8,
    examples: int | None = None,
    steps: int | None = None,
    beside: tuple[str, ...] = ("head",),
    parts: tuple[str, ...] = ("validation", "test"),
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Adapt a base to shifted images.

    Every seed draws its own examples from the pool, and their order; the rate falls along half a
    cosine after the warm-up. The statistics of the CNN's normalisations follow the new images
    except where the head trains alone.

    Args:
        arm: a reference arm by name, or :class:`~toolkit.labs.beds.arms.Arm` with any method.
        rate: learning rate at its highest.
        seed: of the examples, their order and the method's start.
        net: "vit" or "cnn"; shift: "rotated" or "inverted".
        scale: "ci", "cpu" or "gpu".
        rank: of LoRA.
        examples, steps: instead of the scale's.
        beside: parameters that train beside a method.
        parts: which of "validation" and "test" to judge.

    Returns:
        The network, the method's handle or None, and a record: ``validation`` and ``test`` log-loss
        in nats, ``validation_accuracy`` and ``test_accuracy`` in percent, ``trained`` numbers.
    """
    torch.set_num_threads(1)
    arm, this, every = arms.named(arm, rank), size(scale), load(scale)
    model, (x, y) = network(net, scale), every.pool
    chosen = torch.randperm(len(y), generator=generator(seed, "examples"))
    chosen = chosen[: examples or this.examples]
    x, y = shifted(x[chosen], shift), y[chosen]

    def draw(count: int) -> Iterator[tuple[Tensor, Tensor]]:
        order, left = generator(seed, "order"), torch.empty(0, dtype=torch.int64)
        for _ in range(count):
            if len(left) < this.batch:
                left = torch.cat([left, torch.randperm(len(y), generator=order)])
            rows, left = left[: this.batch], left[this.batch :]
            yield x[rows], y[rows]

    adapted, trained = arms.learn(
        model, arm, rate, seed, draw, F.cross_entropy, steps=steps or this.steps,
        decay=rates.cosine, targets=TARGETS[net], beside=beside,
    )  # fmt: skip
    record: dict[str, Any] = {}
    for part in parts:
        images, labels = getattr(every, part)
        found = arms.judged(arms.scores(model, shifted(images, shift)), labels)
        record |= {part: found["loss"], f"{part}_accuracy": found["accuracy"]}
    return model, adapted, record | {"trained": trained}


def adapt(
    arm: str, rate: float, seed: int, scale: str = "cpu", rank: int = 8, split: int = 0,
    net: str = "vit", shift: str = "rotated", parts: tuple[str, ...] = ("validation", "test"),
) -> dict[str, Any]:  # fmt: skip
    """A reference arm as a job; see :func:`train`. There is one split, 0."""
    return train(arm, rate, seed, net=net, shift=shift, scale=scale, rank=rank, parts=tuple(parts))[
        2
    ]
