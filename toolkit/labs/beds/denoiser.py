"""A class-conditional denoiser of handwritten digits, and how its samples are judged.

Images run from -1 to 1. The label 10 means that the class is not told; a tenth of the labels was
left out in training, so guidance works. Samples are judged by the images bed's CNN: the Fréchet
distance in its features, and the share of samples that it reads as their class.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core import data
from toolkit.core.data import ChecksumError
from toolkit.core.nets.unet import unet
from toolkit.core.sample.metrics import frechet
from toolkit.core.sample.precondition import Preconditioned, drawn_sigmas
from toolkit.core.train import rates
from toolkit.core.train.fit import fit
from toolkit.labs.beds import arms, bases, images

CLASSES = 10
UNTOLD = CLASSES
"""The label of an image whose class is not told."""
JUDGED_AT = (0.1, 0.3, 0.8, 2.0)
"""Noise levels at which the error of denoising is judged."""


@dataclass(frozen=True)
class Size:
    """Numbers of one scale: of the network and its pretraining."""

    widths: tuple[int, int]
    side: int
    steps: int
    batch: int
    rate: float
    half: bool
    judged: int


SIZES = {
    "ci": Size((16, 32), 8, 1500, 64, 4e-3, False, 360),
    "cpu": Size((32, 96), 28, 3200, 64, 2e-3, True, 1000),
}


def size(scale: str) -> Size:
    """The sizes of a scale; ``gpu`` takes those of ``cpu``.

    Raises:
        ValueError: an unknown scale.
    """
    return SIZES[arms.sizes_of(scale)]


class Parts(NamedTuple):
    """Pairs of images (n, 1, side, side) from -1 to 1 and labels (n,): ``pool`` to learn from,
    ``test``."""

    pool: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@functools.lru_cache(maxsize=2)
def load(scale: str = "cpu") -> Parts:
    """MNIST: the first 55,000 training images, as for other bases, and 10,000 test images.

    At ``ci``, scikit-learn's digits of 8 x 8 pixels: 1,437 and 360 of them.

    Raises:
        ValueError: an unknown scale.
        toolkit.core.data.DataError: MNIST is nowhere to be found.
    """
    small = size(scale).side == 8
    found = data.load("digits" if small else "mnist")

    def pair(x: Any, y: Any, count: int | None) -> tuple[Tensor, Tensor]:
        x, y = torch.from_numpy(x)[:count].float(), torch.from_numpy(y)[:count]
        return (x / x.max() * 2 - 1)[:, None], y

    return Parts(
        pair(found.x_train, found.y_train, None if small else 55_000),
        pair(found.x_test, found.y_test, None),
    )


def empty(scale: str = "cpu", draws: torch.Generator | None = None) -> Preconditioned:
    """The network of the bed without its training; its output is zero."""
    return Preconditioned(unet(1, size(scale).widths, CLASSES, generator=draws), 0.5)


class Noised(nn.Module):
    """Takes what a batch of training holds as one argument; computes in bfloat16 if ``half``."""

    def __init__(self, denoiser: Preconditioned, half: bool) -> None:
        super().__init__()
        self.denoiser, self.half = denoiser, half

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """States, noise levels and labels to predicted clean images."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            return self.denoiser(*batch)


def error(said: Tensor, wanted: tuple[Tensor, Tensor]) -> Tensor:
    """Mean over images of the weighted squared error per pixel; targets and weights (batch,)."""
    clean, weight = wanted
    return (weight * (said - clean).square().flatten(1).mean(1)).mean()


def pretrain(scale: str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The base: Adam, 64 images a step, log-normal noise (-1.2, 1.2), a tenth of the labels left
    out, the rate falling along half a cosine from 2e-3 (``ci``: 4e-3), weights averaged over about
    500 steps."""
    this, parts, draws = size(scale), load(scale), bases.seeded()
    model = empty(scale, draws)
    average = copy.deepcopy(model)
    x, y = parts.pool

    def stream() -> Iterator[tuple[Any, Any]]:
        for _ in range(this.steps):
            rows = torch.randint(len(y), (this.batch,), generator=draws)
            sigma = drawn_sigmas(this.batch, draws)
            noise = torch.randn(this.batch, *x.shape[1:], generator=draws)
            untold = torch.rand(this.batch, generator=draws) < 0.1
            labels = torch.where(untold, UNTOLD, y[rows])
            noisy = x[rows] + sigma[:, None, None, None] * noise
            yield (noisy, sigma, labels), (x[rows], model.weight(sigma))

    @torch.no_grad()
    def follow(step: int, adapted: Any, trained: nn.Module) -> None:
        keep = min(0.998, (1 + step) / (10 + step))
        ours, theirs = list(average.parameters()), list(model.parameters())
        torch._foreach_lerp_(ours, theirs, 1 - keep)

    fit(
        Noised(model, this.half), None, this.rate, 0, stream(), error, steps=this.steps,
        watch=follow, decay=lambda step, of: arms.warm(step, of) * rates.cosine(step, of),
    )  # fmt: skip
    reached = judged(bases.restored(average), scale)
    return average, {
        "quantity": "weighted error of denoising test images, mean of 4 noise levels",
        "reached": sum(reached.values()) / len(reached),
    }


@torch.no_grad()
def judged(
    denoiser: Preconditioned, scale: str = "cpu", count: int | None = None
) -> dict[float, float]:
    """Weighted squared error per pixel at each of :data:`JUDGED_AT`, on fixed noise.

    Args:
        denoiser: takes noise levels and labels.
        scale: whose test images are judged on.
        count: how many; the scale's unless said.
    """
    x, y = (part[: size(scale).judged] for part in load(scale).test)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    x, y, noise = x[:count], y[:count], noise[:count]
    found = {}
    for sigma in JUDGED_AT:
        errors = []
        for rows in torch.arange(len(x)).split(250):
            level = torch.full((len(rows),), sigma)
            said = denoiser(x[rows] + sigma * noise[rows], level, y[rows])
            errors.append((said - x[rows]).square().flatten(1).mean(1))
        weight = float(denoiser.weight(torch.tensor(sigma)))
        found[sigma] = weight * float(torch.cat(errors).mean())
    return found


@functools.lru_cache(maxsize=2)
def _base(scale: str) -> nn.Module:
    name = "denoiser_digits" if scale == "ci" else "denoiser"
    if name not in bases.entries():
        raise ChecksumError(
            f"base {name!r} is not there: make it once by "
            f"`python -m toolkit.labs.beds.pretrain {name}`, which takes some minutes of one core"
        )
    return bases.fill(empty(scale), name)


def network(scale: str = "cpu") -> Preconditioned:
    """A fresh copy of the base: a denoiser ``network(x, level, labels)``.

    Raises:
        toolkit.core.data.ChecksumError: the base is missing or damaged; how to make it is said.
    """
    return arms.fresh(_base(scale))


def features(samples: Tensor, scale: str = "cpu") -> tuple[Tensor, Tensor]:
    """What the images bed's CNN sees in samples (n, 1, side, side) from -1 to 1.

    Returns:
        Its last features (n, channels) and its scores (n, 10).
    """
    grey = ((samples.float() + 1) / 2).clamp(0, 1)
    if grey.shape[-1] != 28:
        grey = F.interpolate(grey, size=(28, 28), mode="bilinear")
    reader = images.network("cnn", scale).eval()
    with torch.no_grad():
        seen = torch.cat([reader.blocks(part).mean((-2, -1)) for part in grey.split(250)])
        return seen, reader.head(seen)


def quality(samples: Tensor, labels: Tensor, scale: str = "cpu") -> dict[str, float]:
    """How good samples are: ``frechet`` distance to as many test images in the CNN's features, and
    the share that is ``read`` as its label, in percent.

    Args:
        samples: (n, 1, side, side) from -1 to 1.
        labels: (n,) the classes asked for.
        scale: of the bed.

    Raises:
        ValueError: more samples than there are test images, or fewer than two.
    """
    real = load(scale).test[0]
    if len(samples) > len(real):
        raise ValueError(
            f"samples: at most {len(real)}, as many as test images, got {len(samples)}"
        )
    seen, scores = features(samples, scale)
    return {
        "frechet": frechet(seen, features(real[: len(samples)], scale)[0]),
        "read": 100 * float((scores.argmax(1) == labels).double().mean()),
    }
