r"""The terms of the loss: how far one image is from another, one number per image.

.. math::
    P_\kappa = \mathcal F^{-1}\,\mathbb 1\Big[\sqrt{f_x^2 + f_y^2} > \kappa\Big]\,\mathcal F, \qquad
    L_F = \mathrm{mean}\,|P_\kappa\hat I - P_\kappa I|^2, \qquad
    L_E = \sum_{d\in\{x,y\}} \mathrm{mean}\,|S_d * (\hat I - I)|^2

Frequencies are in cycles per pixel, as ``fftfreq`` counts them; S are the 3 x 3 Sobel kernels, with
the border repeated. The spatial term is the form of DISTS (Ding et al., arXiv 2004.07728) over the
layers of any frozen network; :func:`log_power` is ours, and needs no phase to agree.

All take images (batch, channels, height, width) in any precision and give (batch,).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

HIGHEST = 0.5**0.5
"""Radius of the highest frequency there is, in cycles per pixel."""
Features = Callable[[Tensor], Sequence[Tensor]]
"""Images to the outputs (batch, channels, h, w) of the layers of a frozen network."""


def radius(height: int, width: int, like: Tensor | None = None) -> Tensor:
    """Distance of each frequency from 0, (height, width), in cycles per pixel."""
    kind = torch.zeros(()) if like is None else like
    down, right = (
        torch.fft.fftfreq(size, dtype=kind.dtype, device=kind.device) for size in (height, width)
    )
    return torch.hypot(down[:, None], right[None])


def high_pass(images: Tensor, cutoff: float = 0.25) -> Tensor:
    r"""The part :math:`P_\kappa I` of images above a frequency, in their own shape.

    Args:
        images: (batch, channels, height, width).
        cutoff: :math:`\kappa` in cycles per pixel; below 0 everything passes, above 0.71 nothing.

    Raises:
        ValueError: another shape.
    """
    _images(images)
    passed = radius(images.shape[-2], images.shape[-1], images) > cutoff
    return torch.fft.ifft2(torch.fft.fft2(images) * passed).real


def high_energy(images: Tensor, cutoff: float = 0.25) -> Tensor:
    """Energy (batch,) above a frequency, per pixel and channel."""
    return high_pass(images, cutoff).square().flatten(1).mean(1)


def mse(made: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared difference."""
    _same(made, wanted)
    return (made - wanted).square().flatten(1).mean(1)


def fourier(made: Tensor, wanted: Tensor, cutoff: float = 0.25) -> Tensor:
    """:math:`L_F`: mean squared difference of what lies above a frequency.

    Raises:
        ValueError: shapes that differ, or a cutoff outside (0, 0.71).
    """
    _same(made, wanted)
    check_cutoff(cutoff)
    return high_energy(made - wanted, cutoff)


def sobel(images: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes across and down, each of the images' shape: 8 for a ramp of slope 1.

    Raises:
        ValueError: another shape.
    """
    _images(images)
    smooth, slope = images.new_tensor([1.0, 2.0, 1.0]), images.new_tensor([-1.0, 0.0, 1.0])
    across = smooth[:, None] * slope
    kernels = torch.stack([across, across.mT])[:, None]
    flat = F.pad(images.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    both = F.conv2d(flat, kernels).unflatten(0, images.shape[:2])
    return both[:, :, 0], both[:, :, 1]


def edge(made: Tensor, wanted: Tensor) -> Tensor:
    """:math:`L_E`: mean squared difference of the slopes across, plus that of those down."""
    _same(made, wanted)
    return sum(part.square().flatten(1).mean(1) for part in sobel(made - wanted))


def log_power(made: Tensor, wanted: Tensor, cutoff: float = 0.25, floor: float = 1e-3) -> Tensor:
    """Mean squared difference of the logarithm of the power above a frequency. Ours.

    It asks for as much energy, wherever in the image, so blur costs even where the place is open.

    Args:
        made, wanted: images (batch, channels, height, width).
        cutoff: in cycles per pixel.
        floor: power that is added before the logarithm; power is of the orthonormal transform, so
            white noise of variance v has power v.

    Raises:
        ValueError: shapes that differ, a cutoff outside (0, 0.71), or a floor that is not positive.
    """
    _same(made, wanted)
    check_cutoff(cutoff)
    if not 0 < floor < math.inf:
        raise ValueError(f"floor: above 0, got {floor}")
    passed = radius(made.shape[-2], made.shape[-1], made) > cutoff
    one, other = (
        torch.view_as_real(torch.fft.fft2(x, norm="ortho")).square().sum(-1)[..., passed]
        for x in (made, wanted)
    )
    return ((one + floor).log() - (other + floor).log()).square().flatten(1).mean(1)


def dists(
    made: Tensor,
    wanted: Tensor,
    features: Features | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
    c1: float = 1e-6,
    c2: float = 1e-6,
) -> Tensor:
    r"""The spatial term: texture and structure, compared layer by layer; layer 0 is the image.

    .. math:: 1 - \sum_{l,j}\Big(a_{lj}\,\frac{2\mu\hat\mu + c_1}{\mu^2+\hat\mu^2+c_1}
        + b_{lj}\,\frac{2\,\mathrm{cov} + c_2}{s^2+\hat s^2+c_2}\Big), \qquad \sum (a+b) = 1

    with mean, variance and covariance over the pixels of channel j of layer l. It lies in [0, 2],
    is 0 for equal images, and symmetric.

    Args:
        made, wanted: images (batch, channels, height, width).
        features: gives the further layers; left out, the image alone is compared.
        weights: a and b, each (channels of all layers,), not negative; divided by their sum. Left
            out, every layer weighs the same, and so do its channels and both parts. DISTS learned
            its weights, for VGG-16.
        c1, c2: keep the ratios finite. Source: DISTS, 1e-6.

    Raises:
        ValueError: shapes that differ, or weights that do not fit.
    """
    _same(made, wanted)
    layers = [(made, wanted)]
    if features is not None:
        layers += list(zip(features(made), features(wanted), strict=True))
    texture, structure, even = [], [], []
    for one, other in layers:
        x, y = one.flatten(2), other.flatten(2)
        mx, my = x.mean(2), y.mean(2)
        dx, dy = x - mx[..., None], y - my[..., None]
        # one minus each ratio, so that small distances keep their digits: 1 - t is
        # (m - m')^2 over the denominator, and 1 - s is the variance of the difference over its own
        texture.append((mx - my).square() / (mx.square() + my.square() + c1))
        sx, sy = dx.square().mean(2), dy.square().mean(2)
        structure.append((dx - dy).square().mean(2) / (sx + sy + c2))
        even.append(torch.full_like(mx[0], 0.5 / mx.shape[1]))
    t, s = torch.cat(texture, 1), torch.cat(structure, 1)
    a, b = weights if weights is not None else (torch.cat(even), torch.cat(even))
    if a.shape != t.shape[1:] or b.shape != a.shape:
        raise ValueError(
            f"weights: two of {t.shape[1]} numbers, one for each channel of all layers, got "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    total = a.sum() + b.sum()
    if bool((a < 0).any() | (b < 0).any()) or not bool(total > 0):
        raise ValueError("weights: none may be negative, and some must be above 0")
    return t @ (a / total) + s @ (b / total)


def check_cutoff(cutoff: float) -> None:
    """Raise ValueError for a cutoff outside (0, 0.71) cycles per pixel."""
    if not 0 < cutoff < HIGHEST:
        raise ValueError(
            f"cutoff: between 0 and {HIGHEST:.3f} cycles per pixel, got {cutoff}; 0.25 is half the "
            "highest along an axis"
        )


def _images(images: Tensor) -> None:
    if images.dim() != 4 or not images.numel():
        raise ValueError(f"images: (batch, channels, height, width), got {tuple(images.shape)}")


def _same(made: Tensor, wanted: Tensor) -> None:
    _images(made)
    if made.shape != wanted.shape:
        raise ValueError(
            f"made, wanted: images of one shape, got {tuple(made.shape)} and {tuple(wanted.shape)}"
        )
