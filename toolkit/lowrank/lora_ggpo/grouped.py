"""What both controllers share: layers of one shape in one stack, and gradients read with care."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.model import Adapted
from toolkit.core.adapt.steps.controller import Controller
from toolkit.core.adapt.steps.gradients import present, skipped
from toolkit.core.adapt.steps.shapes import alike, groups
from toolkit.lowrank.lora_ggpo.noise import gradient_row_squares


class GroupedController(Controller):
    """Common to noise and momentum.

    Attributes: ``bases`` (the frozen layers), ``factors`` (every A, then every B, by name),
    ``groups`` (numbers of the layers of one shape, group by group).
    """

    def __init__(self, method: Any, adapted: Adapted, optimizer: torch.optim.Optimizer):
        super().__init__(method, adapted.adapters, optimizer)
        self.bases = [adapted.sites[name].layer.base for name in self.names]
        self.groups = groups(self.layers, lambda x: (alike(x.A, x.B), x.scale))
        pairs = list(zip(self.names, self.layers, strict=True))
        self.factors = {f"{n}.{leaf}": getattr(x, leaf) for leaf in "AB" for n, x in pairs}

    def named(self) -> dict[str, nn.Parameter]:
        return self.factors

    def released(self) -> None:
        for layer in self.layers:
            layer.cover.clear()

    def gradients(self) -> dict[str, Tensor] | None:
        """Gradients by name, zeros where there is none; None if all lack or the step is skipped."""
        none = all(p.grad is None for p in self.factors.values())
        if skipped(self.optimizer, self.title) or none:
            return None
        found = present(self.factors, self.title)
        return {n: found[n] if n in found else torch.zeros_like(p) for n, p in self.factors.items()}

    def stack(self, leaf: str, group: Sequence[int], of: Mapping[str, Tensor]) -> Tensor:
        """What ``of`` holds for A or B of a group's layers, (k, ...)."""
        return torch.stack([of[f"{self.names[i]}.{leaf}"].detach() for i in group])

    def row_squares(self, of: Mapping[str, Tensor]) -> list[Tensor]:
        """Squared row norms of s (dB A + B dA), (k, m) per group; ``of`` holds dA and dB."""
        return [
            gradient_row_squares(
                *(self.stack(leaf, g, x) for x in (self.factors, of) for leaf in "AB"),
                self.layers[g[0]].scale,
            )
            for g in self.groups
        ]

    def by_layer(self, stacks: Sequence[Tensor]) -> dict[str, Tensor]:
        """Layer name -> its part of the groups' stacks."""
        pairs = zip(self.groups, stacks, strict=True)
        return {self.names[i]: x for g, s in pairs for i, x in zip(g, s.unbind(), strict=True)}
