"""Noise with one generator per sample, so that a seed gives the same picture in any batch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from toolkit.core.seeds import generator


def check_freedom(freedom: float) -> float:
    """Degrees of freedom of Student-t noise, PFGM++'s D: above 0; infinite for Gaussian noise.

    Raises:
        TypeError, ValueError: no number, or not positive.
    """
    if isinstance(freedom, bool) or not isinstance(freedom, int | float):
        raise TypeError(f"freedom: a number above 0, or math.inf, got {freedom!r}")
    if not freedom > 0:
        raise ValueError(
            f"freedom: D must be positive, got {freedom}; math.inf gives Gaussian noise"
        )
    return float(freedom)


class Draws:
    """Random numbers for some samples, each from streams of its own.

    All numbers are drawn on the CPU in double precision and moved, so they do not depend on batch,
    device or precision. Successive calls give new numbers.

    Args:
        seeds: one per sample, not negative.
        stream: names or numbers that say what the draws are for.

    Raises:
        ValueError: no seed, or a negative one.
    """

    def __init__(self, seeds: Iterable[int], *stream: int | str) -> None:
        self.seeds = [int(seed) for seed in seeds]
        if not self.seeds:
            raise ValueError("seeds: give one per sample, got none")
        self._normal = [generator(seed, "sample", *stream) for seed in self.seeds]
        self._tail = [generator(seed, "sample", "tail", *stream) for seed in self.seeds]

    def normal(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Standard normal numbers ``(samples, *shape)``.

        Raises:
            ValueError: more than the memory that is free, or a size below 1.
        """
        shape = tuple(shape)
        if any(size < 1 for size in shape):
            raise ValueError(f"shape: sizes of at least 1, got {shape}")
        check_memory((len(self.seeds), *shape), 8, device)
        rows = [
            torch.randn(shape, dtype=torch.float64, generator=draw).to(dtype)
            for draw in self._normal
        ]
        return torch.stack(rows).to(device)

    def student(
        self,
        shape: Sequence[int],
        freedom: float = math.inf,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        r"""Multivariate Student-t noise of scale 1: normal numbers over :math:`\sqrt\tau`.

        One :math:`\tau\sim\mathrm{Gamma}(D/2, D/2)` per sample makes its tail. It is PFGM++'s
        perturbation with :math:`r = \sigma\sqrt D` at :math:`\sigma = 1`.

        Args:
            shape: of one sample.
            freedom: D; infinite gives :meth:`normal`, bit for bit.
            dtype, device: of the result.

        Raises:
            ValueError: a D that is not positive; and as :meth:`normal`.
        """
        check_freedom(freedom)
        noise = self.normal(shape, torch.float64 if freedom < math.inf else dtype)
        if freedom < math.inf:
            shares = [torch.rand(1, dtype=torch.float64, generator=draw) for draw in self._tail]
            noise = _widened(noise, torch.cat(shares), freedom)
        return noise.to(dtype).to(device)


def student_noise(
    shape: Sequence[int],
    freedom: float = math.inf,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The noise of :meth:`Draws.student` for a whole batch from one generator, as in training.

    Args:
        shape: (batch, ...).
        freedom: D; infinite gives the numbers of ``torch.randn``, bit for bit.
        generator: a CPU generator.
        dtype: of the result.

    Raises:
        ValueError: a D that is not positive, or no sample.
    """
    check_freedom(freedom)
    if len(shape) < 2 or any(size < 1 for size in shape):
        raise ValueError(f"shape: (batch, ...) with sizes of at least 1, got {tuple(shape)}")
    noise = torch.randn(*shape, generator=generator, dtype=dtype)
    if math.isinf(freedom):
        return noise
    shares = torch.rand(shape[0], dtype=torch.float64, generator=generator)
    return _widened(noise.double(), shares, freedom).to(dtype)


def _widened(noise: Tensor, shares: Tensor, freedom: float) -> Tensor:
    """Normal numbers (batch, ...) over the root of one Gamma quantile (batch,) per sample."""
    tau = gamma_quantiles(shares.clamp(min=2.0**-54), freedom)
    return noise / tau.sqrt().view(-1, *[1] * (noise.dim() - 1))


def gamma_quantiles(shares: Tensor, freedom: float) -> Tensor:
    """Quantiles of Gamma(D/2, rate D/2), whose mean is 1, at shares in (0, 1)."""
    from scipy import special

    half = freedom / 2
    return torch.from_numpy(special.gammaincinv(half, shares.double().numpy())) / half


def free_bytes(device: torch.device | str = "cpu") -> int | None:
    """Memory that is free on a device, or None where it cannot be asked."""
    where = torch.device(device)
    if where.type == "cuda":
        return torch.cuda.mem_get_info(where)[0]
    if where.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
            return None
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 1024 * kib


def check_memory(
    shape: Sequence[int], bytes_each: float, device: torch.device | str = "cpu"
) -> None:
    """Raise ValueError for numbers that the free memory of a device does not hold.

    Args:
        shape: of the numbers.
        bytes_each: for one of them, copies counted in.
        device: where they are to live.
    """
    needed, free = math.prod(shape) * bytes_each, free_bytes(device)
    if free is not None and needed > free:
        raise ValueError(
            f"shape: {' x '.join(map(str, shape))} takes {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free; make smaller images, or fewer at a time"
        )
