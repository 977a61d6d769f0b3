"""The pair of one site, attention's fused projection included."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from toolkit.core.adapt.beside import ScaleShift
from toolkit.core.adapt.forwards import call_with, frozen
from toolkit.core.adapt.sites import Site


class PairLayer(ScaleShift):
    """``gamma`` (c,) and ``beta`` (c,) after one layer.

    Of ``nn.MultiheadAttention`` they follow the projection to queries, keys and values in one,
    c = 3 x embed, in this order; nothing outside sees what that projection gives, so the module is
    called with the new weight.

    Args:
        site: where.
        learn: which of the two trains; "scale" has no beta, "shift" a gamma that stays 1.
        std: standard deviation of the noise on both starts.
        generator: source of that draw.
    """

    def __init__(
        self,
        site: Site,
        learn: Literal["both", "scale", "shift"] = "both",
        std: float = 0.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__(site, learn != "scale", std, generator)
        if learn == "shift":
            ones = torch.ones_like(self.gamma.detach())
            del self.gamma
            self.register_buffer("gamma", ones, persistent=False)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.site.kind == "attention":
            return call_with(base, self.merged(base), self.site.name, args, kwargs)
        return super().forward(base, *args, **kwargs)

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        if self.site.kind != "attention":
            return super().merged(base)
        old = frozen(base, "in_proj_weight", self.site.name)
        wide = self.site.dtype
        new = {"in_proj_weight": (self.gamma[:, None] * old.to(wide)).to(old.dtype)}
        bias = base._parameters.get("in_proj_bias")
        moved = self.beta if bias is None else self.gamma * bias.to(wide)
        if bias is not None and self.beta is not None:
            moved = moved + self.beta
        if moved is not None:
            new["in_proj_bias"] = moved.to(old.dtype)
        return new
