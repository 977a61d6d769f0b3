r"""The field of charges that lie on the plane z = 0, and what it says of a finite set of data.

.. math:: E_x=\sum_i\frac{x-y_i}{(\|x-y_i\|^2+r^2)^{(N+D)/2}},\qquad
    E_r=\sum_i\frac{r}{(\|x-y_i\|^2+r^2)^{(N+D)/2}},\qquad
    \frac{E_x}{E_r}=\frac{x-\hat y}{r}

with :math:`\hat y` the mean of the data that a state may have come from. All of it is computed in
double precision, in logarithms: powers like :math:`(N+D)/2` leave no floating-point range.

Source: Xu et al., arXiv 2302.04265.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.core.sample.draws import check_freedom
from toolkit.generate.pfgmpp.kernel import check_finite, check_positive, spread


class Field(NamedTuple):
    """A field up to a factor: multiplied by ``exp(log_scale)`` it is the sum over all charges.

    Attributes:
        x: :math:`E_x` (batch, ...), along the data.
        r: :math:`E_r` (batch,), along the norm of the extra coordinates.
        log_scale: (batch,), in nats.
    """

    x: Tensor
    r: Tensor
    log_scale: Tensor

    @property
    def slope(self) -> Tensor:
        """:math:`dx/dr = E_x/E_r`, (batch, ...)."""
        return self.x / spread(self.r, self.x)


def _pair(x: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() < 2 or not len(x) or not len(data) or x.shape[1:] != data.shape[1:]:
        raise ValueError(
            f"x, data: states (batch, ...) and points (n, ...) of one shape, one or more of each; "
            f"got {tuple(x.shape)} and {tuple(data.shape)}"
        )
    for name, rows in (("x", x), ("data", data)):
        if not bool(rows.isfinite().all()):
            raise ValueError(f"{name}: holds numbers that are not finite; leave such rows out")
    return x.double().flatten(1), data.double().flatten(1)


def _squares(x: Tensor, data: Tensor) -> Tensor:
    """Squared distances (batch, n), without the loss of digits of a matrix product."""
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(x, data, compute_mode=mode).square()


def _each(values: Tensor | float, x: Tensor, name: str) -> Tensor:
    made = torch.as_tensor(values, dtype=torch.float64, device=x.device).expand(len(x))
    check_positive(made, name)
    return made


def shares(x: Tensor, sigma: Tensor | float, data: Tensor, D: float) -> Tensor:
    """How likely each point is to be where a state came from: (batch, n), rows sum to 1.

    Args:
        x: states (batch, ...).
        sigma: noise of each state (batch,), or of all.
        data: points (n, ...).
        D: any positive number, or infinite.

    Raises:
        ValueError: shapes that do not fit, no row, numbers that are not finite, a sigma or D that
            is not positive.
    """
    check_freedom(D)
    flat, points = _pair(x, data)
    wide = _each(sigma, flat, "sigma").square()[:, None]
    squares = _squares(flat, points)
    if math.isinf(D):
        return (-squares / (2 * wide)).softmax(1)
    return (-(flat.shape[1] + D) / 2 * (squares / (D * wide)).log1p()).softmax(1)


def posterior_mean(x: Tensor, sigma: Tensor | float, data: Tensor, D: float) -> Tensor:
    r"""The best denoiser of a finite set, :math:`\hat y(x,\sigma)`, (batch, ...).

    With the points of a large batch it is also the official code's optional *stable target*, which
    takes the place of :math:`y` in the loss.

    Arguments and errors as for :func:`shares`.
    """
    _, points = _pair(x, data)
    return (shares(x, sigma, data, D) @ points).view(x.shape).to(x.dtype)


def field(x: Tensor, r: Tensor | float, data: Tensor, D: float) -> Field:
    """The field at states ``x`` (batch, ...) and norms ``r`` (batch,) of the extra coordinates.

    Raises:
        ValueError: as :func:`shares`; and an infinite D, for which r is infinite.
    """
    check_finite(D)
    flat, points = _pair(x, data)
    wide = _each(r, flat, "r")
    logs = -(flat.shape[1] + D) / 2 * (_squares(flat, points) + wide.square()[:, None]).log()
    top = logs.max(1).values
    weights = (logs - top[:, None]).exp()
    total = weights.sum(1)
    along = flat * total[:, None] - weights @ points
    return Field(along.view(x.shape).to(x.dtype), (wide * total).to(x.dtype), top)


def acted_on(seen: Tensor | float, told: Tensor | float, N: int, D: float) -> Tensor:
    r"""The noise level that the kernel acts on, where a state has more noise than is told.

    Around one data point the kernel pulls as a Gaussian of variance

    .. math:: \sigma_{eff}^2 = \frac{\|x-y\|^2 + D\sigma^2}{N + D}

    so a told level counts as much as D numbers of the state. This reading is ours.

    Args:
        seen: noise that the state really has, :math:`\|x-y\|/\sqrt N`.
        told: :math:`\sigma`.
        N: numbers in one sample.
        D: any positive number, or infinite.
    """
    check_freedom(D)
    share = 0.0 if math.isinf(D) else N / (N + D)
    seen, told = (torch.as_tensor(v, dtype=torch.float64) for v in (seen, told))
    return (share * seen.square() + (1 - share) * told.square()).sqrt()
