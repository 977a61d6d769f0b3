r"""Cascade polynomial regression: ratios for guidance weights and numbers of calls not searched.

With :math:`n` = calls / 50, :math:`c` = guidance / 12 and :math:`u = i` / calls, :math:`i` from 1:

.. math:: a_{jk} = \phi_{jk0}n^2 + \phi_{jk1}n + \phi_{jk2}, \quad
    b_j = a_{j0}c^2 + a_{j1}c + a_{j2}, \quad \rho = \sum_{j=0}^{3} b_j u^j

and :math:`\rho = 1` for :math:`i < 3`. It is linear in :math:`\phi`, so least squares fit it.

Source: official code, ``cascade_polynomial_regression``. A summary of the paper speaks of degree 4
in the step; the code and its published 36 numbers have a cubic, which is followed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

FORCED = 2
"""So many first ratios are 1."""
CALLS, GUIDANCE = 50.0, 12.0
"""What the number of calls and the guidance are divided by."""


def cpr_features(guidance: float, calls: int, degree: int = 3) -> Tensor:
    """What the coefficients are multiplied with, for each step: (calls, (degree + 1) * 9), double.

    Args:
        guidance: weight of the guidance.
        calls: network calls, one a step.
        degree: of the polynomial in the step.

    Raises:
        ValueError: no call, or a weight that is not finite.
    """
    if calls < 1 or not math.isfinite(guidance):
        raise ValueError(f"guidance, calls: finite, and 1 or more, got {guidance} and {calls}")
    down = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    step = torch.arange(1, calls + 1, dtype=torch.float64) / calls
    u = step[:, None] ** torch.arange(degree + 1)
    c, n = (guidance / GUIDANCE) ** down, (calls / CALLS) ** down
    return torch.einsum("sj,k,l->sjkl", u, c, n).flatten(1)


def cpr_ratios(coefficients: Tensor, guidance: float, calls: int) -> list[float]:
    """The ratios that the polynomials give, one per step; the first two are 1.

    Args:
        coefficients: phi (degree + 1, 3, 3), by power of the step, of the guidance (falling) and of
            the calls (falling); or the same numbers in a row.
        guidance: weight of the guidance.
        calls: network calls, one a step.

    Raises:
        ValueError: coefficients that are no multiple of nine; and as :func:`cpr_features`.
    """
    flat = torch.as_tensor(coefficients, dtype=torch.float64).flatten()
    if not len(flat) or len(flat) % 9:
        raise ValueError(f"coefficients: (degree + 1, 3, 3), got {len(flat)} numbers")
    found = (cpr_features(guidance, calls, len(flat) // 9 - 1) @ flat).tolist()
    return [1.0] * min(FORCED, calls) + found[FORCED:]


def fit_cpr(
    searched: Iterable[tuple[float, int, Sequence[float]]], degree: int = 3, ridge: float = 0.0
) -> Tensor:
    """Fit coefficients to searched ratios by least squares; the first two steps are left out.

    Args:
        searched: (guidance, calls, ratios) of each search.
        degree: of the polynomial in the step.
        ridge: what the squares of the coefficients cost, each in the unit in which its feature has
            a mean square of 1; 0 takes the least squares solution of smallest norm.

    Returns:
        phi (degree + 1, 3, 3) in double precision.

    Raises:
        ValueError: no search with more than two steps, a list of the wrong length, or a negative
            ridge.
    """
    rows, wanted = [], []
    for guidance, calls, ratios in searched:
        if len(ratios) != calls:
            raise ValueError(f"ratios: {calls} for {calls} calls, got {len(ratios)}")
        rows.append(cpr_features(guidance, calls, degree)[FORCED:])
        wanted += [float(r) for r in ratios[FORCED:]]
    if not wanted:
        raise ValueError("searched: no ratio beyond the first two steps; give longer searches")
    if ridge < 0:
        raise ValueError(f"ridge: 0 or more, got {ridge}")
    x, y = torch.cat(rows), torch.tensor(wanted, dtype=torch.float64)
    unit = x.square().mean(0).sqrt()
    x = x / unit
    if ridge:
        cost = (ridge * len(x)) ** 0.5 * torch.eye(x.shape[1], dtype=torch.float64)
        x, y = torch.cat([x, cost]), torch.cat([y, torch.zeros(x.shape[1], dtype=torch.float64)])
    found = torch.linalg.lstsq(x, y[:, None], driver="gelsd").solution[:, 0] / unit
    return found.view(degree + 1, 3, 3)
