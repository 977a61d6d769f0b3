r"""The structured modules of SPT: LoRA beside a layer, or an adapter after it.

.. math:: y = W x + b + \mathrm{path}(BA\,\mathrm{drop}(x)), \qquad
    y' = y + \mathrm{path}(U\,\mathrm{GELU}(D\,\mathrm{drop}(y) + d) + u)

``drop`` leaves out inputs and ``path`` the module as a whole, example by example, in training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core.adapt.beside import first_input, on_tensor
from toolkit.core.adapt.forwards import call_with, is_hooked
from toolkit.core.adapt.lowrank import LowRankLayer
from toolkit.core.adapt.sites import Site, uniform
from toolkit.core.declare.fields import BelowOne, Declared, Rank
from toolkit.core.declare.info import Info
from toolkit.select.spt.entries import Entries, own_part


def path(branch: Tensor, drop: float) -> Tensor:
    """A branch, left out for a share ``drop`` of the examples, and larger for the others."""
    if not drop:
        return branch
    keep = torch.empty(len(branch), *[1] * (branch.dim() - 1), device=branch.device)
    return branch * (keep.bernoulli_(1 - drop) / (1 - drop)).to(branch.dtype)


class StructuredLayer(LowRankLayer):
    """LoRA of one layer, ``A`` (r, n) and ``B`` (m, r), and entries of its bias that move."""

    scale = 1.0

    def __init__(self, method: Any, site: Site, generator: torch.Generator | None):
        super().__init__(method, site)
        self.drop_path = method.drop_path
        r, m, n = method.rank, site.rows, site.cols
        self.A = nn.Parameter(uniform((r, n), 1 / math.sqrt(n), site, generator))
        self.B = nn.Parameter(torch.zeros(m, r, dtype=site.dtype, device=site.device))
        self.entries = Entries(site, method.moving.get(site.name, {}))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.B, self.A

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        return self.entries.merged(base) | super().merged(base)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        drops = self.training and (self.dropout or self.drop_path)
        bias = self.entries.bias_delta
        if not drops and bias is None:
            return super().forward(base, *args, **kwargs)
        if self.reads_whole(base) or is_hooked(base):
            if drops:
                raise ValueError(
                    f"dropout and drop_path cannot act on layer {self.site.name!r} "
                    f"({type(base).__name__}), whose weight is read as a whole; set both to 0 or "
                    "leave the layer out of targets"
                )
            return call_with(base, self.merged(base), self.site.name, args, kwargs)
        if drops:
            y = self._dropped(base, first_input(self.site.name, args, kwargs))
        else:
            y = super().forward(base, *args, **kwargs)
        if bias is None:
            return y
        dense = bias.new_zeros(self.site.rows).index_put((self.entries.bias_index,), bias)
        return y + dense.to(y.dtype)

    def _dropped(self, base: nn.Module, x: Tensor) -> Tensor:
        A, B = self.A, self.B
        if A.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            A, B = A.to(x.dtype), B.to(x.dtype)
        branch = F.linear(F.linear(F.dropout(x, self.dropout), A), B)
        return base(x) + path(branch, self.drop_path)

    def origin(self, base: nn.Module) -> str:
        """Hash of the numbers of the base's bias that move; "" where none does."""
        return self.entries.origin(base)

    def resize(self, state: Mapping[str, Tensor]) -> None:
        """Take on as many entries of the bias as saved tensors have."""
        self.entries.resize(own_part(state))

    @property
    def changed(self) -> int:
        """Numbers of the layer that may differ from the base once merged."""
        return self.site.rows * self.site.cols + self.entries.count

    def facts(self) -> dict[str, Any]:
        """What the report says of this layer."""
        return {"form": "lora", "moving": self.entries.count}


@dataclass(frozen=True)
class SPTAdapter(Declared):
    """The sequential adapter of SPT-Adapter: a bottleneck on what a layer gives.

    Args:
        width: hidden units r. Source: official code, 8.
        dropout: dropout on what it reads. Source: official code, 0.1.
        drop_path: share of examples for which it is left out in training. Source: official code,
            0.1.
    """

    width: Rank = 8
    dropout: BelowOne = 0.1
    drop_path: BelowOne = 0.1

    info: ClassVar[Info] = Info(
        slug="spt",
        part="select",
        title="SPT adapter",
        arxiv="2303.08566",
        year=2023,
        code="ziplab/SPT",
        equation=r"y' = y + U\,\mathrm{GELU}(D y + d) + u",
        acts_on="what leaves a layer",
        count=r"2rm + r + m",
        inference="two small products per layer",
        colour="#B5446E",
        mergeable=False,
        kinds=("linear", "hf_conv1d"),
    )
    moving: ClassVar[Mapping[str, Mapping[str, Tensor]]] = {}
    """Layer -> parameter -> entries that move beside the module; a plan fills it in."""

    def build(self, site: Site, generator: torch.Generator | None = None) -> AdapterLayer:
        return AdapterLayer(self, site, generator)

    def count(self, site: Site) -> int:
        """2 r m + r + m numbers, and the entries of the bias."""
        beside = sum(len(index) for index in self.moving.get(site.name, {}).values())
        return 2 * self.width * site.rows + self.width + site.rows + beside


class AdapterLayer(nn.Module):
    """The adapter after one layer: ``down`` (r, m), ``up`` (m, r) = 0 at the start, two biases."""

    def __init__(self, method: SPTAdapter, site: Site, generator: torch.Generator | None):
        super().__init__()
        self.site, self.dropout, self.drop_path = site, method.dropout, method.drop_path
        r, m = method.width, site.rows
        bound, new = 1 / math.sqrt(m), {"dtype": site.dtype, "device": site.device}
        self.down = nn.Parameter(uniform((r, m), bound, site, generator))
        self.down_bias = nn.Parameter(uniform((r,), bound, site, generator))
        self.up = nn.Parameter(torch.zeros(m, r, **new))
        self.up_bias = nn.Parameter(torch.zeros(m, **new))
        self.entries = Entries(site, method.moving.get(site.name, {}))

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def added(y: Tensor) -> Tensor:
            z = y.to(self.down.dtype)
            z = F.dropout(z, self.dropout, self.training)
            hidden = F.gelu(F.linear(z, self.down, self.down_bias))
            branch = F.linear(hidden, self.up, self.up_bias)
            return y + path(branch, self.drop_path if self.training else 0.0).to(y.dtype)

        new = self.entries.merged(base)
        y = call_with(base, new, self.site.name, args, kwargs) if new else base(*args, **kwargs)
        return on_tensor(y, added)

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        raise TypeError(f"the adapter after {self.site.name!r} is no change of a weight")

    def origin(self, base: nn.Module) -> str:
        """Hash of the numbers of the base's bias that move; "" where none does."""
        return self.entries.origin(base)

    def resize(self, state: Mapping[str, Tensor]) -> None:
        """Take on as many entries of the bias as saved tensors have."""
        self.entries.resize(own_part(state))

    @property
    def changed(self) -> int:
        """Numbers of the base that differ once merged."""
        return self.entries.count

    def facts(self) -> dict[str, Any]:
        """What the report says of this layer."""
        return {"form": "adapter", "moving": self.entries.count}
