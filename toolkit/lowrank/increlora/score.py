r"""IncreLoRA's score of a layer, :math:`\sum|\Delta W\odot G|`, from its input and output gradient.

G is needed entry by entry, so no low-rank form of it exists; it is formed and dropped here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from toolkit.core.adapt.sites import Site
from toolkit.core.adapt.weight_gradient import weight_gradient


def size(site: Site, like: str) -> float:
    """What the sum over a matrix is divided by: mn ("paper") or its root."""
    entries = site.rows * site.cols
    return float(entries) if like == "paper" else math.sqrt(entries)


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
    r""":math:`\sum|\Delta W\odot G|` of one frozen layer, a scalar.

    ``left`` (m, r) times ``right`` (r, n) is :math:`\Delta W`; ``x`` and ``g`` are the input and
    the gradient at the output, or None and that at the weight. For ``dtype`` see
    :func:`~toolkit.core.adapt.weight_gradient.weight_gradient`.
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
