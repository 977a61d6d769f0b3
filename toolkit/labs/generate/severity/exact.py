"""Classes whose score is known exactly: what the rounds of PIE do there, beside the formulas.

A class is one round Gaussian, or four of them, as of a digit written in four ways. Patients come
from another class. There are 16 numbers to an image and no mask, or a mask of all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.core.sample.metrics import energy_distance
from toolkit.core.sample.mixtures import Mixture
from toolkit.core.sample.schedule import Betas, Schedule
from toolkit.core.seeds import generator
from toolkit.generate.pie import PIE, ddim_factor, expected_path, leading
from toolkit.labs.beds import arms

DIMENSIONS = 16
SPREADS = {"one Gaussian": 0.5, "four Gaussians": 0.3}
"""Standard deviation within each Gaussian of a class."""
BETA = 0.75
STRENGTHS = (0.1, 0.2, 0.35, 0.5, 0.7)
"""At which the direction of a round is looked at."""


@dataclass(frozen=True)
class Size:
    """Numbers of one scale: rounds, DDIM steps before they are cut, patients, noises of each for
    paths, and for one mean step."""

    rounds: int
    steps: int
    patients: int
    noises: int
    directions: int


SIZES = {"ci": Size(4, 12, 4, 4, 16), "cpu": Size(10, 50, 32, 16, 128)}


def size(scale: str) -> Size:
    """The sizes of a scale; ``gpu`` takes those of ``cpu``."""
    return SIZES[arms.sizes_of(scale)]


def schedule(scale: str) -> Schedule:
    """DDIM steps of Stable Diffusion's noise, as in the official code."""
    return leading(Betas.scaled_linear(), size(scale).steps)


def world(kind: str, seed: int) -> Mixture:
    """The class of a seed."""
    draws = generator(seed, "severity", "class", kind)
    count = 1 if kind == "one Gaussian" else 4
    means = torch.randn(count, DIMENSIONS, dtype=torch.float64, generator=draws)
    return Mixture(means, SPREADS[kind])


def patients(count: int, seed: int) -> Tensor:
    """Originals (count, 16): draws around another point."""
    draws = generator(seed, "severity", "patients")
    centre = torch.randn(1, DIMENSIONS, dtype=torch.float64, generator=draws)
    return centre + 0.3 * torch.randn(count, DIMENSIONS, dtype=torch.float64, generator=draws)


def paired_noise(rounds: int, states: int, noises: int, seed: int, name: str) -> Tensor:
    """Normal numbers (rounds, states * noises, 16), the second half of each state's the negatives
    of the first. So a mean over noises lacks what is odd in them, whatever their number."""
    draws = generator(seed, "severity", "noise", name)
    half = torch.randn(
        rounds, states, noises // 2, DIMENSIONS, dtype=torch.float64, generator=draws
    )
    return torch.cat([half, -half], 2).view(rounds, states * noises, DIMENSIONS)


def run(
    mix: Mixture, x: Tensor, noise: Tensor, scale: str, strength: float, beta: float = 1.0
) -> Tensor:
    """Paths (rounds + 1, states, noises, 16) of images (states, 16).

    Args:
        mix: the class.
        x: images.
        noise: (rounds, states * noises, 16).
        scale: of the sizes.
        strength, beta: of PIE; with a beta of 1 there is no mask, else one of the whole image.
    """
    each = noise.shape[1] // len(x)
    method = PIE(rounds=len(noise), strength=strength, inside=beta, guidance=1.0, known="none")
    mask = None if beta == 1 else torch.ones(DIMENSIONS)
    lanes = x.repeat_interleave(each, 0)
    made = method.edit(mix.denoise, schedule(scale), lanes, mask=mask, noise=noise)
    return made.path.view(len(noise) + 1, len(x), each, DIMENSIONS)


def courses(kind: str, strength: float, beta: float, seed: int, scale: str) -> dict[str, Any]:
    """How paths change round by round, and where they end.

    Returns:
        Lists over the rounds, in root mean squares per number: ``path``, the change of single
        paths; ``mean``, that of a patient's mean over noises; ``formula``, what the formula of one
        Gaussian of the class's mean and spread says of it. ``end``, ``start``: energy distance of
        the last and the first images to as many draws of the class. ``own``: correlation of the
        last images with the originals, over patients.
    """
    this, mix = size(scale), world(kind, seed)
    x = patients(this.patients, seed)
    noise = paired_noise(this.rounds, len(x), this.noises, seed, kind)
    paths = run(mix, x, noise, scale, strength, beta)
    part = PIE(strength=strength).part(schedule(scale))
    centre, spread = moments(mix)
    factor = part.levels[0].alpha * ddim_factor(part, spread)
    said = expected_path(x, centre[None], factor, beta, this.rounds)
    last, first = paths[-1].flatten(0, 1), paths[0].flatten(0, 1)
    real, _ = mix.draw(len(last), generator(seed, "severity", "real", kind), torch.float64)
    return {
        "path": _rms(paths.diff(dim=0)), "mean": _rms(paths.mean(2).diff(dim=0)),
        "formula": _rms(said.diff(dim=0)),
        "end": energy_distance(last, real), "start": energy_distance(first, real),
        "own": _correlation(last, first),
    }  # fmt: skip


def direction(kind: str, strength: float, seed: int, scale: str) -> tuple[float, float, float]:
    """The mean step of a round beside the gradient of the noised class's log density.

    Looked at for four patients as they are, after one round and after three.

    Returns:
        Their cosine; the step's length in steps of Langevin dynamics; and its share of a round's
        movement, the rest being noise. All are means.
    """
    mix, steps = world(kind, seed), schedule(scale)
    level = PIE(strength=strength).part(steps).levels[0]
    begun = run(mix, patients(4, seed), paired_noise(3, 4, 2, seed, "begun"), scale, strength)
    states = begun[[0, 1, 3], :, 0].flatten(0, 1)
    noise = paired_noise(1, len(states), size(scale).directions, seed, "step")
    moved = run(mix, states, noise, scale, strength)[1] - states[:, None]
    step, slope = moved.mean(1), mix.score(level.alpha * states, level)
    # a Langevin step of noise sigma in clean images goes sigma^2 / 2 along their gradient
    small = level.sigma**2 / 2 * level.alpha * slope
    whole = moved.square().sum(2).mean(1)
    return (
        float(F.cosine_similarity(step, slope, dim=1).mean()),
        float((step.norm(dim=1) / small.norm(dim=1)).mean()),
        float((step.square().sum(1) / whole).mean()),
    )


def moments(mix: Mixture) -> tuple[Tensor, float]:
    """Mean (16,) of a class and its standard deviation per number."""
    centre = mix.means.mean(0)
    variance = mix.scales.square().mean() + (mix.means - centre).square().mean()
    return centre, float(variance.sqrt())


def _rms(gaps: Tensor) -> list[float]:
    return [float(f"{v:.5g}") for v in gaps.square().flatten(1).mean(1).sqrt().tolist()]


def _correlation(one: Tensor, other: Tensor) -> float:
    """Mean over the numbers of an image of their correlation over patients."""
    one, other = one - one.mean(0), other - other.mean(0)
    return float(((one * other).sum(0) / (one.norm(dim=0) * other.norm(dim=0))).mean())
