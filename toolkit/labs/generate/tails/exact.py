"""The same probes without a network: data whose best denoiser is known for every D."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from toolkit.core.sample.loop import sample
from toolkit.core.sample.mixtures import Mixture
from toolkit.core.sample.plans import Heun
from toolkit.core.sample.schedule import Schedule
from toolkit.core.seeds import generator
from toolkit.generate.pfgmpp import PFGMpp, Told, injected
from toolkit.labs.generate.tails.network import HIGH, LOW, digits

WIDTH = 0.2
"""Standard deviation of each component."""


def mixture(seed: int, components: int) -> Mixture:
    """Round Gaussians in 64 dimensions around digits drawn for this seed."""
    order = torch.randperm(len(digits()), generator=generator(seed, "components"))
    return Mixture(digits()[order[:components]], WIDTH)


def left_over(made: Tensor, mix: Mixture) -> float:
    """Variance around the nearest component over what it should be: 1 is right."""
    near = torch.cdist(made.double(), mix.means).square().min(1).values
    return float(near.mean() / made.shape[1] / WIDTH**2)


def tried(D: float, seed: int, count: int, components: int, alpha: float, told: bool) -> float:
    """What noise is left over in samples of the exact denoiser, from shared random numbers."""
    mix, method = mixture(seed, components), PFGMpp(D=D)
    inside = generator(seed, "inside")

    def noises(number: int, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=inside, dtype=torch.float64)

    def exact(x: Tensor, level: object) -> Tensor:
        return mix.denoise(x, level, freedom=D)  # type: ignore[arg-type]

    start = method.noise((count, mix.means.shape[1]), HIGH, generator(seed, "start")).double()
    denoiser, hook = exact, injected(alpha, noises)
    if told:
        knowing = Told(exact, alpha, noises)
        denoiser, hook = knowing, knowing.hook  # type: ignore[assignment]
    made = sample(denoiser, Schedule.edm(18, LOW, HIGH), Heun(), start, state=hook).x
    return left_over(made, mix)


def number(D: float | str) -> float:
    """D from a job's argument: infinity is written as text there."""
    return math.inf if D == "inf" else float(D)
