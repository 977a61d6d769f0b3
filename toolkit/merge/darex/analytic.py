r"""A divisor per layer without a search over q: eq. 3 of the paper, and the least mean square.

Each row of a weight minimises, on a grid of q,

.. math::
    J_i(q) = \Big|\, \eta\Big(1-\frac{1-p}{q}\Big) S_i + \frac{\eta^2 \Phi(p)\, Q_i}{4 q^2}
    + \log\frac2\gamma \Big|, \qquad c_{ij} = \Delta_{ij}\, \mathbb E[x_j],

and the layer takes the mean of its rows. One :math:`\eta` serves all layers; it is searched like q.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from toolkit.merge.darex.theory import phi, q_star

GRID = 0.001
LAST = 0.998
BLOCK = 64
"""Divisors that are tried at once; the search often ends early."""


def grid(drop: float) -> list[float]:
    """1 - p, and from there in steps of 0.001 to 0.998."""
    first = (1 - drop) / GRID
    if abs(first - round(first)) < 1e-6:
        first = round(first)
    count = math.floor(LAST / GRID + 1e-6 - first) + 1
    return [(first + i) * GRID for i in range(max(1, count))]


def row_q(
    c: Tensor, drop: float, eta: float = 0.45, *, gamma: float = 0.05, stop: float = 0.8,
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # fmt: skip
    """q of every row.

    The grid is gone through upwards, and equal values take the larger q. A row whose value did not
    get less at a point counts as done, and at the point where a share ``stop`` of the rows is done
    all end: rows with S at or below 0 would run to the end of the grid.

    Args:
        c: (rows, inputs) contributions.
        drop: probability p, strictly between 0 and 1.
        eta: weight of the two terms.
        gamma: probability of the bound.
        stop: share of rows.
        dtype: of the arithmetic. The official code's is float16, where so many values are equal
            that rows count as done long before their least value.

    Returns:
        (rows,) in float64.

    Raises:
        ValueError: an argument out of range, or contributions that are not finite.
    """
    if not 0 < drop < 1:
        raise ValueError(f"drop={drop}: must lie strictly between 0 and 1")
    if not (math.isfinite(eta) and eta > 0):
        raise ValueError(f"eta={eta}: must be positive and finite")
    if not 0 < gamma < 1 or not 0 < stop <= 1:
        raise ValueError(f"gamma={gamma}, stop={stop}: shares between 0 and 1")
    if c.dim() != 2 or not bool(c.isfinite().all()):
        raise ValueError(f"c of shape {tuple(c.shape)} must be a matrix of finite numbers")
    c = c.to(dtype)
    total, energy = c.sum(dim=1), c.square().sum(dim=1)
    least = torch.full_like(total, math.inf)
    done = torch.zeros_like(total, dtype=torch.bool)
    found = torch.full_like(total, 1 - drop, dtype=torch.float64)
    for q in torch.tensor(grid(drop), dtype=torch.float64, device=c.device).split(BLOCK):
        value = objective(total, energy, q, drop, eta, gamma)
        before = torch.cat([least[:, None], value], dim=1).cummin(dim=1).values
        over = done[:, None] | ((value >= before[:, :-1]).cumsum(dim=1) > 0)
        ends = (over.double().mean(dim=0) >= stop).nonzero()
        count = int(ends[0]) + 1 if len(ends) else len(q)
        better = value[:, :count] <= before[:, :count]
        last = (better * torch.arange(1, count + 1, device=c.device)).amax(dim=1)
        found = torch.where(last > 0, q[last - 1], found)
        if len(ends):
            break
        least, done = before[:, -1], over[:, -1]
    return found


def objective(
    total: Tensor, energy: Tensor, q: Tensor, drop: float, eta: float, gamma: float
) -> Tensor:
    """J of rows with sums S and Q (rows,) at divisors (k,): (rows, k), in the dtype of the sums."""
    dtype = total.dtype
    wide = dtype if dtype.itemsize > 2 else torch.float32  # as products with numbers are formed
    curve = (eta**2 * phi(drop) * energy).to(wide)[:, None] / (4 * q.square()).to(wide)
    line = total.to(wide)[:, None] * (1 - (1 - drop) / q).to(wide)
    return (eta * line.to(dtype) + (curve.to(dtype) + math.log(2 / gamma))).abs()


def contributions(delta: Tensor, mean: Tensor, bias: Tensor | None = None) -> Tensor:
    """c (rows, inputs) of a weight's difference (rows, inputs) at the mean input (inputs,).

    Args:
        delta: of the weight.
        mean: of the inputs.
        bias: difference (rows,) of the bias, which becomes one more column.
    """
    c = delta.double() * mean.double().to(delta.device)
    return c if bias is None else torch.cat([c, bias.double()[:, None]], dim=1)


def layer_q(
    deltas: Mapping[str, Tensor], means: Mapping[str, Tensor], drop: float, eta: float = 0.45,
    *, gamma: float = 0.05, stop: float = 0.8, dtype: torch.dtype = torch.float64,
) -> dict[str, float]:  # fmt: skip
    """q of every layer, for :meth:`~toolkit.merge.darex.DAREx.with_layers`.

    Args:
        deltas: name -> what fine-tuning changed.
        means: weight name -> mean input, as :func:`.activations.inputs` measures.
        drop, eta, gamma, stop, dtype: see :func:`row_q`.

    Raises:
        ValueError: a weight without a difference, or see :func:`row_q`.
    """
    found = {}
    for name, mean in means.items():
        if name not in deltas:
            raise ValueError(f"deltas has no {name!r}, whose inputs were measured")
        c = contributions(deltas[name], mean, deltas.get(_bias(name)))
        found[name] = float(row_q(c, drop, eta, gamma=gamma, stop=stop, dtype=dtype).mean())
    return found


def least_q(signals: Mapping[str, tuple[float, float]], drop: float) -> dict[str, float]:
    """The q of least mean square change of every layer, from :func:`.activations.signals`."""
    return {name: q_star(*pair, drop) for name, pair in signals.items()}


def _bias(weight: str) -> str:
    place, dot, last = weight.rpartition(".")
    return place + dot + last.replace("weight", "bias")
