"""Digits drawn at twice the size that a denoiser learned, by several ways, and how they are judged.

Two beds. ``open``: the denoiser of 28 x 28 draws 56 x 56, of which no true images exist. ``known``:
a denoiser of 16 x 16, which are MNIST's 28 x 28 in a frame and averaged, draws 32 x 32, and the
inner 28 x 28 are compared with true images. At ``ci`` both are the denoiser of 8 x 8, and test
images that were enlarged stand in for the truth.
"""

from __future__ import annotations

import dataclasses
import functools
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
from toolkit.core.seeds import generator
from toolkit.generate.diffusehigh import DiffuseHigh, Guide, enlarge, sharpen
from toolkit.labs.beds import denoiser, denoiser_half

BEDS = ("open", "known")
STEPS = 20
"""Of every schedule here, EDM's."""
HALF = 0.25
"""Cycles per pixel at the larger size; an image of the native size holds none above."""
MOST_DB = 60.0
"""Agreement counts up to here, so that an exact image does not count without bound."""
BATCH = 50


@dataclass(frozen=True)
class Bed:
    """A denoiser, and what its larger pictures are compared with.

    Attributes:
        name: of the bed; its noises are its own.
        network: a denoiser of images from -1 to 1.
        side: pixels of a side that it learned; it draws twice as many.
        crop: pixels of the frame at the larger size, left out before images are judged.
        truth: test images (n, 1, height, width) from 0 to 1 without the frame. On a bed where no
            larger ones exist they are of the native size, and so are pictures when compared.
        scale: of the classifier that reads them.
    """

    name: str
    network: Preconditioned
    side: int
    crop: int
    truth: Tensor
    scale: str

    def inner(self, pictures: Tensor) -> Tensor:
        """Pictures without their frame."""
        high, wide = pictures.shape[-2:]
        return pictures[..., self.crop : high - self.crop, self.crop : wide - self.crop]


@functools.lru_cache(maxsize=2)
def bed(name: str, scale: str) -> Bed:
    """One of the two beds.

    Raises:
        ValueError: an unknown name or scale.
        toolkit.core.data.DataError: MNIST or a base is nowhere to be found.
    """
    if name not in BEDS:
        raise ValueError(f"bed: one of {', '.join(BEDS)}, got {name!r}")
    side = denoiser.size(scale).side
    images = to_picture(denoiser.load(scale).test[0])
    if name == "known" and side != 8:
        network, crop = denoiser_half.network().eval(), denoiser_half.FRAME
        return Bed(name, network, denoiser_half.SIDE, crop, images, scale)
    if name == "known":
        images = F.interpolate(images, scale_factor=2, mode="bilinear")
    return Bed(name, denoiser.network(scale).eval(), side, 0, images, scale)


def to_state(picture: Tensor) -> Tensor:
    """From 0 to 1, to -1 to 1."""
    return 2 * picture - 1


def to_picture(state: Tensor) -> Tensor:
    """From -1 to 1, to 0 to 1."""
    return (state + 1) / 2


def method(**changed: Any) -> DiffuseHigh:
    """DiffuseHigh as these beds use it: Haar, no guidance by class, and the shares of steps that
    are published, 15 and 5 of 50, of 20."""
    same = DiffuseHigh(wavelet="haar", guidance=1.0, guidance_high=1.0).at(STEPS)
    return dataclasses.replace(same, **changed)


class OwnMeans(DiffuseHigh):
    """DiffuseHigh, but the native picture's own pixels are held and not the guide's: the low band
    of Haar is twice the means of 2 x 2 pixels, so the native picture takes its place."""

    def guide(self, picture: Tensor, size: Any) -> Guide:
        """See :meth:`DiffuseHigh.guide`; for one level of Haar and twice the size only."""
        return Guide(super().guide(picture, size).picture, 2 * picture)


def own_means(of: DiffuseHigh) -> OwnMeans:
    """The same settings, with the native picture's pixels held."""
    return OwnMeans(**{f.name: getattr(of, f.name) for f in dataclasses.fields(of)})


class Drawn:
    """The native pictures of one seed, and ways to draw them larger from the same noise.

    Args:
        bed: where.
        seed: names a set of noises, apart from that of every other seed.
        count: of pictures; their classes go round.
    """

    def __init__(self, bed: Bed, seed: int, count: int) -> None:
        self.bed = bed
        draws = Draws(range(10_000 * seed, 10_000 * seed + count), "enlarged", bed.name)
        self.labels = torch.arange(count) % denoiser.CLASSES
        self.schedule = Schedule.edm(STEPS)
        small = draws.normal((1, bed.side, bed.side))
        self.noise = draws.normal((1, 2 * bed.side, 2 * bed.side))
        self.native = self._whole(small)

    def _whole(self, noise: Tensor) -> Tensor:
        start = self.schedule.levels[0].std * noise
        parts = zip(start.split(BATCH), self.labels.split(BATCH), strict=True)
        made = [sample(self.bed.network, self.schedule, DDIM(), x, labels=y).x for x, y in parts]
        return to_picture(torch.cat(made)).clamp(0, 1)

    def direct(self) -> Tensor:
        """The network alone, at the larger size from the start."""
        return self._whole(self.noise)

    def enlarged(self, strength: float = 0.0) -> Tensor:
        """No network: bicubic, then sharpened."""
        return sharpen(enlarge(self.native, 2 * self.bed.side), strength)

    def high(self, how: DiffuseHigh) -> Tensor:
        """One stage of DiffuseHigh, or of what is made of it."""
        rows = [part.split(BATCH) for part in (self.native, self.noise, self.labels)]
        return torch.cat([
            how.stage(
                self.bed.network, self.schedule, x, 2 * self.bed.side, noise, labels=y,
                encode=to_state, decode=to_picture,
            ).picture
            for x, noise, y in zip(*rows, strict=True)
        ])  # fmt: skip


class Reference:
    """Test images for one seed, drawn without repeats: as many as there are pictures, and as many
    again to see what true images give."""

    def __init__(self, bed: Bed, seed: int, count: int) -> None:
        order = torch.randperm(len(bed.truth), generator=generator(seed, "reference"))
        if 2 * count > len(order):
            raise ValueError(f"count: at most {len(order) // 2} pictures, got {count}")
        self.images = bed.truth[order[: 2 * count]]
        seen = denoiser.features(to_state(self.images), bed.scale)[0]
        self.seen, self.again = seen.split(count)

    def distance(self, seen: Tensor) -> float:
        """The Fréchet distance of a classifier's features (n, d) to those of the first half."""
        return frechet(seen, self.seen)


def judged(pictures: Tensor, drawn: Drawn, reference: Reference) -> dict[str, float]:
    """What pictures (n, 1, side, side) of the larger size are like; brightness is cut to 0 to 1.

    Returns:
        ``agreement``: PSNR of their block means to the native picture in dB, the mean over
        pictures. ``read``: share that is read as its class, in percent. ``whole``: share with
        exactly one piece brighter than one half, in percent. ``fine``: energy per pixel above
        :data:`HALF`, in millionths. ``frechet``: distance to test images in the features of the
        images bed's CNN, at the size of those images.
    """
    bed, pictures = drawn.bed, pictures.clamp(0, 1)
    errors = (F.avg_pool2d(pictures, 2) - drawn.native).square().flatten(1).mean(1)
    inner = bed.inner(pictures)
    fits = inner.shape[-1] == bed.truth.shape[-1]
    seen, scores = denoiser.features(to_state(inner if fits else F.avg_pool2d(inner, 2)), bed.scale)
    return {
        "agreement": float((-10 * errors.log10()).clamp(max=MOST_DB).mean()),
        "read": 100 * float((scores.argmax(1) == drawn.labels).double().mean()),
        "whole": whole(inner),
        "fine": fine(inner),
        "frechet": reference.distance(seen),
    }


def fine(pictures: Tensor) -> float:
    """Energy per pixel above :data:`HALF` cycles per pixel, in millionths."""
    power = torch.fft.fft2(pictures.double(), norm="ortho").abs().square().mean((0, 1))
    down, right = (torch.fft.fftfreq(n) for n in pictures.shape[-2:])
    return 1e6 * float(power[torch.hypot(down[:, None], right) > HALF].sum() / power.numel())


def whole(pictures: Tensor) -> float:
    """The share of pictures (n, 1, height, width) with exactly one piece brighter than one half,
    in percent; pixels that touch at a corner belong together."""
    from scipy import ndimage

    touching = np.zeros((3, 3, 3), int)
    touching[1] = 1  # within a picture, never from one to the next
    marks, _ = ndimage.label((pictures[:, 0] > 0.5).numpy(), touching)
    rows = marks.reshape(len(marks), -1)
    # labels are given picture by picture, so a picture's pieces are a range of numbers
    least = np.where(rows > 0, rows, marks.max() + 1).min(1)
    return 100 * float((rows.max(1) == least).mean())
