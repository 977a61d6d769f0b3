r"""Kernels between the rows of two factors: how few numbers make a matrix of full rank.

With A of shape (P, n, k) and B of shape (P, m, k), r = P k columns in P pieces, a kernel gives the
matrix K of shape (n, m), one number for each pair of an input j and an output i:

=========== =================================================================================
linear      :math:`\sum_p A^{(p)}_j \cdot B^{(p)}_i`, which is LoRA
piecewise   :math:`\sum_p c_p \lVert A^{(p)}_j - B^{(p)}_i \rVert`, :math:`c = (+c, -c, \dots)`
mixed       piecewise, plus :math:`\alpha\,\mathrm{softmax}_i(K/\gamma) + \beta`
sigmoid     :math:`\alpha / (1 + e^{-\beta\,A_j \cdot B_i}) + \gamma`
rbf         :math:`\alpha\, e^{-\beta \lVert A_j - B_i \rVert^2} + \gamma`
=========== =================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

SCALARS: dict[str, dict[str, float]] = {
    "linear": {},
    "piecewise": {},
    "mixed": {"alpha": 1.0, "gamma": 1.0, "beta": 0.0},
    # their start is ours: near 0 where the factors are small
    "sigmoid": {"alpha": 1.0, "beta": 1.0, "gamma": -0.5},
    "rbf": {"alpha": 1.0, "beta": 1.0, "gamma": -1.0},
}
"""Kernel -> its learned scalars and their start."""

SMALL = 25
"""Rows up to which torch.cdist subtracts; beyond, it takes squares from a product of matrices."""


def distances(A: Tensor, B: Tensor) -> Tensor:
    """Euclidean distances between the rows of each piece, (P, n, k) and (P, m, k) -> (P, n, m).

    Few rows are subtracted here, because torch.cdist has no second derivative there.
    """
    if A.shape[1] <= SMALL and B.shape[1] <= SMALL:
        return (A[:, :, None] - B[:, None]).norm(dim=-1)
    return torch.cdist(A, B)


def products(A: Tensor, B: Tensor) -> Tensor:
    """Inner products of whole rows, (n, m)."""
    return (A @ B.mT).sum(0)


def linear(A: Tensor, B: Tensor, c: Tensor) -> Tensor:
    return products(A, B)


def piecewise(A: Tensor, B: Tensor, c: Tensor) -> Tensor:
    return (c[:, None, None] * distances(A, B)).sum(0)


def mixed(A: Tensor, B: Tensor, c: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    K = piecewise(A, B, c)
    return K + alpha * torch.softmax(K / gamma, -1) + beta


def sigmoid(A: Tensor, B: Tensor, c: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    return alpha * torch.sigmoid(beta * products(A, B)) + gamma


def rbf(A: Tensor, B: Tensor, c: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    squares = A.square().sum((0, 2))[:, None] + B.square().sum((0, 2)) - 2 * products(A, B)
    return alpha * torch.exp(-beta * squares) + gamma


KERNELS: Mapping[str, Callable[..., Tensor]] = {
    "linear": linear,
    "piecewise": piecewise,
    "mixed": mixed,
    "sigmoid": sigmoid,
    "rbf": rbf,
}
"""Kernel -> function of A, B, the pieces' weights c (P,) and its scalars; gives (n, m)."""
