"""How far samples are from data: Fréchet distance, energy distance, spectra of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROWS = 1 << 24
"""Numbers that distances between all pairs take at a time."""


@torch.no_grad()
def features_of(features: Callable[[Tensor], Tensor], samples: Tensor, batch: int = 250) -> Tensor:
    """What a function makes of samples (n, ...), in batches: (n, d) in double precision.

    Args:
        features: such as the last hidden layer of a classifier in evaluation mode.
        samples: what it takes.
        batch: samples at a time.

    Raises:
        ValueError: it does not return one row per sample.
    """
    parts = []
    for part in samples.split(batch):
        made = features(part)
        if made.dim() < 2 or len(made) != len(part):
            raise ValueError(
                f"features: one row per sample, got {tuple(made.shape)} for {len(part)} samples"
            )
        parts.append(made.flatten(1).double())
    return torch.cat(parts)


def frechet(
    one: Tensor, other: Tensor, features: Callable[[Tensor], Tensor] | None = None
) -> float:
    r"""The Fréchet distance of two sets, as if they were Gaussian:
    :math:`\|m-m'\|^2 + \mathrm{tr}\,(C + C' - 2(C^{1/2} C' C^{1/2})^{1/2})`.

    Few samples make it too large: compare only sets of the same size, and say what data against
    data give.

    Args:
        one, other: (n, ...) each, two rows or more.
        features: turns samples into rows (n, d); left out, the numbers themselves are compared.

    Raises:
        ValueError: fewer than two rows, other widths, or numbers that are not finite.
    """
    sides = []
    for name, rows in (("one", one), ("other", other)):
        made = rows.double().flatten(1) if features is None else features_of(features, rows)
        if len(made) < 2:
            raise ValueError(f"{name}: two rows or more, got {len(made)}")
        _finite(made, name)
        sides.append(made)
    _same_width(*sides)
    (mean, spread), (other_mean, other_spread) = ((s.mean(0), s.mT.cov()) for s in sides)
    spread, other_spread = spread.reshape(mean.numel(), -1), other_spread.reshape(mean.numel(), -1)
    values, vectors = torch.linalg.eigh(spread)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    crossed = torch.linalg.eigvalsh(root @ other_spread @ root).clamp(min=0).sqrt().sum()
    total = (mean - other_mean).square().sum() + spread.trace() + other_spread.trace() - 2 * crossed
    return max(0.0, float(total))


def energy_distance(one: Tensor, other: Tensor) -> float:
    r"""The energy distance :math:`2E\|X-Y\| - E\|X-X'\| - E\|Y-Y'\|`, which is 0 only for equal
    distributions.

    Pairs of a sample with itself are left out, so for equal distributions it is 0 on average, and
    can be slightly negative.

    Args:
        one, other: (n, ...) each, two rows or more.

    Raises:
        ValueError: fewer than two rows, other widths, or numbers that are not finite.
    """
    sides = [rows.double().flatten(1) for rows in (one, other)]
    for name, rows in zip(("one", "other"), sides, strict=True):
        if len(rows) < 2:
            raise ValueError(f"{name}: two rows or more, got {len(rows)}")
        _finite(rows, name)
    _same_width(*sides)
    x, y = sides
    within = [_total(s, s) / (len(s) * (len(s) - 1)) for s in sides]
    return 2 * _total(x, y) / (len(x) * len(y)) - sum(within)


def spectrum(images: Tensor, bins: int | None = None) -> tuple[Tensor, Tensor]:
    """The mean power of images by frequency, over rings around frequency 0.

    Args:
        images: (n, channels, height, width).
        bins: rings up to half a cycle per pixel; left out, half the shorter side. What lies
            beyond, in the corners, is left out.

    Returns:
        Middles of the rings (bins,) in cycles per pixel, and power (bins,): squared numbers of
        the orthonormal transform, the mean over what lies in a ring, images and channels.

    Raises:
        ValueError: another shape, or a ring without a frequency.
    """
    power, radius = _power(images)
    count = bins or min(images.shape[-2:]) // 2
    # rings are centred on multiples of their width, so frequency 0 has one of its own
    ring = (radius * 2 * count).round().long()
    inside = ring <= count
    sums = torch.zeros(count + 1, dtype=power.dtype, device=power.device)
    sizes = sums.index_add(0, ring[inside], torch.ones_like(power[inside]))
    if not bool((sizes > 0).all()):
        raise ValueError(f"bins: {bins} rings are more than these images tell apart; take fewer")
    middles = torch.arange(count + 1, device=power.device) / (2 * count)
    return middles, sums.index_add(0, ring[inside], power[inside]) / sizes


def high_share(images: Tensor, above: float = 0.25) -> float:
    """The share of the energy that lies above a frequency, the mean of each image left out.

    Args:
        images: (n, channels, height, width).
        above: in cycles per pixel; 0.25 is half the highest along an axis.

    Raises:
        ValueError: another shape, a frequency outside 0 to 0.71, or images without any contrast.
    """
    if not 0 <= above < 0.5**0.5:
        raise ValueError(f"above: from 0 to 0.71 cycles per pixel, got {above}")
    power, radius = _power(images)
    total = power[radius > 0].sum()
    if not total > 0:
        raise ValueError("images: they have no contrast, so nothing to share out")
    return float(power[radius > above].sum() / total)


def _power(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared coefficients and frequencies in cycles per pixel, both (height, width)."""
    if images.dim() != 4 or not images.numel():
        raise ValueError(f"images: (n, channels, height, width), got {tuple(images.shape)}")
    _finite(images, "images")
    power = torch.fft.fft2(images.double(), norm="ortho").abs().square().mean((0, 1))
    down, right = (torch.fft.fftfreq(n, device=images.device) for n in images.shape[-2:])
    return power, torch.hypot(down[:, None].double(), right.double())


def _total(one: Tensor, other: Tensor) -> float:
    """The sum of the distances of all pairs, without the loss of digits of a matrix product."""
    rows = max(1, ROWS // len(other))
    exact: Any = "donot_use_mm_for_euclid_dist"
    return sum(float(torch.cdist(p, other, compute_mode=exact).sum()) for p in one.split(rows))


def _same_width(one: Tensor, other: Tensor) -> None:
    if one.shape[1] != other.shape[1]:
        raise ValueError(
            f"one, other: rows of the same width, got {one.shape[1]} and {other.shape[1]}"
        )


def _finite(rows: Tensor, name: str) -> None:
    if not bool(rows.isfinite().all()):
        raise ValueError(f"{name}: holds numbers that are not finite; leave such samples out")
