"""LoRA-Pro around each optimizer step: gradients are exchanged before it and put back after it.

This file is the efficient mode and what both modes share; the full mode is
:mod:`toolkit.lowrank.lora_pro.inner_adam`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.steps.controller import Controller
from toolkit.lowrank.lora_pro.projection import Frame


@dataclass
class Group:
    """Layers of one shape, dtype and device: their names and factors, in order."""

    names: list[str]
    A: list[nn.Parameter]
    B: list[nn.Parameter]
    scale: float

    def active(self) -> list[int]:
        """Places with gradients; a layer that the loss did not reach is left alone.

        Raises:
            RuntimeError: one factor of a layer has a gradient and the other has none.
        """
        for name, a, b in zip(self.names, self.A, self.B, strict=True):
            if (a.grad is None) != (b.grad is None):
                which = "A" if a.grad is None else "B"
                raise RuntimeError(
                    f"layer {name!r}: {which} has no gradient while the other factor has one. "
                    "LoRA-Pro moves both together: let both require gradients, and clear "
                    "gradients only after optimizer.step()"
                )
        return [i for i, a in enumerate(self.A) if a.grad is not None]


class Adjustment(Controller):
    """Around each step: the gradients of A and B give way to the adjusted pair.

    The optimizer sees the adjusted pair in ``p.grad``; after the step the raw gradients stand
    there again, as after any other step. Efficient mode, for any optimizer.

    Attributes: ``step`` (steps done), ``groups``.

    Raises:
        RuntimeError: in ``before_step``, before anything has changed: no gradient anywhere, one
            factor without, or gradients that a ``GradScaler`` has not unscaled yet.
        TypeError: likewise, a sparse gradient.
        FloatingPointError: likewise, one that is not finite.
    """

    def __init__(
        self,
        method: Any,
        layers: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
    ):
        self.method, self.optimizer, self.step = method, optimizer, 0
        self.groups: list[Group] = []
        self._raw: list[tuple[nn.Parameter, Tensor]] | None = None
        found: dict[tuple, Group] = {}
        for name, layer in layers.items():
            key = (layer.A.shape, layer.B.shape, layer.A.dtype, layer.A.device, layer.scale)
            if key not in found:
                found[key] = Group([], [], [], layer.scale)
                self.groups.append(found[key])
            group = found[key]
            group.names.append(name)
            group.A.append(layer.A)
            group.B.append(layer.B)

    def tensors(self) -> dict[str, nn.Parameter]:
        """The tensors whose gradients are read, by name."""
        return {
            f"{name}.{key}": p
            for group in self.groups
            for name, a, b in zip(group.names, group.A, group.B, strict=True)
            for key, p in (("A", a), ("B", b))
        }

    @torch.no_grad()
    def before_step(self) -> None:
        self._raw = None
        damping = self.method.damping
        if self._overflowed():
            return
        self._check()
        # all that can fail comes first, so that a refusal leaves no layer half way
        places = [group.active() for group in self.groups]
        frames = [
            Frame.of(*(torch.stack([P[i] for i in at]) for P in (group.A, group.B)), damping)
            if at
            else None
            for group, at in zip(self.groups, places, strict=True)
        ]
        self._raw = []
        for k, (at, frame) in enumerate(zip(places, frames, strict=True)):
            if at:
                self._exchange(k, at, frame)

    def after_step(self) -> None:
        if self._raw is None:
            return
        for p, grad in self._raw:
            p.grad = grad
        self._raw = None
        self.step += 1

    def _exchange(self, k: int, at: list[int], frame: Frame) -> None:
        group = self.groups[k]
        As, Bs = [group.A[i] for i in at], [group.B[i] for i in at]
        raw = (torch.stack([p.grad for p in Ps]) for Ps in (As, Bs))
        for Ps, new in zip((As, Bs), self._pair(k, at, frame, *raw), strict=True):
            self._write(Ps, new)

    def _pair(
        self, k: int, at: list[int], frame: Frame, gA: Tensor, gB: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What layers ``at`` of group k are moved by, from their raw gradients."""
        return frame.pair(gA, gB, self.groups[k].scale, self.method.X)

    def _write(self, parameters: list[nn.Parameter], stack: Tensor) -> None:
        for p, new in zip(parameters, stack.to(parameters[0].dtype).unbind(), strict=True):
            self._raw.append((p, p.grad))
            p.grad = new

    def _overflowed(self) -> bool:
        """Whether a ``GradScaler`` has told a fused optimizer to skip this step."""
        if getattr(self.optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "GradScaler leaves the gradients scaled for a fused optimizer, and LoRA-Pro would "
                "read them so: call scaler.unscale_(optimizer) before scaler.step(optimizer), or "
                "build the optimizer with fused=False"
            )
        found = getattr(self.optimizer, "found_inf", None)
        return found is not None and bool(found)

    def _check(self) -> None:
        held = [(name, p.grad) for name, p in self.tensors().items() if p.grad is not None]
        if not held:
            raise RuntimeError(
                "optimizer.step() was called before any backward pass: LoRA-Pro adjusts the "
                "gradients. Call loss.backward() first, and zero_grad() only after step()"
            )
        for name, g in held:
            if g.layout is not torch.strided:
                raise TypeError(
                    f"the gradient of {name!r} is sparse ({g.layout}); LoRA-Pro multiplies whole "
                    "matrices. Turn sparse gradients off, or call .to_dense() on it"
                )
        # the largest entry, not the root of squares, which could overflow on its own
        sizes = torch._foreach_norm([g for _, g in held], float("inf"))
        home = sizes[0].device
        finite = torch.isfinite(torch.stack([size.to(home) for size in sizes]))
        if not bool(finite.all()):
            where = held[int((~finite).nonzero()[0])][0]
            raise FloatingPointError(
                f"the gradient of {where!r} is not finite at step {self.step}; no weight was "
                "changed. Lower the learning rate, clip gradients, or skip the step"
            )

    def state(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self.step)}

    def refuse_foreign(self, state: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless a saved state has the names and shapes of this one's."""
        own = self.state()
        if own.keys() != state.keys() or any(own[k].shape != state[k].shape for k in own):
            raise ValueError(
                f"the saved schedule holds {sorted(state)}, this run needs {sorted(own)}; attach "
                "with the options of the run that was saved"
            )

    def load(self, state: dict[str, Tensor]) -> None:
        self.refuse_foreign(state)
        self.step = int(state["step"])
