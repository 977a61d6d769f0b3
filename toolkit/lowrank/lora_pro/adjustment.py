"""LoRA-Pro around each step: gradients are exchanged before it and put back after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.steps.controller import Controller
from toolkit.core.adapt.steps.shapes import alike, groups, stacked
from toolkit.lowrank.lora_pro.projection import Frame


class Adjustment(Controller):
    """Around each step: the gradients of A and B give way to the adjusted pair.

    The optimizer sees the adjusted pair in ``p.grad``; after the step the raw gradients stand
    there again, as after any other step. This is the efficient mode, for any optimizer; the full
    mode (:mod:`toolkit.lowrank.lora_pro.moments`) derives from it.

    Attributes: ``A`` and ``B`` (factors of every layer), ``groups`` (layers of one shape).

    Raises:
        RuntimeError: in ``before_step``, before anything has changed: one factor of a layer has no
            gradient.
    """

    def __init__(
        self, method: Any, layers: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
    ):
        super().__init__(method, layers, optimizer)
        self.A, self.B = [x.A for x in self.layers], [x.B for x in self.layers]
        self.groups = groups(self.layers, lambda x: (alike(x.A, x.B), x.scale))
        self._raw: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    @torch.no_grad()
    def before_step(self) -> None:
        # all that can fail comes first, so that a refusal leaves no layer half way
        active = [[i for i in group if self._reached(i)] for group in self.groups]
        damping = self.method.damping
        frames = [
            Frame(stacked(self.A, at), stacked(self.B, at), damping) if at else None
            for at in active
        ]
        for k, (at, frame) in enumerate(zip(active, frames, strict=True)):
            if frame is not None:
                raw = [stacked([p.grad for p in factors], at) for factors in (self.A, self.B)]
                gA, gB = self.moved(k, at, frame, *raw)
                self.exchange([self.A[i] for i in at], gA)
                self.exchange([self.B[i] for i in at], gB)

    def after_step(self) -> None:
        self.undo()
        super().after_step()

    def undo(self) -> None:
        """Put back the raw gradients, except where a new backward pass has written others."""
        for p, grad, new in self._raw:
            if p.grad is new:
                p.grad = grad
        self._raw = []

    def moved(
        self, k: int, at: Sequence[int], frame: Frame, gA: Tensor, gB: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the layers ``at`` of group k are moved by, from their frame and raw gradients.

        ``gA`` and the first result are (len(at), r, n), ``gB`` and the second (len(at), m, r).
        """
        return frame.pair(gA, gB, self.layers[at[0]].scale, self.method.X)

    def exchange(self, parameters: Sequence[nn.Parameter], stack: Tensor) -> None:
        """Give parameters new gradients until the step is over."""
        for p, new in zip(parameters, stack.to(parameters[0].dtype).unbind(), strict=True):
            self._raw.append((p, p.grad, new))
            p.grad = new

    def _reached(self, i: int) -> bool:
        """Whether a layer has gradients; one that the loss did not reach is left alone."""
        if (self.A[i].grad is None) != (self.B[i].grad is None):
            which = "A" if self.A[i].grad is None else "B"
            raise RuntimeError(
                f"layer {self.names[i]!r}: {which} has no gradient while the other factor has one. "
                "LoRA-Pro moves both together: let both require gradients, and clear gradients "
                "only after optimizer.step()"
            )
        return self.A[i].grad is not None
