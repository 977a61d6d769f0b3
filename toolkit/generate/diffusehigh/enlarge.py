r"""Enlarging pictures by interpolation, and sharpening them.

.. math:: g = u + a\,(u - G_{k,s} * u)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.generate.diffusehigh.wavelets import check_images

INTERPOLATIONS = ("bicubic", "bilinear")


def enlarge(images: Tensor, size: int | Sequence[int], interpolation: str = "bicubic") -> Tensor:
    """Images of another size by interpolation; corners are not aligned.

    Args:
        images: (batch, channels, height, width).
        size: height and width, or one number for both; not below those of the images.
        interpolation: "bicubic" or "bilinear".

    Raises:
        TypeError, ValueError: another shape, a smaller size, or an unknown interpolation.
    """
    check_images(images, "images")
    height, width = sides(size)
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"interpolation: one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}"
        )
    if height < images.shape[-2] or width < images.shape[-1]:
        raise ValueError(
            f"size: {height} x {width} is smaller than the {images.shape[-2]} x "
            f"{images.shape[-1]} there are; sizes must not fall"
        )
    return F.interpolate(images, (height, width), mode=interpolation, align_corners=False)


def blur(images: Tensor, kernel: int = 3, sigma: float = 1.0) -> Tensor:
    """Images after a Gaussian filter; beyond the border they are mirrored without their edge.

    Args:
        images: (batch, channels, height, width).
        kernel: pixels of its side, odd.
        sigma: standard deviation in pixels.

    Raises:
        TypeError, ValueError: another shape, an even kernel, one that is too large for the
            images, or a deviation that is not positive.
    """
    check_images(images, "images")
    if isinstance(kernel, bool) or not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel: an odd number of pixels, got {kernel!r}")
    if not sigma > 0:
        raise ValueError(
            f"sigma: must be above 0, got {sigma}; strength 0 leaves images as they are"
        )
    reach = kernel // 2
    if reach >= min(images.shape[-2:]):
        raise ValueError(
            f"kernel: {kernel} pixels reach beyond images of {tuple(images.shape[-2:])}; take less"
        )
    at = torch.linspace(-reach, reach, kernel, dtype=images.dtype, device=images.device)
    weights = (-0.5 * (at / sigma).square()).exp()
    weights = weights / weights.sum()
    channels = images.shape[1]
    rows = weights.expand(channels, 1, 1, kernel)
    wide = F.pad(images, (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(wide, rows, groups=channels), rows.transpose(2, 3), groups=channels)


def sharpen(images: Tensor, strength: float = 1.0, kernel: int = 3, sigma: float = 1.0) -> Tensor:
    """Images plus ``strength`` times what a Gaussian filter takes from them.

    Args:
        images: (batch, channels, height, width).
        strength: ``a``; 0 returns the images themselves.
        kernel, sigma: as :func:`blur` takes them.

    Raises:
        TypeError, ValueError: as :func:`blur`.
    """
    soft = blur(images, kernel, sigma)
    return images if strength == 0 else (1 + strength) * images - strength * soft


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width from one number or two.

    Raises:
        ValueError: no whole numbers above 0, or not two.
    """
    both = (size, size) if isinstance(size, int) else tuple(size)
    if len(both) != 2 or any(isinstance(n, bool) or not isinstance(n, int) for n in both):
        raise ValueError(f"size: a whole number, or height and width, got {size!r}")
    if min(both) < 1:
        raise ValueError(f"size: at least 1 pixel a side, got {size!r}")
    return both[0], both[1]
