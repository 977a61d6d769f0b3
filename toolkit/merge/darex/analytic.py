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
    curve, offset = eta**2 * phi(drop) * energy, math.log(2 / gamma)
    least = torch.full_like(total, math.inf)
    found = torch.full_like(total, 1 - drop, dtype=torch.float64)
    done = torch.zeros_like(total, dtype=torch.bool)
    for q in grid(drop):
        value = (eta * ((1 - (1 - drop) / q) * total) + (curve / (4 * q**2) + offset)).abs()
        done |= value >= least
        better = value <= least
        least = torch.where(better, value, least)
        found = found.masked_fill(better, q)
        if float(done.double().mean()) >= stop:
            break
    return found


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
