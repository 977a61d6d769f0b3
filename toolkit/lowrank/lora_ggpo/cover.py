"""LoRA's layer under a cover: what LoRA-GGPO and LoRA-MGPO train at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.cover import Cover
from toolkit.core.adapt.sites import Site
from toolkit.lowrank.lora import LoRA, LoRALayer


class CoveredLayer(LoRALayer):
    """LoRA's factors of one layer, and the :class:`~toolkit.core.adapt.cover.Cover` over it."""

    def __init__(self, method: LoRA, site: Site, generator: torch.Generator | None):
        super().__init__(method, site, generator)
        self.cover = Cover()

    def perturbed(self) -> bool:
        """Whether a forward pass now would run at the perturbed weight: none under ``no_grad``."""
        return self.training and self.cover.lies and torch.is_grad_enabled()

    def factors(self) -> tuple[Tensor, Tensor]:
        """B and A as a forward pass now would use them."""
        if self.cover.shift is None or not self.perturbed():
            return self.B, self.A
        dA, dB = self.cover.shift
        return self.B + dB, self.A + dA

    def delta(self) -> Tensor:
        """s B A, (m, n), without what lies over it."""
        return self.scale * (self.B @ self.A)

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        """The weight that a forward pass now would use: plain under ``no_grad``, as in a merge."""
        if not self.perturbed():
            return super().merged(base)
        return self.cover.call(base, self.site.parameter, super().merged)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.perturbed() or self.reads_whole(base):  # a whole weight is covered in merged()
            return super().forward(base, *args, **kwargs)
        plain = super().forward
        return self.cover.call(base, self.site.parameter, lambda x: plain(x, *args, **kwargs))
