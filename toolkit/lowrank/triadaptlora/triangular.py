"""TriAdaptLoRA's square core, its score, its schedule, and what happens around a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.steps.growth import GrowthController, Scorer, average_over_ranks, choose
from toolkit.core.adapt.steps.orthogonality import value_and_gradients


def positions(widths: Sequence[int]) -> Tensor:
    """Where each number of the blocks lies in the flattened core of shape (r, r).

    Args:
        widths: c_1, ..., c_q, with sum r.

    Returns:
        Indices, first of every L block (c_i, rho_i), then of every U block (rho_i, c_i), each in
        row order. A diagonal block appears twice: as part of L and as part of U.
    """
    r, ends = sum(widths), list(accumulate(widths))
    grid = torch.arange(r * r).view(r, r)
    lower = [grid[e - c : e, :e] for c, e in zip(widths, ends, strict=True)]
    upper = [grid[:e, e - c : e] for c, e in zip(widths, ends, strict=True)]
    return torch.cat([block.reshape(-1) for block in lower + upper])


def assemble(lower: Sequence[Tensor], upper: Sequence[Tensor], where: Tensor) -> Tensor:
    """C = L + U, shape (r, r), from rows (c_i, rho_i) of L and columns (rho_i, c_i) of U.

    One sum into place, because padding block by block costs two small operations for each.

    Args:
        lower, upper: the q blocks of L and of U.
        where: :func:`positions` of their widths.
    """
    if len(lower) == 1:
        return lower[0] + upper[0]
    r = lower[-1].shape[1]
    flat = torch.cat([block.reshape(-1) for block in (*lower, *upper)])
    return flat.new_zeros(r * r).index_add(0, where, flat).view(r, r)


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
    """Ranks in all after each step, if no scores tie and no layer is full.

    Args:
        start, target: ranks in all at the start and at the end.
        count: modules N.
        block, growth, warmup, interval, total_steps, overshoot: as in ``TriAdaptLoRA``.
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
    (:func:`modules_to_grow`, :func:`toolkit.core.adapt.steps.growth.choose`).

    Attributes: ``norms``, the last F of every layer (N,); others as in :class:`GrowthController`.

    Raises:
        ValueError: as :class:`GrowthController`, or the schedule ends below the target.
    """

    def __init__(
        self,
        method: Any,
        layers: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        total_steps: int | None,
        scorer: Scorer | None = None,
    ):
        self.method = method
        target = method.total_rank
        if target is None:
            target = method.target_rank * len(layers)
        now = sum(layer.rank for layer in layers.values())
        grown = any(len(layer.widths) > 1 for layer in layers.values())
        decays = "weight_decay" in optimizer.param_groups[0]
        super().__init__(
            "TriAdaptLoRA",
            layers,
            optimizer,
            total_steps,
            # a saved run that passed its target may go on
            target=max(target, now) if method.overshoot and grown else target,
            warmup=method.warmup,
            interval=method.interval,
            growth=method.step_rank,
            restart=method.restart,
            weight_decay=method.weight_decay if decays or method.weight_decay else None,
            scorer=scorer,
        )
        self.target = target
        self.norms = self.measure()

    def _check_schedule(self, total_steps: int) -> None:
        super()._check_schedule(total_steps)
        m = self.method
        end = planned(
            self.total,
            self.target,
            len(self.layers),
            block=m.step_rank,
            growth=m.growth,
            warmup=m.warmup,
            interval=m.interval,
            total_steps=total_steps,
        )[-1]
        if end < self.target:
            raise ValueError(
                f"with interval={m.interval}, block={m.step_rank} and warmup={m.warmup} the ranks "
                f"add up to {end} of the {self.target} wanted when total_steps={total_steps} have "
                "passed; look more often, grow by larger blocks, or train longer"
            )

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
    def before_step(self) -> None:
        """Add the gradient of the penalty, after making sure that there are gradients."""
        self.check_gradients(finite=self.allocating)
        self.average_grown()
        if self.method.orthogonality:
            self._penalise()
        super().before_step()

    def _penalise(self) -> None:
        factors = [layer.factors() for layer in self.layers]
        extra = iter(value_and_gradients([(B, A) for A, B in factors])[1])
        tensors, pieces = [], []
        for layer in self.layers:
            for letter, whole, dim in (("B", next(extra), 1), ("A", next(extra), 0)):
                for i, piece in enumerate(whole.split(layer.widths, dim)):
                    tensors.append(getattr(layer, f"{letter}{i}"))
                    pieces.append(piece)
        for t in tensors:
            if t.grad is None:
                t.grad = torch.zeros_like(t)
        torch._foreach_add_([t.grad for t in tensors], pieces, alpha=self.method.orthogonality)

    @torch.no_grad()
    def after_step(self) -> None:
        """Measure, and let layers grow, if this step is one for it."""
        if self.allocating:
            self.look()
        super().after_step()

    def look(self) -> None:
        """Score every layer and let the best grow.

        Raises:
            FloatingPointError: a score is not finite; nothing has grown.
        """
        now = self.measure()
        scores = now - self.norms
        self.norms = now
        if self.scorer is not None:
            scores = torch.as_tensor(self.scorer(self), dtype=now.dtype, device=now.device).clone()
        finite = torch.isfinite(scores)
        if not bool(finite.all()):
            raise FloatingPointError(
                f"the score of layer {self.names[int((~finite).nonzero()[0])]!r} is not finite at "
                f"the growth of step {self.step}; nothing has grown. Lower the learning rate, or "
                "go back to an earlier state"
            )
        average_over_ranks([scores])  # so that every process grows the same layers
        missing = self.target - self.total
        top = modules_to_grow(missing, self.progress, self.method.growth, len(self.layers))
        rooms = [layer.limit - layer.rank for layer in self.layers]
        self.grow(choose(scores, missing, self.growth, top, rooms, self.method.overshoot))

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"norms": self.norms}

    def load(self, state: dict[str, Tensor]) -> None:
        super().load(state)
        self.norms.copy_(state["norms"])
