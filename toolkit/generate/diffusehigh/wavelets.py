r"""The discrete wavelet transform of images, and its inverse, with Daubechies' filters.

One level filters rows and columns and keeps every second number:

.. math:: c_k = \sum_{j=0}^{L-1} h_j\,x_{2k+1-j}

with the low-pass filter for the low band, the high-pass filter for details. ``db1`` is Haar, and
``dbN`` has ``L = 2N`` taps. Positions, signs and the order of the bands are those of PyWavelets.

Source: Daubechies, *Ten Lectures on Wavelets*, 1992, chapter 6.
"""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MOST = 10
"""The longest filter is ``db10``."""
PADDINGS = ("symmetric", "zero", "reflect", "periodic", "periodization")
"""What lies beyond the border: the mirror image with the border pixel, nothing, the mirror image
without it, the other side; or the other side with bands of exactly half the size."""


class Bands(NamedTuple):
    """What a transform leaves.

    Attributes:
        low: the low band (batch, channels, h, w) of the last level.
        high: for each level, the finest first, the details (batch, channels, 3, h, w): high along
            the height, along the width, along both.
    """

    low: Tensor
    high: tuple[Tensor, ...]


def taps(wavelet: str) -> int:
    """How many numbers a filter has.

    Raises:
        TypeError, ValueError: an unknown wavelet.
    """
    if not isinstance(wavelet, str):
        raise TypeError(f'wavelet: a name such as "haar" or "db4", got {wavelet!r}')
    found = re.fullmatch(r"db([1-9]\d*)", "db1" if wavelet == "haar" else wavelet)
    if not found or int(found[1]) > MOST:
        raise ValueError(f'wavelet: "haar", or "db1" to "db{MOST}", got {wavelet!r}')
    return 2 * int(found[1])


@functools.cache
def scaling(wavelet: str) -> tuple[float, ...]:
    r"""The scaling coefficients of Daubechies, which rebuild from the low band; their sum is
    :math:`\sqrt2`.

    The roots within the unit circle of the halfband polynomial, beside N zeros at -1.

    Raises:
        TypeError, ValueError: as :func:`taps`.
    """
    order = taps(wavelet) // 2
    # y = (2 - z - 1/z) / 4 turns each root in y into a pair z, 1/z
    powers = [math.comb(order - 1 + k, k) for k in range(order)]
    made = np.array([1.0 + 0j])
    for y in np.roots(powers[::-1]):
        half = 1 - 2 * y
        root = np.sqrt(half * half - 1 + 0j)
        z = min(half + root, half - root, key=abs)
        made = np.convolve(made, [1.0, -z])
    for _ in range(order):
        made = np.convolve(made, [1.0, 1.0])
    real = made.real
    return tuple(float(v) for v in real * (math.sqrt(2) / real.sum()))


def filters(wavelet: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The two filters that take apart, low-pass and high-pass; reversed, they put together."""
    low = scaling(wavelet)
    return low[::-1], tuple(v if k % 2 else -v for k, v in enumerate(low))


def band_size(size: int, wavelet: str, padding: str = "symmetric") -> int:
    """Pixels of a band along a side: ``(size + L - 1) // 2``, or half, rounded up, for
    periodization."""
    if _padding(padding) == "periodization":
        return -(-size // 2)
    return (size + taps(wavelet) - 1) // 2


def dwt(images: Tensor, wavelet: str = "db4", levels: int = 1, padding: str = "symmetric") -> Bands:
    """Take images apart into a low band and details.

    Args:
        images: (batch, channels, height, width), single or double precision. Half precision is
            computed in single.
        wavelet: "haar", or "db1" to "db10".
        levels: how often the low band is taken apart again.
        padding: one of :data:`PADDINGS`.

    Raises:
        TypeError, ValueError: another shape, an unknown wavelet or padding, no level, or a side
            that is shorter than the filter at some level.
    """
    check_images(images, "images")
    check_fits(tuple(images.shape[-2:]), wavelet, levels, padding)
    low = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
    high = []
    for _ in range(levels):
        sides = [_apart(half, wavelet, padding, 2) for half in _apart(low, wavelet, padding, 3)]
        (low, rows), (columns, both) = sides
        high.append(torch.stack([rows, columns, both], 2))
    return Bands(low, tuple(high))


def idwt(
    bands: Bands | tuple[Tensor, tuple[Tensor, ...]],
    wavelet: str = "db4",
    padding: str = "symmetric",
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Put images together from their bands.

    Args:
        bands: of :func:`dwt`.
        wavelet, padding: as they were taken apart.
        size: height and width of the images. Left out, images with an odd side come back with
            one row or column more.

    Raises:
        TypeError, ValueError: bands that do not fit together, or are smaller than ``size``.
    """
    low, high = bands
    _padding(padding)
    for details in reversed(high):
        h, w = details.shape[-2:]
        if details.dim() != 5 or details.shape[2] != 3 or not (
            h <= low.shape[-2] <= h + 1 and w <= low.shape[-1] <= w + 1
        ):  # fmt: skip
            raise ValueError(
                f"bands: details {tuple(details.shape)} do not fit a low band "
                f"{tuple(low.shape)}; they are (batch, channels, 3, height, width)"
            )
        low = low[..., :h, :w]  # an odd side has grown by one on the way
        rows, columns, both = details.unbind(2)
        low = _together(
            _together(low, rows, wavelet, padding, 2),
            _together(columns, both, wavelet, padding, 2), wavelet, padding, 3,
        )  # fmt: skip
    if size is None:
        return low
    if low.shape[-2] < size[0] or low.shape[-1] < size[1]:
        raise ValueError(f"size: {tuple(low.shape[-2:])} are put together, fewer than {size}")
    return low[..., : size[0], : size[1]]


def swap_low(
    images: Tensor,
    low: Tensor,
    wavelet: str = "db4",
    levels: int = 1,
    padding: str = "symmetric",
) -> Tensor:
    r"""Images with another low band and their own details:
    :math:`\mathrm{iDWT}(LL, LH_x, HL_x, HH_x)`.

    Args:
        images: (batch, channels, height, width).
        low: the band of :func:`dwt` at the same size and level.
        wavelet, levels, padding: of the transform.

    Raises:
        TypeError, ValueError: as :func:`dwt`, or a low band of another shape.
    """
    own, high = dwt(images, wavelet, levels, padding)
    if low.shape != own.shape:
        raise ValueError(
            f"low: the band of these images has shape {tuple(own.shape)}, got {tuple(low.shape)}; "
            "take it from images of the same size, with the same wavelet, levels and padding"
        )
    size = (images.shape[-2], images.shape[-1])
    return idwt(Bands(low.to(own), high), wavelet, padding, size).to(images.dtype)


def check_images(images: Tensor, name: str) -> None:
    """Raise for what is no batch of images."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(f"{name}: a tensor of floating-point numbers")
    if images.dim() != 4 or not images.numel():
        raise ValueError(
            f"{name}: (batch, channels, height, width), none of them 0, got {tuple(images.shape)}"
        )


def check_fits(size: tuple[int, int], wavelet: str, levels: int, padding: str) -> None:
    """Raise ValueError where images of a size cannot be taken apart so often."""
    length = taps(wavelet)
    _padding(padding)
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 1:
        raise ValueError(f"levels: a whole number of at least 1, got {levels!r}")
    sides = size
    for level in range(levels):
        if min(sides) < length:
            raise ValueError(
                f"wavelet: {wavelet} has {length} taps, and at level {level + 1} a side of "
                f"{size[0]} x {size[1]} pixels has {min(sides)}; take a shorter wavelet such as "
                '"haar", or fewer levels'
            )
        sides = band_size(sides[0], wavelet, padding), band_size(sides[1], wavelet, padding)


def _padding(padding: str) -> str:
    if padding not in PADDINGS:
        raise ValueError(f"padding: one of {', '.join(PADDINGS)}, got {padding!r}")
    return padding


def _widened(x: Tensor, before: int, after: int, padding: str) -> Tensor:
    """More numbers along the last axis (-1)."""
    if padding == "zero":
        return F.pad(x, (before, after))
    size = x.shape[-1]
    at = torch.arange(-before, size + after, device=x.device)
    if padding == "symmetric":
        at = at.remainder(2 * size)
        at = torch.minimum(at, 2 * size - 1 - at)
    elif padding == "reflect":
        at = at.remainder(2 * size - 2)
        at = torch.minimum(at, 2 * size - 2 - at)
    else:
        at = at.remainder(size)
    return x[..., at]


def _apart(x: Tensor, wavelet: str, padding: str, axis: int) -> tuple[Tensor, Tensor]:
    """The low and the high half along an axis of (batch, channels, height, width)."""
    x = x.movedim(axis, -1)
    length = taps(wavelet)
    if padding == "periodization":
        x = _widened(x, 0, x.shape[-1] % 2, "symmetric")  # an odd side repeats its last number
        x = _widened(x, length // 2 - 1, length // 2 - 1, "periodic")
    else:
        odd = x.shape[-1] % 2
        x = _widened(x, length - 2, length - 2 + odd, padding)
    # a convolution of torch does not turn its filter round, so the reversed filters are given
    kernels = x.new_tensor([pair[::-1] for pair in filters(wavelet)])[:, None]
    rows = F.conv1d(x.reshape(-1, 1, x.shape[-1]), kernels, stride=2)
    low, high = rows.view(*x.shape[:-1], 2, -1).unbind(-2)
    return low.movedim(-1, axis), high.movedim(-1, axis)


def _together(low: Tensor, high: Tensor, wavelet: str, padding: str, axis: int) -> Tensor:
    """What two halves along an axis make."""
    both = torch.stack([low.movedim(axis, -1), high.movedim(axis, -1)], -2)
    length, size = taps(wavelet), both.shape[-1]
    kernels = both.new_tensor([pair[::-1] for pair in filters(wavelet)])[:, None]
    rows = both.reshape(-1, 2, size)
    if padding == "periodization":
        long = F.conv_transpose1d(rows, kernels, stride=2)[:, 0]
        at = torch.arange(long.shape[-1], device=low.device) - (length // 2 - 1)
        rows = long.new_zeros(len(long), 2 * size).index_add(1, at.remainder(2 * size), long)
    else:
        rows = F.conv_transpose1d(rows, kernels, stride=2, padding=length - 2)[:, 0]
    return rows.view(*both.shape[:-2], -1).movedim(-1, axis)
