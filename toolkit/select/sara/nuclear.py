r"""The nuclear norm of a masked matrix, and its gradient on the entries that move.

.. math:: \lVert W\odot M\rVert_* = \sum_i \sigma_i,\qquad
    \nabla_p = (U V^\top)[M]\quad\text{with}\quad W\odot M = U\,\mathrm{diag}(\sigma)\,V^\top
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense(shape: tuple[int, ...], index: Tensor, values: Tensor) -> Tensor:
    """W with M: the matrix that holds the values (k,) at their places (k,), and 0 elsewhere."""
    flat = values.detach().new_zeros(shape[0] * shape[1])
    return flat.scatter_(0, index, values.detach()).view(shape[0], shape[1])


def norm(shape: tuple[int, ...], index: Tensor, values: Tensor) -> Tensor:
    """The sum of singular values, a scalar without graph."""
    return torch.linalg.svdvals(_wide(dense(shape, index, values))).sum()


def gradient(shape: tuple[int, ...], index: Tensor, values: Tensor) -> Tensor:
    """Gradient of the nuclear norm for each value, (k,).

    Directions whose singular value is 0 up to rounding have no gradient of their own and are left
    out; that is the smallest of the subgradients.
    """
    U, sizes, V = torch.linalg.svd(_wide(dense(shape, index, values)), full_matrices=False)
    if not len(sizes):
        return torch.zeros_like(values)
    rounding = torch.finfo(sizes.dtype).eps * max(shape) * sizes[0]
    kept = sizes > rounding
    return ((U * kept) @ V).reshape(-1)[index].to(values.dtype)


def _wide(matrix: Tensor) -> Tensor:
    """float32 instead of a half precision, in which there is no decomposition."""
    return matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
