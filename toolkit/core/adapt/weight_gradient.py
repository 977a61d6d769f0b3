"""The gradient of a layer's weight matrix from its input and output gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core.adapt.sites import Site


def weight_gradient(
    base: nn.Module,
    site: Site,
    x: Tensor,
    g: Tensor,
    dtype: torch.dtype | None = None,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Tensor:
    """Gradient of the loss for the (m, n) matrix of a layer, from its input and output gradient.

    Args:
        base, site: a linear, Conv1D or convolution layer.
        x: its input; features last for linear layers, channels first for convolutions.
        g: gradient at its output.
        dtype: in which linear layers multiply; None: that of ``g``.
        product: of two matrices, for linear layers.
    """
    if site.kind != "conv":
        x, g = x.to(dtype or g.dtype), g.to(dtype or g.dtype)
        return product(g.reshape(-1, site.rows).T, x.reshape(-1, site.cols))
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
