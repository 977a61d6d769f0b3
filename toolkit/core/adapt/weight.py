r"""Changes of a weight: W = f(W_0, theta), formed at each call.

The plain way to write a method: one equation, and the layer's own forward with the new weight.

>>> import torch
>>> from toolkit.core.adapt.weight import WeightLayer
>>> class RowScale(WeightLayer):  # W = diag(1 + d) W_0
...     def __init__(self, site):
...         super().__init__(site)
...         self.d = torch.nn.Parameter(torch.zeros(site.rows, 1))
...     def new(self, weight):
...         return (1 + self.d) * weight
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from toolkit.core.adapt.sites import Site, with_padding


class WeightLayer(nn.Module):
    """Base of adapters of one site that compute its whole weight.

    A subclass gives :meth:`new`, and sets up its parameters in ``site.dtype`` on ``site.device``.
    """

    def __init__(self, site: Site):
        super().__init__()
        self.site = site

    def new(self, weight: Tensor) -> Tensor:
        """The new matrix (m, n), from the frozen one in the site's dtype."""
        raise NotImplementedError

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        site = self.site
        old = base._parameters[site.parameter]
        matrix = old[:, None] if site.kind == "norm" else site.to_matrix(old)
        new = self.new(matrix.to(site.dtype))
        flat = new[:, 0] if site.kind == "norm" else site.to_weight(new)
        return {site.parameter: with_padding(base, site, flat.to(old.dtype).contiguous())}

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return functional_call(base, self.merged(base), args, kwargs)
