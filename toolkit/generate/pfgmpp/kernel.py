r"""The law of PFGM++'s noise: how far, and in which direction.

:math:`p_r(x\mid y)\propto(\|x-y\|^2+r^2)^{-(N+D)/2}`: the direction is uniform, and of the distance
:math:`R` the share :math:`B = R^2/(R^2+r^2)` is Beta(N/2, D/2). With :math:`r=\sigma\sqrt D` it is
the multivariate Student-t law of D degrees of freedom and scale :math:`\sigma`: normal numbers over
:math:`\sqrt\tau` with one :math:`\tau\sim\mathrm{Gamma}(D/2, D/2)` for each sample.

Source: Xu et al., arXiv 2302.04265. The Student-t form is known; that it is the same law is checked
in the tests.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from toolkit.core.sample.draws import check_freedom, gamma_quantiles

LEAST = 2.0**-54
"""Of a uniform number, so that no quantile is 0 or infinite."""


def check_finite(D: float) -> float:
    """A D for which a radius with a heavy tail exists.

    Raises:
        TypeError, ValueError: no positive number, or an infinite one.
    """
    if math.isinf(check_freedom(D)):
        raise ValueError("D: Beta draws need a finite D; with D = math.inf noise is Gaussian")
    return float(D)


def beta_quantiles(shares: Tensor, N: int, D: float) -> Tensor:
    """Quantiles of Beta(N/2, D/2), in double precision.

    Args:
        shares: uniform numbers (batch,) between 0 and 1.
        N: numbers in one sample.
        D: finite.

    Raises:
        ValueError: a D that is not positive and finite.
    """
    from scipy import special

    check_finite(D)
    uniform = shares.double().clamp(LEAST, 1 - LEAST).cpu().numpy()
    return torch.from_numpy(special.betaincinv(N / 2, D / 2, uniform)).to(shares.device)


def drawn_betas(count: int, N: int, D: float, generator: torch.Generator | None = None) -> Tensor:
    """Draws (count,) of Beta(N/2, D/2). See :func:`drawn_taus` for a D beyond 100,000."""
    return beta_quantiles(torch.rand(count, dtype=torch.float64, generator=generator), N, D)


def drawn_taus(count: int, D: float, generator: torch.Generator | None = None) -> Tensor:
    """Draws (count,) of Gamma(D/2, rate D/2); ones for an infinite D."""
    check_freedom(D)
    if math.isinf(D):
        return torch.ones(count, dtype=torch.float64)
    shares = torch.rand(count, dtype=torch.float64, generator=generator)
    return gamma_quantiles(shares.clamp(min=LEAST), D)


def radii(betas: Tensor, r: Tensor | float, clip: float = 0.0, guard: float = 0.0) -> Tensor:
    r"""Distances (batch,) from the data point: :math:`R = r\sqrt{B/(1-B)}`, in double precision.

    Args:
        betas: draws B (batch,).
        r: (batch,) or one for all.
        clip: B is held between this and one minus this.
        guard: added to the divisor, and again under the root.

    Raises:
        ValueError: a B outside 0 to 1, or an r that is not positive.
    """
    betas, r = betas.double(), torch.as_tensor(r, dtype=torch.float64, device=betas.device)
    if not bool(((betas >= 0) & (betas <= 1)).all()):
        raise ValueError("betas: shares from 0 to 1; draw them from Beta(N/2, D/2)")
    check_positive(r, "r")
    held = betas.clamp(clip, 1 - clip)
    return r * (held / (1 - held + guard) + guard).sqrt()


def turned(normals: Tensor, lengths: Tensor) -> Tensor:
    """Vectors in the direction of normal numbers (batch, ...), with given lengths (batch,)."""
    wide = normals.double()
    norms = wide.flatten(1).norm(dim=1)
    return (wide * spread(lengths / norms, wide)).to(normals.dtype)


def spread(numbers: Tensor, like: Tensor) -> Tensor:
    """Numbers (batch,) in the form (batch, 1, ..., 1) of a batch of samples."""
    return numbers.view(-1, *[1] * (like.dim() - 1))


def check_positive(values: Tensor, name: str) -> None:
    """Raise ValueError unless all values are positive and finite."""
    if not bool(((values > 0) & values.isfinite()).all()):
        raise ValueError(f"{name}: must be above 0 and finite, got {values.flatten()[:4].tolist()}")
