"""A small denoiser of digits of 8 x 8 pixels, trained with one of five laws of noise.

Two of them are controls that the paper lacks, both with Gaussian directions and no field: levels
that are spread wider, and a scale that is drawn per image but not told, log-normal and spread as
that of D = 16.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core import data
from toolkit.core.nets.unet import Waves
from toolkit.core.sample.draws import gamma_quantiles
from toolkit.core.sample.loop import sample
from toolkit.core.sample.metrics import frechet
from toolkit.core.sample.plans import Heun
from toolkit.core.sample.precondition import Preconditioned
from toolkit.core.sample.schedule import Schedule
from toolkit.core.seeds import generator
from toolkit.core.train import rates
from toolkit.core.train.fit import fit
from toolkit.generate.pfgmpp import PFGMpp, Told, injected
from toolkit.labs.beds import arms as shared

PIXELS = 64
LOW, HIGH = 0.01, 20.0
"""Ends of the noise in sampling."""
SPREAD = 0.75
"""Standard deviation of the digits' pixels, from -1 to 1."""


@dataclass(frozen=True)
class Law:
    """Noise to train and to start with.

    Args:
        D: extra dimensions.
        levels: standard deviation of the logarithm of the noise levels in training.
        random_scale: the scale is log-normal, spread as that of ``D``, and the direction Gaussian.
    """

    D: float
    levels: float = 1.2
    random_scale: bool = False

    @property
    def method(self) -> PFGMpp:
        """The method that trains with it."""
        D = math.inf if self.random_scale else self.D
        return PFGMpp(D=D, sigma_data=SPREAD, P_mean=-1.0, P_std=self.levels)

    def offset(self, sigma: Tensor | float, normals: Tensor, uniforms: Tensor) -> Tensor:
        """Noise (batch, 64) of levels from normal and uniform numbers, (batch, 64) and (batch,)."""
        if self.random_scale:
            sigma = sigma * lognormal(uniforms, self.D).to(normals.dtype)
        finite = not math.isinf(self.method.D)
        taus = gamma_quantiles(uniforms.clamp(min=2.0**-54), self.D) if finite else None
        return self.method.offset(sigma, normals, taus=taus)


ARMS = {
    "16": Law(16.0),
    "64": Law(64.0),
    "inf": Law(math.inf),
    "wide": Law(math.inf, levels=1.8),
    "scale": Law(16.0, random_scale=True),
}


def lognormal(uniforms: Tensor, D: float) -> Tensor:
    """Scales whose logarithm is normal and spread as that of Student-t noise of this D."""
    from scipy import special

    spread = math.sqrt(float(special.polygamma(1, D / 2))) / 2
    return (spread * torch.special.ndtri(uniforms.clamp(2.0**-54, 1 - 2.0**-54))).exp()


@dataclass(frozen=True)
class Size:
    """Numbers of one scale."""

    width: int
    steps: int
    batch: int
    samples: int
    tuned: int


SIZES = {"ci": Size(16, 30, 64, 150, 150), "cpu": Size(128, 1500, 128, 2500, 1000)}


def size(scale: str) -> Size:
    """The sizes of a scale; ``gpu`` takes those of ``cpu``."""
    return SIZES[shared.sizes_of(scale)]


class Block(nn.Module):
    """Two layers beside a skip, told the noise in between."""

    def __init__(self, width: int, code: int) -> None:
        super().__init__()
        self.norm, self.affine = nn.LayerNorm(width), nn.Linear(code, width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """(batch, width) and (batch, code) to (batch, width)."""
        return x + self.second(F.silu(self.first(self.norm(x)) + self.affine(code)))


class Net(nn.Module):
    """Three blocks over 64 pixels; its output starts at zero. Layers that the official code does
    not round to few bits bear the names by which it skips them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Sequential(Waves(32), nn.Linear(32, 32), nn.SiLU())
        self.stem = nn.Linear(PIXELS, width)
        self.blocks = nn.ModuleList(Block(width, 32) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, PIXELS)

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """(batch, 64) and (batch,) to (batch, 64)."""
        code, h = self.map(noise), self.stem(x)
        for block in self.blocks:
            h = block(h, code)
        return self.head(F.silu(self.norm(h)))


class Trained(nn.Module):
    """Gives the method's loss of a batch, so that the shared loop can train it."""

    def __init__(self, denoiser: Preconditioned, method: PFGMpp) -> None:
        super().__init__()
        self.denoiser, self.method = denoiser, method

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Clean samples, levels and noise to weighted errors."""
        return self.method.loss(self.denoiser, *batch)


@functools.lru_cache(maxsize=1)
def digits() -> Tensor:
    """All 1,797 digits of scikit-learn, (1797, 64) from -1 to 1."""
    found = data.load("digits")
    x = torch.cat([torch.from_numpy(part).float() for part in (found.x_train, found.x_test)])
    return (x / x.max() * 2 - 1).flatten(1)


def split(seed: int) -> tuple[Tensor, Tensor]:
    """1,437 digits to learn from and 360 that are held out, drawn anew for each seed."""
    order = torch.randperm(len(digits()), generator=generator(seed, "split"))
    return digits()[order[:1437]], digits()[order[1437:]]


def train(arm: str, rate: float, seed: int, scale: str) -> Preconditioned:
    """A denoiser trained with one law: Adam, gradients clipped at 1, the rate warmed up and falling
    along half a cosine, weights averaged over about 100 steps. All arms see the same images, levels
    (but for their spread) and normal numbers in the same order."""
    this, law, (pool, _) = size(scale), ARMS[arm], split(seed)
    draws = generator(seed, "training")
    net = Net(this.width)
    for part in net.modules():
        if isinstance(part, nn.Linear):
            nn.init.kaiming_uniform_(part.weight, a=math.sqrt(5), generator=draws)
            nn.init.zeros_(part.bias)
    nn.init.zeros_(net.head.weight)
    denoiser = Preconditioned(net, SPREAD)
    average = copy.deepcopy(denoiser)
    ours, theirs = list(average.parameters()), list(denoiser.parameters())

    def stream() -> Iterator[tuple[Any, None]]:
        for _ in range(this.steps):
            y = pool[torch.randint(len(pool), (this.batch,), generator=draws)]
            sigma = law.method.levels(torch.randn(this.batch, generator=draws))
            normals = torch.randn(y.shape, generator=draws)
            uniforms = torch.rand(this.batch, dtype=torch.float64, generator=draws)
            yield (y, sigma, law.offset(sigma, normals, uniforms)), None

    def step(loss: Any, optimizer: Any, adapted: Any) -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(theirs, 1.0)
        optimizer.step()
        return value

    @torch.no_grad()
    def follow(number: int, adapted: Any, model: nn.Module) -> None:
        torch._foreach_lerp_(ours, theirs, 1 - min(0.99, (1 + number) / (10 + number)))

    fit(
        Trained(denoiser, law.method), None, rate, seed, stream(), lambda error, _: error.mean(),
        steps=this.steps, step=step, watch=follow,
        decay=lambda at, of: min(1.0, (at + 1) / 50) * rates.cosine(at, of),
    )  # fmt: skip
    return average.eval()


@torch.no_grad()
def samples(
    denoiser: Any, arm: str, seed: int, count: int, alpha: float = 0.0, steps: int = 18,
    told: bool = False,
) -> Tensor:  # fmt: skip
    """Samples (count, 64), from normal and uniform numbers that are the same for all arms.

    Args:
        denoiser: ``denoiser(x, level)``.
        arm: whose law the start has.
        seed: of all numbers.
        count: how many.
        alpha: noise injected before every step.
        steps: of Heun's method.
        told: the denoiser is told how much noise the injections leave.
    """
    draws, inside = generator(seed, "start"), generator(seed, "inside")
    normals = torch.randn(count, PIXELS, generator=draws)
    uniforms = torch.rand(count, dtype=torch.float64, generator=draws)
    start = ARMS[arm].offset(HIGH, normals, uniforms)

    def noises(number: int, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=inside)

    schedule, hook = Schedule.edm(steps, LOW, HIGH), injected(alpha, noises)
    if told:
        denoiser = Told(denoiser, alpha, noises)
        hook = denoiser.hook
    return sample(denoiser, schedule, Heun(), start, state=hook).x


def distance(made: Tensor) -> float:
    """Fréchet distance of samples to all digits, in their 64 pixels."""
    return frechet(made, digits())


@torch.no_grad()
def misled(denoiser: Any, seed: int, told: float, factors: tuple[float, ...]) -> list[float]:
    """Squared error per pixel of denoising held-out digits whose Gaussian noise is a factor off
    what is told, on the same noise for every factor."""
    clean = split(seed)[1]
    noise = torch.randn(clean.shape, generator=generator(seed, "misled"))
    sigma = torch.full((len(clean),), told)
    return [
        float((denoiser(clean + factor * told * noise, sigma) - clean).square().mean())
        for factor in factors
    ]
