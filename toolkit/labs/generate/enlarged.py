"""Digits drawn at twice the size that a denoiser learned, by several ways, and how they are judged.

Two beds. ``open``: the denoiser of 28 x 28 draws 56 x 56, and no true images of that size exist.
``known``: a denoiser of 16 x 16 draws 32 x 32, of which the inner 28 x 28 are compared with true
images. At ``ci`` both are the denoiser of 8 x 8, and test images enlarged stand in for the truth.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.core.sample.draws import Draws
from toolkit.core.sample.loop import sample
from toolkit.core.sample.metrics import frechet
from toolkit.core.sample.plans import DDIM
from toolkit.core.sample.precondition import Preconditioned
from toolkit.core.sample.schedule import Schedule
from toolkit.generate.diffusehigh import DiffuseHigh, Guide, dwt, enlarge, sharpen
from toolkit.labs.beds import denoiser, denoiser_half

BEDS = ("open", "known")
STEPS = 20
HALF = 0.25
"""Cycles per pixel at the larger size: what lies above does not exist at the native one."""
MOST_DB = 60.0
"""Agreement counts up to here, so that an exact image does not count without bound."""


@dataclass(frozen=True)
class Bed:
    """A denoiser, the side that it learned, and images of twice the side to compare with.

    Attributes:
        network: a denoiser of images from -1 to 1.
        side: pixels.
        crop: pixels of a frame that is left out before images are judged.
        truth: (n, 1, height, width) from 0 to 1, without the frame; at half the size on a bed
            where no larger ones exist.
        scale: of the reader.
    """

    network: Preconditioned
    side: int
    crop: int
    truth: Tensor
    scale: str


@functools.lru_cache(maxsize=2)
def bed(name: str, scale: str) -> Bed:
    """One of the two beds.

    Raises:
        ValueError: an unknown name or scale.
        toolkit.core.data.DataError: MNIST or a base is nowhere to be found.
    """
    if name not in BEDS:
        raise ValueError(f"bed: one of {', '.join(BEDS)}, got {name!r}")
    small = denoiser.size(scale).side == 8
    images = (denoiser.load(scale).test[0] + 1) / 2
    if small and name == "known":
        images = F.interpolate(images, scale_factor=2, mode="bilinear")
    if small or name == "open":
        return Bed(denoiser.network(scale).eval(), denoiser.size(scale).side, 0, images, scale)
    return Bed(denoiser_half.network().eval(), denoiser_half.SIDE, denoiser_half.FRAME, images, scale)


def to_state(picture: Tensor) -> Tensor:
    """From 0 to 1, to -1 to 1."""
    return 2 * picture - 1


def to_picture(state: Tensor) -> Tensor:
    """From -1 to 1, to 0 to 1."""
    return (state + 1) / 2


def method(**changed: Any) -> DiffuseHigh:
    """DiffuseHigh as these beds use it: no guidance by class, Haar, and the shares of steps that
    are published, 15 and 5 of 50, of :data:`STEPS`."""
    options: dict[str, Any] = {"guidance": 1.0, "guidance_high": 1.0, "wavelet": "haar"}
    return DiffuseHigh(**options | {"renoised": 6, "guided": 2} | changed)


class Drawn:
    """The native pictures of one seed, and ways to draw them larger from the same noise.

    Args:
        bed: where.
        seed: a set of noises, apart from that of every other seed.
        count: of pictures; their classes go round.
    """

    def __init__(self, bed: Bed, seed: int, count: int) -> None:
        self.bed, self.count = bed, count
        draws = Draws(range(10_000 * seed, 10_000 * seed + count), "enlarged")
        small, large = bed.side, 2 * bed.side
        self.labels = torch.arange(count) % denoiser.CLASSES
        self.schedule = Schedule.edm(STEPS)
        self.noise = draws.normal((1, small, small))
        self.larger = draws.normal((1, large, large))
        self.native = self._whole(self.noise)

    def _whole(self, noise: Tensor) -> Tensor:
        start = self.schedule.levels[0].std * noise
        made = [
            sample(self.bed.network, self.schedule, DDIM(), x, labels=y).x
            for x, y in zip(start.split(50), self.labels.split(50), strict=True)
        ]
        return to_picture(torch.cat(made)).clamp(0, 1)

    def direct(self) -> Tensor:
        """The network alone at the larger size."""
        return self._whole(self.larger)

    def bicubic(self) -> Tensor:
        """The native pictures enlarged."""
        return enlarge(self.native, 2 * self.bed.side)

    def sharpened(self, strength: float = 1.0) -> Tensor:
        """Enlarged and sharpened."""
        return sharpen(self.bicubic(), strength)

    def high(self, method: DiffuseHigh) -> Tensor:
        """DiffuseHigh."""
        parts = zip(self.native.split(50), self.larger.split(50), self.labels.split(50), strict=True)
        return torch.cat([
            method.stage(
                self.bed.network, self.schedule, x, 2 * self.bed.side, noise, labels=y,
                encode=to_state, decode=to_picture,
            ).picture
            for x, noise, y in parts
        ])  # fmt: skip

    def own_means(self, method: DiffuseHigh) -> Tensor:
        """DiffuseHigh whose block means are those of the native picture, not of the guide."""
        class Held(DiffuseHigh):
            def guide(held, picture: Tensor, size: Any) -> Guide:
                made = super().guide(picture, size)
                return Guide(made.picture, 2 * picture)
        return self.high(Held(**{f: getattr(method, f) for f in method.__dataclass_fields__}))


def judged(pictures: Tensor, drawn: Drawn) -> dict[str, float]:
    """Numbers for pictures (n, 1, side, side) from 0 to 1 of the larger size."""
    bed, crop = drawn.bed, drawn.bed.crop
    pictures = pictures.clamp(0, 1)
    small = F.avg_pool2d(pictures, 2)
    errors = (small - drawn.native).square().flatten(1).mean(1).clamp(min=10 ** (-MOST_DB / 10))
    inner = pictures[..., crop:pictures.shape[-2] - crop, crop:pictures.shape[-1] - crop]
    fits = inner.shape[-1] == bed.truth.shape[-1]
    seen, scores = denoiser.features(to_state(inner if fits else F.avg_pool2d(inner, 2)), bed.scale)
    return {
        "agreement": float((-10 * errors.log10()).mean()),
        "read": 100 * float((scores.argmax(1) == drawn.labels).double().mean()),
        "whole": 100 * float((pieces(inner) == 1).mean()),
        "detail": math.log10(fine(inner)),
    }, seen


def fine(pictures: Tensor) -> float:
    """Energy above :data:`HALF`, per picture and pixel."""
    power = torch.fft.fft2(pictures.double(), norm="ortho").abs().square().mean((0, 1))
    y, x = (torch.fft.fftfreq(n) for n in pictures.shape[-2:])
    return float(power[torch.hypot(y[:, None], x) > HALF].sum() / power.numel())


def pieces(pictures: Tensor) -> Any:
    """How many pieces brighter than one half each picture has, corners touching."""
    from scipy import ndimage
    stack = (pictures[:, 0] > 0.5).numpy()
    touching = np.zeros((3, 3, 3)); touching[1] = 1
    marks, total = ndimage.label(stack, touching)
    flat = marks.reshape(len(marks), -1)
    return np.array([len(np.unique(row[row > 0])) for row in flat])
