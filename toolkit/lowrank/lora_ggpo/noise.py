"""How large the noise of each output neuron is: LoRA-GGPO's formulas, one (m, n) matrix or many.

Every function takes a leading axis of layers as well, so that layers of one shape are handled
together. No function forms an (m, n) matrix that it was not given.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product_row_squares(left: Tensor, right: Tensor) -> Tensor:
    r"""Squared norm of each row of a product, :math:`\|(LR)_{i,:}\|^2 = L_i (R R^\top) L_i^\top`.

    L is (..., m, k), R (..., k, n), the result (..., m) and never negative.
    """
    return ((left @ (right @ right.mT)) * left).sum(-1).clamp_min(0)


def gradient_row_squares(A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, s: float) -> Tensor:
    r"""Squared row norms of LoRA's own picture of the weight's gradient, (..., m).

    .. math:: \nabla W \approx s\,(\partial_B\mathcal L\,A + B\,\partial_A\mathcal L)

    This is :math:`s^2(GA^\top A + BB^\top G)` for the true gradient G of the weight: a view through
    the factors, which depends on how BA is split, and which at B = 0 sees only the rows of A.

    A and gA are (..., r, n), B and gB (..., m, r), s is LoRA's scale.
    """
    left, right = torch.cat([gB, B], -1), torch.cat([A, gA], -2)
    return s * s * product_row_squares(left, right)


def weight_row_squares(base: Tensor, seen: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    r"""Squared row norms of W' = W0 + s BA, exact, (..., m).

    .. math:: \|W'_i\|^2 = \|W_{0,i}\|^2 + 2s\,\langle (W_0A^\top)_i, B_i\rangle
        + s^2\,B_i (AA^\top) B_i^\top

    From ``base``, the squared row norms of W0 (..., m), and ``seen``, W0 A^T (..., m, r).
    """
    cross = 2 * s * (seen * B).sum(-1)
    return (base + cross + s * s * product_row_squares(B, A)).clamp_min(0)


def noise_std(
    kind: str, weight: Tensor, gradient: Tensor, inputs: int, sigma: float, beta: float
) -> Tensor:
    r"""Standard deviation of the noise on each entry of each row, (..., m).

    ``"ggpo"``: :math:`\sigma\sqrt{(\|W'_i\|^2 + \beta\|\nabla W_i\|^2)/n}`. ``"isotropic"``: one
    value for all rows, whose square is the mean of ggpo's squares, so that the layer's total
    variance is the same. ``"kohya"``: :math:`(\sigma\|W'_i\| + \beta\|\nabla W_i\|^2)/\sqrt m`, a
    sum of two scales, with the number of outputs m below.

    ``weight`` and ``gradient`` are squared row norms, (..., m), and ``inputs`` is n.
    """
    if kind == "kohya":
        return (sigma * weight.sqrt() + beta * gradient) / weight.shape[-1] ** 0.5
    variance = sigma**2 / inputs * (weight + beta * gradient)
    if kind == "isotropic":
        variance = variance.mean(-1, keepdim=True).expand_as(variance)
    return variance.sqrt()
