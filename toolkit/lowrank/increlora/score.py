r"""IncreLoRA's score of a layer, :math:`\sum|\Delta W\odot G|`, from its input and output gradient.

G is needed entry by entry, so no low-rank form of it exists; it is formed and dropped here.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from toolkit.core.adapt.sites import Site
from toolkit.core.adapt.weight_gradient import weight_gradient


def size(site: Site, like: str) -> float:
    """What the sum over a matrix is divided by: mn ("paper") or its root."""
    entries = site.rows * site.cols
    return float(entries) if like == "paper" else math.sqrt(entries)


class Scratch:
    """Memory in which the layers of a model score, one after another, until it is cleared.

    Two matrices of the size of a weight, made anew for every layer, cost more page faults than
    the arithmetic on them takes.
    """

    def __init__(self) -> None:
        self.held: dict[tuple, Tensor] = {}

    def clear(self) -> None:
        self.held.clear()

    def product(self, role: str, a: Tensor, b: Tensor) -> Tensor:
        """a (m, k) times b (k, n), in memory that the next product of this role writes over."""
        # what must see each operation, or choose its dtype, does
        if not (type(a) is type(b) is Tensor and a.dtype == b.dtype) or (
            torch._C._is_any_autocast_enabled()
        ):
            return a @ b
        key, count = (role, a.dtype, a.device), len(a) * b.shape[1]
        if key not in self.held or len(self.held[key]) < count:
            self.held[key] = a.new_empty(count)
        return torch.mm(a, b, out=self.held[key][:count].view(len(a), b.shape[1]))


@torch.no_grad()
def increment_score(
    base: nn.Module,
    site: Site,
    left: Tensor,
    right: Tensor,
    x: Tensor | None,
    g: Tensor,
    dtype: torch.dtype | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    r""":math:`\sum|\Delta W\odot G|` of one frozen layer, a scalar.

    ``left`` (m, r) times ``right`` (r, n) is :math:`\Delta W`; ``x`` and ``g`` are the input and
    the gradient at the output, or None and that at the weight. For ``dtype`` see
    :func:`~toolkit.core.adapt.weight_gradient.weight_gradient`. Intermediate matrices lie in
    ``scratch``, if given.
    """
    product = (scratch or Scratch()).product
    if x is None:
        G = site.to_matrix(g)
    elif site.kind != "embedding":
        G = weight_gradient(base, site, x, g, dtype, partial(product, "gradient"))
    else:
        # only the entries that were looked up have a gradient
        seen, where = torch.unique(x, return_inverse=True)
        rows = torch.zeros(len(seen), site.rows, dtype=g.dtype, device=g.device)
        rows.index_add_(0, where.flatten(), g.reshape(-1, site.rows))
        if base.padding_idx is not None:
            rows.masked_fill_((seen == base.padding_idx)[:, None], 0.0)
        G, right = rows.T, right[:, seen]
    # one dtype before the product: mixed ones are multiplied one by one
    return product("difference", left, right).mul_(G.to(left.dtype)).abs_().sum()
