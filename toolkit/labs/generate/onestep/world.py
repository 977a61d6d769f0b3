"""What does not depend on an arm: noise and the images that the frozen model makes of it, readers.

Two worlds. ``digits``: scikit-learn's digits of 8 x 8 pixels and the small denoiser.
``handwriting``: MNIST, 28 x 28, and the denoiser with 0.8 million weights; at ``ci`` the small one
stands in. In each, one network reads digits for the loss and another for the judging; they learned
from other images and started elsewhere.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit.core.nets import convnet, initialise
from toolkit.core.sample.draws import Draws
from toolkit.core.sample.plans import UniPC
from toolkit.core.sample.schedule import Level, Schedule
from toolkit.core.seeds import generator
from toolkit.core.train import rates
from toolkit.core.train.fit import fit
from toolkit.generate.hipa import Pairs, make_pairs
from toolkit.labs.beds import arms, denoiser

SIGMA = (0.002, 80.0)
"""Ends of the noise, as EDM has them; the one step starts at the second."""


@dataclass(frozen=True)
class Size:
    """Numbers of a world: of its pairs, its teacher and a run."""

    pool: int
    judged: int
    validation: int
    teacher: int
    pairs: int
    batch: int
    steps: int
    reader: int


SIZES = {
    ("digits", "ci"): Size(48, 40, 40, 3, 32, 8, 2, 15),
    ("handwriting", "ci"): Size(48, 40, 40, 3, 32, 8, 2, 15),
    ("digits", "cpu"): Size(3000, 1000, 500, 12, 2000, 64, 80, 300),
    ("handwriting", "cpu"): Size(1200, 1000, 400, 8, 1000, 32, 50, 300),
}


def size(world: str, scale: str) -> Size:
    """The sizes of a world at a scale; ``gpu`` takes those of ``cpu``.

    Raises:
        ValueError: no such world at that scale.
    """
    named = (world, arms.sizes_of(scale))
    if named not in SIZES:
        raise ValueError(f"world, scale: one of {sorted(SIZES)}, got {named}")
    return SIZES[named]


def bed(world: str, scale: str) -> str:
    """The scale of the bed of denoisers that a world takes."""
    return "cpu" if world == "handwriting" and arms.sizes_of(scale) == "cpu" else "ci"


def top() -> Level:
    """The level of pure noise."""
    return Schedule.edm(2, *SIGMA).levels[0]


def noises(world: str, scale: str, count: int, part: str) -> tuple[Tensor, Tensor]:
    """States at the highest level and labels, one per sample: ``train``, ``validation``, ``test``
    or ``other``, which no arm ever starts from."""
    side = denoiser.size(bed(world, scale)).side
    start = Draws(range(count), "onestep", part).normal((1, side, side)) * top().std
    return start, torch.arange(count) % denoiser.CLASSES


@functools.lru_cache(maxsize=8)
def pairs(world: str, scale: str, part: str) -> Pairs:
    """Noise of a part with the images of the frozen model: UniPC over so many steps."""
    this = size(world, scale)
    count = {"train": this.pool, "validation": this.validation}.get(part, this.judged)
    return in_steps(world, scale, part, count, this.teacher)


def in_steps(world: str, scale: str, part: str, count: int, steps: int) -> Pairs:
    """Noise of a part with the images that the frozen model makes of it in so many steps."""
    start, labels = noises(world, scale, count, part)
    schedule = Schedule.edm(steps, *SIGMA)
    return make_pairs(denoiser.network(bed(world, scale)), schedule, UniPC(), start, labels)


class Reader(nn.Module):
    """A small convolutional network whose layers can be looked into."""

    def __init__(self, side: int) -> None:
        super().__init__()
        # of 8 x 8 pixels one more halving would leave too few to compare
        self.network = convnet(1, (16, 24) if side < 16 else (16, 24, 32), denoiser.CLASSES)

    def layers(self, images: Tensor) -> list[Tensor]:
        """Images (batch, 1, h, w) to the outputs of all blocks."""
        found = [images]
        for block in self.network.blocks:
            found.append(block(found[-1]))
        return found[1:]

    def seen(self, images: Tensor) -> Tensor:
        """Images to the last features, mean over pixels, (batch, channels)."""
        return self.layers(images)[-1].mean((-2, -1))

    def forward(self, images: Tensor) -> Tensor:
        """Images to scores (batch, 10)."""
        return self.network(images)


@functools.lru_cache(maxsize=4)
def reader(world: str, scale: str, role: str) -> Reader:
    """A frozen reader: for the ``loss``, or for the ``judge`` of 8 x 8 digits.

    The loss's learns from the last part of the bed's training images: of MNIST the 5,000 that no
    base of the book has learned from. The judge of digits learns from the first half.
    """
    x, y = _taught(bed(world, scale), role)
    draws = generator({"loss": 1, "judge": 2}[role], "onestep reader")
    model = initialise(Reader(x.shape[-1]), draws)
    steps = size(world, scale).reader

    def batches() -> list[tuple[Tensor, Tensor]]:
        rows = torch.randint(len(y), (steps, 64), generator=draws)
        return [(x[at], y[at]) for at in rows]

    fit(model, None, 1e-2, 0, batches(), F.cross_entropy, steps=steps, decay=rates.cosine)
    return model.eval().requires_grad_(False)


def _taught(of_bed: str, role: str) -> tuple[Tensor, Tensor]:
    """Images from -1 to 1 and labels that a reader learns from."""
    if of_bed == "cpu":
        from toolkit.labs.beds import images

        x, y = images.load("cpu").validation
        return (x * 2 - 1)[:, None], y
    x, y = denoiser.load("ci").pool
    half = len(y) // 2
    return (x[half:], y[half:]) if role == "loss" else (x[:half], y[:half])
