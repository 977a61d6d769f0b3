"""Two worlds to sample from: mixtures whose guided denoiser is exact, and the base of digits.

A world makes noises and labels from seeds, asks its denoiser with guidance built in, and knows its
law of noise. A solver is judged by the squared distance of its samples from a fine run that starts
at the same noises.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.core.sample.guidance import guided
from toolkit.core.sample.loop import sample
from toolkit.core.sample.mixtures import Mixture
from toolkit.core.sample.plans import DPMpp2M, Plan
from toolkit.core.sample.schedule import Law, Level, LinearVP, Network, Schedule
from toolkit.core.seeds import generator
from toolkit.labs.beds import denoiser as bed

ENDS = (1.0, 1e-3)
"""First and last time, as published."""
KINDS = {"round": (1.0, 0.7), "sharp": (1.5, 0.25)}
"""Spread of the means and width of the components, for each kind of mixture."""
WIDTH, COMPONENTS, CLASSES = 16, 8, 2


@dataclass(frozen=True)
class World:
    """Something to sample from.

    Attributes:
        network: of labels and the guidance's weight: a denoiser with both built in.
        noise: of a count and the name of a stream: starting states at time 1, and labels.
        fine: steps of the fine run that others are judged by.
        law: of the noise.
    """

    network: Callable[[Tensor, float], Network]
    noise: Callable[[int, str], tuple[Tensor, Tensor]]
    fine: int
    law: Law

    def schedule(self, calls: int) -> Schedule:
        """Levels at even times."""
        return Schedule.even(self.law, calls, *ENDS)

    def run(self, plan: Plan, steps: int, x: Tensor, labels: Tensor, guidance: float) -> Tensor:
        """Samples of a solver."""
        return sample(self.network(labels, guidance), self.schedule(steps), plan, x).x

    def truth(self, x: Tensor, labels: Tensor, guidance: float) -> Tensor:
        """Where the fine run ends."""
        return self.run(DPMpp2M(), self.fine, x, labels, guidance)


def mixture(kind: str, seed: int) -> Mixture:
    """Eight components of two classes in 16 dimensions, drawn anew for each seed."""
    spread, scale = KINDS[kind]
    draws = generator(seed, "dc_solver", kind)
    means = spread * torch.randn(COMPONENTS, WIDTH, generator=draws, dtype=torch.float64)
    return Mixture(means, scale, classes=[n % CLASSES for n in range(COMPONENTS)])


def exact(data: Mixture, labels: Tensor, guidance: float) -> Network:
    """The guided denoiser of a mixture of equal weights, without looking twice at its distances."""
    other = labels[:, None] != data.classes
    squares = data.means.square().sum(1)
    scale = float(data.scales[0])

    def answer(x: Tensor, level: Level) -> Tensor:
        z = x / level.alpha
        variance = scale**2 + level.sigma**2
        logs = (2 * z @ data.means.T - squares) / (2 * variance)
        share = logs.masked_fill(other, -math.inf).softmax(1)
        if guidance != 1:
            share = torch.lerp(logs.softmax(1), share, guidance)
        kept = scale**2 / variance
        # shares sum to 1 under guidance too
        return kept * z + (1 - kept) * (share @ data.means)

    return answer


@functools.lru_cache(maxsize=4)
def mixtures(kind: str, seed: int, scale: str) -> World:
    """The world of a mixture."""
    data = mixture(kind, seed)

    def noise(count: int, stream: str) -> tuple[Tensor, Tensor]:
        draws = generator(seed, "dc_solver", kind, stream)
        labels = torch.randint(CLASSES, (count,), generator=draws)
        return torch.randn(count, WIDTH, generator=draws, dtype=torch.float64), labels

    fine = 40 if scale == "ci" else 240
    return World(functools.partial(exact, data), noise, fine, LinearVP())


@functools.lru_cache(maxsize=4)
def digits(seed: int, scale: str) -> World:
    """The world of the base of digits: MNIST, at ``ci`` the digits of 8 x 8 pixels."""
    network: Any = bed.network(scale)
    for parameter in network.parameters():
        parameter.requires_grad_(False)  # only ratios are searched
    side = bed.size(scale).side

    def noise(count: int, stream: str) -> tuple[Tensor, Tensor]:
        draws = generator(seed, "dc_solver", "digits", stream)
        labels = torch.arange(count) % bed.CLASSES
        return torch.randn(count, 1, side, side, generator=draws), labels

    def asked(labels: Tensor, guidance: float) -> Network:
        return guided(network, labels, guidance, bed.UNTOLD)

    return World(asked, noise, 8 if scale == "ci" else 40, LinearVP())


def clean(x: Tensor) -> Tensor:
    """Images from states at the last level."""
    return x / LinearVP().level(ENDS[1]).alpha
