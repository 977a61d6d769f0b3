r"""IncreLoRA's score of a layer, :math:`\sum|\Delta W\odot G|`, from its input and output gradient.

G is needed entry by entry, so no low-rank form of it exists; it is formed and dropped here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core.adapt.sites import Site


def size(site: Site, like: str) -> float:
    """What the sum over a matrix is divided by: mn ("paper") or its root."""
    entries = site.rows * site.cols
    return float(entries) if like == "paper" else math.sqrt(entries)


def weight_gradient(
    base: nn.Module, site: Site, x: Tensor, g: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Gradient of the loss for the (m, n) matrix of a layer, from its input and output gradient.

    Args:
        base, site: a linear, Conv1D or convolution layer.
        x: its input; features last for linear layers, channels first for convolutions.
        g: gradient at its output.
        dtype: in which linear layers multiply; None: that of ``g``.
    """
    if site.kind != "conv":
        x, g = x.to(dtype or g.dtype), g.to(dtype or g.dtype)
        return g.reshape(-1, site.rows).T @ x.reshape(-1, site.cols)
    x, dims = x.to(g.dtype), len(site.shape) - 2
    if x.dim() == dims + 1:
        x, g = x.unsqueeze(0), g.unsqueeze(0)
    # padded by hand, so that every padding mode and "same" are one case
    mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
    x = F.pad(x, base._reversed_padding_repeated_twice, mode=mode)
    grad = torch.nn.grad
    gradient = (grad.conv1d_weight, grad.conv2d_weight, grad.conv3d_weight)[dims - 1]
    return site.to_matrix(
        gradient(x, site.shape, g, base.stride, 0, base.dilation, site.groups).contiguous()
    )


@torch.no_grad()
def increment_score(
    base: nn.Module,
    site: Site,
    left: Tensor,
    right: Tensor,
    x: Tensor | None,
    g: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r""":math:`\sum|\Delta W\odot G|` of one layer, a scalar.

    Args:
        base, site: the frozen layer.
        left, right: (m, r) and (r, n) with :math:`\Delta W` their product.
        x, g: the layer's input and the gradient at its output; or None and that at its weight.
        dtype: see :func:`weight_gradient`.
    """
    if x is None:
        G = site.to_matrix(g)
    elif site.kind != "embedding":
        G = weight_gradient(base, site, x, g, dtype)
    else:
        # only the entries that were looked up have a gradient
        seen, where = torch.unique(x, return_inverse=True)
        rows = torch.zeros(len(seen), site.rows, dtype=g.dtype, device=g.device)
        rows.index_add_(0, where.flatten(), g.reshape(-1, site.rows))
        if base.padding_idx is not None:
            rows.masked_fill_((seen == base.padding_idx)[:, None], 0.0)
        G, right = rows.T, right[:, seen]
    # one dtype before the product: mixed ones are multiplied one by one
    return (left @ right).mul_(G.to(left.dtype)).abs_().sum()
