"""TriAdaptLoRA's score, its schedule, and what happens around a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.core.adapt.steps.growth_controller import GrowthController
from toolkit.core.adapt.steps.processes import average


def modules_to_grow(missing: int, progress: float, growth: str, count: int) -> int:
    r"""How many modules grow at a look.

    .. math:: M = \lfloor (R^*-R)\,z \rfloor \quad\text{or}\quad
        M = \lfloor (R^*-R)^z \rfloor = \lfloor e^{z\ln(R^*-R)} \rfloor

    for "linear" and "exponential" growth, then at least 1 and at most ``count``. The author's file
    takes the exponential of the logarithm, whose rounding can lose 1 where the power is whole.

    Args:
        missing: ranks :math:`R^*-R` not yet given; 0 when there is none to give.
        progress: z, the share of the time after the warm-up that has passed, 0 to 1.
        growth: "linear" or "exponential".
        count: modules N.
    """
    if missing <= 0:
        return 0
    wanted = missing * progress if growth == "linear" else float(missing) ** progress
    return min(max(math.floor(wanted), 1), count)


def planned(
    start: int,
    target: int,
    count: int,
    *,
    block: int,
    growth: str,
    warmup: int,
    interval: int,
    total_steps: int,
    overshoot: bool = False,
) -> list[int]:
    """Ranks in all after each step, if no scores tie and no layer of the ``count`` is full.

    ``start`` and ``target`` are ranks in all; the others are as in ``TriAdaptLoRA``.
    """
    totals, total = [], start
    for t in range(total_steps):
        if t > warmup and t % interval == 0:
            z = (t - warmup) / (total_steps - warmup)
            gain = block * modules_to_grow(target - total, z, growth, count)
            total += gain if overshoot else min(gain, target - total)
        totals.append(total)
        if total >= target:
            return totals + [total] * (total_steps - t - 1)
    return totals


class TriangularController(GrowthController):
    r"""Around each step: penalty before; at a look, scores and growth after.

    With q blocks in a layer's core C, the score is

    .. math:: S = F - F^{prev}, \qquad F = \lVert C \rVert_F / q

    where :math:`F^{prev}` is F at the last look, or at the start. All layers are measured at each
    look, before the growth. The layers whose score is among the M largest grow
    (:func:`modules_to_grow`, :func:`~toolkit.core.adapt.steps.growth.choose`). One that just grew
    has a larger q, so its next score is lowered: a brake, kept from the author's files.

    Attributes: ``norms``, the last F of every layer (N,); others as in
    :class:`~toolkit.core.adapt.steps.growth_controller.GrowthController`.

    Raises:
        ValueError: as the base class, or the schedule ends below the target.
    """

    def __init__(self, method: Any, *where: Any, **options: Any):
        options |= {"growth": method.step_rank, "weight_decay": method.weight_decay}
        super().__init__(method, *where, **options)
        self.norms = self.measure()

    def check_schedule(self) -> None:
        super().check_schedule()
        m = self.method
        run = {"warmup": m.warmup, "interval": m.interval, "total_steps": self.total_steps}
        rule = {"block": m.step_rank, "growth": m.growth}
        end = planned(self.total, self.target, len(self.layers), **rule, **run)[-1]
        if end < self.target:
            raise ValueError(
                f"with interval={m.interval}, block={m.step_rank} and warmup={m.warmup} the ranks "
                f"add up to {end} of the {self.target} wanted when total_steps={self.total_steps} "
                "have passed; look more often, grow by larger blocks, or train longer"
            )

    def blocks(self) -> list[tuple[Sequence[Tensor], Sequence[Tensor]]]:
        return [(layer.blocks("B"), layer.blocks("A")) for layer in self.layers]

    @torch.no_grad()
    def measure(self) -> Tensor:
        """F of every layer now, (N,)."""
        norms = torch._foreach_norm([layer.core() for layer in self.layers])
        blocks = [len(layer.widths) for layer in self.layers]
        stacked = torch.stack(norms)
        return stacked / torch.tensor(blocks, dtype=stacked.dtype, device=stacked.device)

    @property
    def progress(self) -> float:
        """z, the share of the time after the warm-up that has passed."""
        return (self.step - self.warmup) / (self.total_steps - self.warmup)

    @torch.no_grad()
    def finish(self) -> None:
        """Measure, and let layers grow, if this step is one for it."""
        if self.allocating:
            self.look()
        super().finish()

    def look(self) -> None:
        """Score every layer and let the best grow.

        Raises:
            FloatingPointError: a score is not finite; nothing has grown.
        """
        now = self.measure()
        scores, self.norms = now - self.norms, now
        if self.scorer is not None:
            scores = torch.as_tensor(self.scorer(self), dtype=now.dtype, device=now.device).clone()
        average([scores])  # so that every process grows the same layers
        missing, count = self.target - self.total, len(self.layers)
        top = modules_to_grow(missing, self.progress, self.method.growth, count)
        self.grow(*self.chosen(scores, top))

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"norms": self.norms}

    def load(self, state: dict[str, Tensor]) -> None:
        super().load(state)
        self.norms.copy_(state["norms"])
