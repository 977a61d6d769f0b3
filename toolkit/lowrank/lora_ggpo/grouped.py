"""The controllers' common part: layers of one shape in one stack, gradients read with care."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.steps.controller import Controller
from toolkit.lowrank.lora_ggpo.noise import gradient_row_squares


@dataclass
class Group:
    """Layers of one shape, handled as one stack: their numbers, and the shape (m, n)."""

    members: list[int]
    rows: int
    cols: int
    scale: float


class GroupedController(Controller):
    """Common to both: layers in groups of one shape, gradients read with care.

    Args:
        method: the hyperparameters.
        adapted: the model.
        optimizer: what the gradients are for.
    """

    reads: bool  # whether gradients are read at all

    def __init__(self, method: Any, adapted: Any, optimizer: torch.optim.Optimizer):
        self.method, self.optimizer = method, optimizer
        self.names = list(adapted.sites)
        self.sites_of = [placed.site for placed in adapted.sites.values()]
        self.bases = [placed.layer.base for placed in adapted.sites.values()]
        self.layers = [placed.layer.adapter for placed in adapted.sites.values()]
        found: dict[Any, list[int]] = {}
        for i, layer in enumerate(self.layers):
            key = (layer.A.shape, layer.B.shape, layer.A.dtype, layer.A.device, layer.scale)
            found.setdefault(key, []).append(i)
        self.groups = [
            Group(m, self.sites_of[m[0]].rows, self.sites_of[m[0]].cols, self.layers[m[0]].scale)
            for m in found.values()
        ]
        self.step = 0

    def released(self) -> None:
        """Take off what lies over the layers."""
        for layer in self.layers:
            layer.cover.clear()

    def tensors(self) -> list[nn.Parameter]:
        """Every A, then every B."""
        return [layer.A for layer in self.layers] + [layer.B for layer in self.layers]

    def stack(self, group: Group, name: str) -> Tensor:
        """The factor ``name`` of a group's layers, (k, ...)."""
        return torch.stack([getattr(self.layers[i], name).detach() for i in group.members])

    def gradients(self) -> list[Tensor] | None:
        """Gradients of every A, then of every B, zeros where there is none; None if all lack.

        Also None where GradScaler found an overflow and a fused optimizer is about to skip the
        step.
        """
        if getattr(self.optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                f"{type(self.method).__name__} reads gradients, but GradScaler leaves them scaled "
                "for a fused optimizer; build the optimizer with fused=False, or call "
                "scaler.unscale_(optimizer) before scaler.step(optimizer)"
            )
        overflow = getattr(self.optimizer, "found_inf", None)
        tensors = self.tensors()
        if (overflow is not None and bool(overflow)) or all(t.grad is None for t in tensors):
            return None
        for t, name in zip(tensors, 2 * self.names, strict=True):
            if t.grad is not None and t.grad.layout != torch.strided:
                raise TypeError(
                    f"the gradient of layer {name!r} is sparse, and its row norms are read dense; "
                    "build the layer with sparse=False"
                )
        return [t.grad if t.grad is not None else torch.zeros_like(t) for t in tensors]

    def approximate(self, grads: list[Tensor]) -> list[Tensor]:
        """Squared row norms of s (dB A + B dA), per group (k, m)."""
        half, result = len(self.layers), []
        for group in self.groups:
            gA = torch.stack([grads[i] for i in group.members])
            gB = torch.stack([grads[half + i] for i in group.members])
            A, B = self.stack(group, "A"), self.stack(group, "B")
            result.append(gradient_row_squares(A, B, gA, gB, group.scale))
        return result

    def check_finite(self, sizes: Iterable[tuple[Group, Tensor]]) -> None:
        """Raise FloatingPointError naming a layer whose value in a group's (k,) is not finite."""
        sizes = list(sizes)
        device = sizes[0][1].device
        if bool(torch.stack([v.sum().to(device) for _, v in sizes]).isfinite().all()):
            return
        bad = [g.members[int(i)] for g, v in sizes for i in (~v.isfinite()).nonzero()]
        where = self.names[bad[0]] if bad else self.names[0]
        raise FloatingPointError(
            f"the gradient of layer {where!r} is not finite at step {self.step}; no weight was "
            "changed. Lower the learning rate, clip gradients, or skip the step"
        )

    def check_same(self, state: dict[str, Tensor], needed: Iterable[str]) -> None:
        """Raise ValueError when a saved state lacks what this variant needs."""
        missing = [key for key in needed if key not in state]
        if missing:
            raise ValueError(
                f"the saved schedule lacks {missing[0]!r}: another variant than "
                f"{self.method.variant!r} wrote it, or it is for other layers; attach the one "
                "that wrote it"
            )
