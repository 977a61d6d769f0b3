"""What is done to handwriting: PIE and its variants, one edit of any strength, a walk, a blend."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.core.sample.loop import sample
from toolkit.core.sample.metrics import energy_distance
from toolkit.core.sample.plans import DDIM
from toolkit.core.sample.schedule import Betas, Schedule
from toolkit.core.seeds import generator
from toolkit.generate.pie import PIE, Progress, inverted, leading
from toolkit.labs.beds import arms as beds
from toolkit.labs.beds import denoiser
from toolkit.labs.generate.severity import world
from toolkit.labs.generate.severity.world import Task


@dataclass(frozen=True)
class Size:
    """Numbers of one scale: rounds, DDIM steps before they are cut, images of each pair for the
    main arms and for the others, and real images that samples are compared with."""

    rounds: int
    steps: int
    each: int
    few: int
    reals: int


SIZES = {"ci": Size(4, 6, 2, 2, 40), "cpu": Size(10, 16, 16, 2, 400)}
BASE = PIE(strength=0.5, guidance=3.0)
"""The code's defaults but for guidance, which small networks want weaker."""
PLAIN = 0.35
"""Strength of rounds without a mask."""
MASKED_ONCE = (0.5, 0.6, 0.7, 0.8)
PLAIN_ONCE = (0.4, 0.5, 0.6, 0.7)
"""Strengths of a single edit, with the mask and without."""
VARIANTS: dict[str, dict[str, Any]] = {
    "weak": {"strength": 0.2},
    "half": {"inside": 0.5},
    "whole": {"inside": 1.0},
    "unguided": {"guidance": 1.0},
    "inversion": {"back": "inversion"},
    "previous": {"anchor": "previous", "known": "previous"},
}
"""What differs from :data:`BASE`; all have the mask."""
WALKED = (0.4, 0.6, 0.8, 1.0)
"""Shares of the way from an image's own noise to another's."""
BLENDED = (0.25, 0.5, 0.75, 1.0)
"""Shares of the way from a digit's mean image to the target's, added to an image."""


def size(scale: str) -> Size:
    """The sizes of a scale; ``gpu`` takes those of ``cpu``."""
    return SIZES[beds.sizes_of(scale)]


def schedule(scale: str) -> Schedule:
    """DDIM steps of Stable Diffusion's noise; the last leads to its least noise."""
    return leading(Betas.scaled_linear(), size(scale).steps)


def edited(network: Any, this: Task, method: PIE, masked: bool, seed: int, scale: str) -> Progress:
    """Images of a task taken towards their targets; a seed's noises are the same for all arms."""
    first, second = (world.noise(this.x, method.rounds, seed, name) for name in ("back", "known"))
    return method.edit(
        network, schedule(scale), this.x, this.target, mask=this.mask if masked else None,
        untold=denoiser.UNTOLD, source=this.source, noise=first, known_noise=second,
    )  # fmt: skip


def rounds_of(method: PIE, scale: str, **changes: Any) -> PIE:
    """A method with the rounds of the scale, and changes."""
    return dataclasses.replace(method, **({"rounds": size(scale).rounds} | changes))


def course(made: Progress, this: Task, scale: str) -> dict[str, list[float]]:
    """How images go, round by round, the original first.

    Returns:
        ``confidence``: mean probability of the target, in percent; ``outside``, ``total``: root
        mean square change from the original, outside the mask and everywhere, in grey levels of
        255; ``change``: the same between a round and the one before, inside the mask, from the
        first round on.
    """
    count = len(made.path)
    odds = world.log_odds(made.path.flatten(0, 1), this.target.repeat(count), scale)
    gaps = [x - this.x for x in made.path]
    return {
        "confidence": _short(100 * odds.sigmoid().view(count, -1).mean(1)),
        "outside": _short([_grey(world.rms(gap, 1 - this.mask)) for gap in gaps]),
        "total": _short([_grey(world.rms(gap)) for gap in gaps]),
        "change": _short([_grey(world.rms(gap, this.mask)) for gap in made.path.diff(dim=0)]),
    }


def ends(images: Sequence[Tensor], this: Task, seed: int, scale: str) -> dict[str, list[float]]:
    """How several versions of a task's images are judged.

    Returns:
        ``confidence``, ``outside`` and ``total`` as :func:`course` gives them; ``own``: share, in
        percent, of images whose own original is the nearest of 200 of its digit, by cosine of the
        ViT's features; ``real``: energy distance to real images of the target in the CNN's
        features, the mean over the pairs of digits.
    """
    every, count = torch.cat(list(images)), len(images)
    odds = world.log_odds(every, this.target.repeat(count), scale).view(count, -1)
    features = denoiser.features(every, scale)[0].view(count, len(this.x), -1)
    real = world.real(size(scale).reals, seed, scale)
    known = world.gallery(seed, scale)
    own, *traits = world.traits(torch.cat([this.x, every]), scale).split(len(this.x))
    gaps = [x - this.x for x in images]
    return {
        "confidence": _short(100 * odds.sigmoid().mean(1)),
        "outside": _short([_grey(world.rms(gap, 1 - this.mask)) for gap in gaps]),
        "total": _short([_grey(world.rms(gap)) for gap in gaps]),
        "own": _short([world.recognised(one, own, this.source, known) for one in traits]),
        "real": _short([_from_real(seen, this, real) for seen in features]),
    }


def _from_real(seen: Tensor, this: Task, real: dict[int, Tensor]) -> float:
    gaps = [energy_distance(seen[this.target == b], rows) for b, rows in real.items()]
    return sum(gaps) / len(gaps)


def walk(network: Any, this: Task, seed: int, scale: str) -> list[Tensor]:
    """Images on the way from their own noise, by inversion, to that of another, by slerp.

    Cleaned under the target with the same guidance; the far end is a sample of the target.
    """
    steps = schedule(scale)
    level = steps.levels[0]
    own = inverted(network, steps, this.x, this.source)
    other = level.std * torch.randn(this.x.shape, generator=generator(seed, "severity", "walk"))
    return [
        sample(network, steps, DDIM(), slerp(own, other, share), labels=this.target,
               guidance=BASE.guidance, untold=denoiser.UNTOLD).x
        for share in WALKED
    ]  # fmt: skip


def slerp(one: Tensor, other: Tensor, share: float) -> Tensor:
    """Along the great circle from one noise (batch, ...) to another."""
    a, b = one.flatten(1), other.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = cosine.acos()[:, None]
    mixed = ((1 - share) * angle).sin() * a + (share * angle).sin() * b
    return (mixed / angle.sin()).view_as(one)


def blend(this: Task, scale: str) -> list[Tensor]:
    """Images with shares of the difference of the two digits' mean images added."""
    gap = torch.stack([world.mean(b, scale) - world.mean(a, scale) for a, b in
                       zip(this.source.tolist(), this.target.tolist(), strict=True)])  # fmt: skip
    return [(this.x + share * gap).clamp(-1, 1) for share in BLENDED]


def at_equal(confidence: Sequence[float], values: Sequence[float], wanted: float) -> float:
    """What an arm has where its confidence is as wanted, between two of its strengths.

    Args:
        confidence, values: over growing strengths, the original first.
        wanted: confidence.

    Returns:
        The value, interpolated at the first strength that reaches the confidence; NaN where none
        does.
    """
    if wanted <= confidence[0]:
        return float(values[0])
    for n in range(1, len(confidence)):
        low, high = confidence[n - 1], confidence[n]
        if high >= wanted > low:
            share = (wanted - low) / (high - low)
            return float(values[n - 1] + share * (values[n] - values[n - 1]))
    return float("nan")


def _grey(change: Tensor) -> float:
    """Mean of changes (n,) of images from -1 to 1, in grey levels of 255."""
    return float(change.mean()) * 127.5


def _short(values: Any) -> list[float]:
    """Five digits are enough, and keep results small."""
    return [float(f"{float(v):.5g}") for v in values]
