"""The beds: images of R seeds, flat networks in lanes, and specialists of five digits each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.core import data
from toolkit.core.seeds import generator

STD = 0.01
"""Standard deviation of random starts and of mutations, as published."""


class Size(NamedTuple):
    """Numbers of one bed: hidden units, training images, steps and rate of a specialist.

    ``common``: further images, of all ten digits, on which the common start of both specialists
    learned for as many steps; 0 where they begin apart.
    """

    width: int
    examples: int
    steps: int
    rate: float
    common: int


SIZES = {
    "ci": {"mnist": Size(16, 200, 10, 0.01, 50), "digits": Size(32, 300, 10, 0.003, 0)},
    "cpu": {"mnist": Size(32, 1000, 20, 0.003, 100), "digits": Size(256, 1437, 10, 0.003, 0)},
}


def size(bed: str, scale: str) -> Size:
    """The numbers of a bed; ``gpu`` takes those of ``cpu``."""
    return SIZES["ci" if scale == "ci" else "cpu"][bed]


class World(NamedTuple):
    """Images and labels of R seeds: ``x`` (R, N, F), ``y`` (R, N), and to test on (M, F), (M,).

    ``common_x`` (R, C, F) and ``common_y`` are those of the common start.
    """

    x: Tensor
    y: Tensor
    common_x: Tensor
    common_y: Tensor
    test_x: Tensor
    test_y: Tensor


@functools.lru_cache(maxsize=1)
def pictures(bed: str, scale: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (n, F) with pixels from 0 to 16 and labels; the same to test on."""
    if bed == "mnist" and scale != "ci":
        found = data.load("mnist")
        parts = []
        for x, y in ((found.x_train, found.y_train), (found.x_test, found.y_test)):
            pixels = F.avg_pool2d(torch.from_numpy(x)[:, None].float(), 2).flatten(1) / 255 * 16
            parts += [pixels, torch.from_numpy(y)]
        return parts[0], parts[1], parts[2], parts[3]
    found = data.digits(seed=0)
    shuffled = np.random.default_rng(0).permutation(1797)
    x, y = torch.empty(1797, 64), torch.empty(1797, dtype=torch.int64)
    # the published split is of the images in their own order
    x[shuffled] = torch.from_numpy(16 * np.concatenate([found.x_train, found.x_test])).flatten(1)
    y[shuffled] = torch.from_numpy(np.concatenate([found.y_train, found.y_test]))
    cut = int(0.8 * len(y))
    if bed == "mnist":
        x = F.interpolate(x.view(-1, 1, 8, 8), 14).flatten(1)
    return x[:cut], y[:cut], x[cut:], y[cut:]


def world(bed: str, seeds: Sequence[int], scale: str) -> World:
    """What R seeds train and are tested on; on digits all train on the same images."""
    x, y, test_x, test_y = pictures(bed, scale)
    this = size(bed, scale)
    count = this.examples + this.common
    rows = torch.stack([
        torch.arange(count) if bed == "digits"
        else torch.randperm(len(y), generator=generator(seed, "images"))[:count]
        for seed in seeds
    ])  # fmt: skip
    own, common = rows.split([this.examples, this.common], 1)
    return World(x[own], y[own], x[common], y[common], test_x, test_y)


def length(x: Tensor, width: int) -> int:
    """How many numbers a network has: W1 (F, width), b1, W2 (width, 10), b2, end to end."""
    return (x.shape[-1] + 1) * width + (width + 1) * 10


def logits(parameters: Tensor, x: Tensor, width: int) -> Tensor:
    """Scores (R, N, 10) of R networks (R, D) on images (R, N, F), or the same (N, F) for all."""
    runs, pixels = len(parameters), x.shape[-1]
    parts = parameters.split([pixels * width, width, width * 10, 10], -1)
    x = x.expand(runs, *x.shape[-2:])
    hidden = torch.baddbmm(parts[1][:, None], x, parts[0].view(runs, pixels, width)).relu_()
    return torch.baddbmm(parts[3][:, None], hidden, parts[2].view(runs, width, 10))


def accuracy(parameters: Tensor, x: Tensor, y: Tensor, width: int) -> Tensor:
    """Share of right answers of R networks, (R,), in per cent."""
    return 100 * (logits(parameters, x, width).argmax(-1) == y).float().mean(-1)


def fresh(count: int, seeds: Sequence[int], *stream: int | str) -> Tensor:
    """Random starts (R, D), one for each seed."""
    return STD * torch.stack(
        [torch.randn(count, generator=generator(seed, *stream)) for seed in seeds]
    )


def trained(start: Tensor, x: Tensor, y: Tensor, mask: Tensor, this: Size) -> Tensor:
    """R networks (R, D) after full-batch Adam on the images that the mask (R, N) takes."""
    parameters = start.clone().requires_grad_(True)
    adam = torch.optim.Adam([parameters], lr=this.rate)
    share = mask / mask.sum(1, keepdim=True)
    for _ in range(this.steps):
        adam.zero_grad()
        scores = logits(parameters, x, this.width).flatten(0, 1)
        losses = F.cross_entropy(scores, y.flatten(), reduction="none").view_as(share)
        (losses * share).sum().backward()
        adam.step()
    return parameters.detach()


def common_start(bed: str, seeds: Sequence[int], scale: str, there: World) -> Tensor:
    """Networks (R, D) that learned a little of all ten digits; random where specialists begin
    apart."""
    this = size(bed, scale)
    start = fresh(length(there.x, this.width), seeds, "start", 0)
    if not this.common:
        return start
    every = torch.ones_like(there.common_y)
    return trained(start, there.common_x, there.common_y, every, this)


def specialists(bed: str, seeds: Sequence[int], scale: str, there: World) -> Tensor:
    """Two networks for each seed, (R, 2, D): one learned the digits 0 to 4, the other 5 to 9."""
    this = size(bed, scale)
    one = two = common_start(bed, seeds, scale, there)
    if not this.common:
        two = fresh(length(there.x, this.width), seeds, "start", 1)
    small = there.y < 5
    first = trained(one, there.x, there.y, small, this)
    return torch.stack([first, trained(two, there.x, there.y, ~small, this)], 1)


def right(there: World, this: Size, parameters: Tensor) -> Tensor:
    """Which training images each of R networks knows, (R, N)."""
    return logits(parameters, there.x, this.width).argmax(-1) == there.y


def tested(parameters: Tensor, there: World, this: Size) -> Tensor:
    """Test accuracy of R networks, (R,), in per cent."""
    return accuracy(parameters, there.test_x, there.test_y, this.width)
