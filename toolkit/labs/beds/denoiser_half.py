"""A denoiser of digits at half their size, so that what it draws at full size has a truth.

MNIST's images of 28 x 28 pixels get a black frame of 2, which makes 32 x 32, and are averaged over
blocks of 2 x 2: the network learns 16 x 16. It holds convolutions only. Images run from -1 to 1.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core.data import ChecksumError
from toolkit.core.nets.unet import unet
from toolkit.core.sample.precondition import Preconditioned, drawn_sigmas
from toolkit.core.train import rates
from toolkit.core.train.fit import fit
from toolkit.labs.beds import arms, bases, denoiser

BASE = "denoiser_half"
SIDE, TRUE_SIDE = 16, 32
WIDTHS = (32, 64)
STEPS, BATCH, RATE = 5000, 64, 2e-3
FRAME = 2


def framed(images: Tensor) -> Tensor:
    """Images (n, 1, 28, 28) from -1 to 1 in a black frame: (n, 1, 32, 32)."""
    return F.pad(images, (FRAME,) * 4, value=-1.0)


@functools.lru_cache(maxsize=1)
def load() -> denoiser.Parts:
    """The parts of the denoisers' bed in a frame: (n, 1, 32, 32) and labels.

    Raises:
        toolkit.core.data.DataError: MNIST is nowhere to be found.
    """
    parts = denoiser.load("cpu")
    return denoiser.Parts(*((framed(x), y) for x, y in parts))


def halved(images: Tensor) -> Tensor:
    """Images with half the sides: means over blocks of 2 x 2 pixels."""
    return F.avg_pool2d(images, 2)


def empty(draws: torch.Generator | None = None) -> Preconditioned:
    """The network without its training; its output is zero."""
    return Preconditioned(unet(1, WIDTHS, denoiser.CLASSES, heads=0, generator=draws), 0.5)


def pretrain(steps: int = STEPS) -> tuple[nn.Module, dict[str, Any]]:
    """The base: as :func:`toolkit.labs.beds.denoiser.pretrain`, on images of half the size.

    Adam, 64 images a step, log-normal noise (-1.2, 1.2), a tenth of the labels left out, the rate
    falling along half a cosine from 2e-3, weights averaged over about 500 steps.
    """
    draws = bases.seeded()
    model = empty(draws)
    average = copy.deepcopy(model)
    x, y = load().pool
    x = halved(x)

    def stream() -> Iterator[tuple[Any, Any]]:
        for _ in range(steps):
            rows = torch.randint(len(y), (BATCH,), generator=draws)
            sigma = drawn_sigmas(BATCH, draws)
            noise = torch.randn(BATCH, *x.shape[1:], generator=draws)
            untold = torch.rand(BATCH, generator=draws) < 0.1
            labels = torch.where(untold, denoiser.UNTOLD, y[rows])
            noisy = x[rows] + sigma[:, None, None, None] * noise
            yield (noisy, sigma, labels), (x[rows], model.weight(sigma))

    @torch.no_grad()
    def follow(step: int, adapted: Any, trained: nn.Module) -> None:
        keep = min(0.998, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)

    fit(
        denoiser.Noised(model, True), None, RATE, 0, stream(), denoiser.error, steps=steps,
        watch=follow, decay=lambda step, of: arms.warm(step, of) * rates.cosine(step, of),
    )  # fmt: skip
    reached = judged(bases.restored(average))
    return average, {
        "quantity": "weighted error of denoising test images, mean of 4 noise levels",
        "reached": sum(reached.values()) / len(reached),
    }


@torch.no_grad()
def judged(network: Preconditioned, count: int = 1000) -> dict[float, float]:
    """Weighted squared error per pixel on test images of half the size, at each noise level of
    the denoisers' bed, on fixed noise."""
    x, y = (part[:count] for part in load().test)
    x = halved(x)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    found = {}
    for sigma in denoiser.JUDGED_AT:
        errors = []
        for rows in torch.arange(len(x)).split(250):
            level = torch.full((len(rows),), sigma)
            said = network(x[rows] + sigma * noise[rows], level, y[rows])
            errors.append((said - x[rows]).square().flatten(1).mean(1))
        found[sigma] = float(network.weight(torch.tensor(sigma)) * torch.cat(errors).mean())
    return found


@functools.lru_cache(maxsize=1)
def _base() -> nn.Module:
    if BASE not in bases.entries():
        raise ChecksumError(
            f"base {BASE!r} is not there: make it once by "
            f"`python -m toolkit.labs.beds.pretrain {BASE}`, which takes some minutes of one core"
        )
    return bases.fill(empty(), BASE)


def network() -> Preconditioned:
    """A fresh copy of the base: a denoiser ``network(x, level, labels)``.

    Raises:
        toolkit.core.data.ChecksumError: the base is missing or damaged; how to make it is said.
    """
    return arms.fresh(_base())
