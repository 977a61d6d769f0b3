"""LoRA-MGPO: where the gradient is taken follows the optimizer's first moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from toolkit.lowrank.lora_ggpo.grouped import Group, GroupedController

TINY = 1e-12  # the official code's guard of its two divisions
CAP = 10.0  # and its bound on 1 / gbar


class MomentumController(GroupedController):
    """Looks along the optimizer's first moment: the gradient is taken there, the step from here.

    Attributes: ``step``, ``smooth`` (gbar: one number for all, or (k,) per group), ``shifts``
    (c m_A for every A, then c m_B for every B: what lies over the layers now).

    Raises:
        ValueError: the optimizer keeps no first moment of some tensor.
    """

    reads = True

    def __init__(self, method: Any, adapted: Any, optimizer: torch.optim.Optimizer):
        super().__init__(method, adapted, optimizer)
        self._check_moments()
        self.smooth: list[Tensor] = []
        self.shifts = [torch.zeros_like(t) for t in self.tensors()]
        self.moved = False

    def _check_moments(self) -> None:
        ours = {id(t) for t in self.tensors()}
        for group in self.optimizer.param_groups:
            if not ours & {id(p) for p in group["params"]}:
                continue
            if not group.get("momentum") and not (group.get("betas") or (0,))[0]:
                raise ValueError(
                    f"variant={self.method.variant!r} moves along the optimizer's first moment, "
                    f"and this {type(self.optimizer).__name__} keeps none; use Adam or AdamW with "
                    "betas[0] > 0, or SGD with momentum > 0"
                )

    @torch.no_grad()
    def before_step(self) -> None:
        """Smooth the size of the gradient, which was taken at the perturbed point."""
        grads = self.gradients()
        if grads is None:
            return
        if self.method.variant == "mgpo":
            norms = torch._foreach_norm(grads)
            size = torch.stack([n.to(norms[0]) for n in norms]).norm()
            if not bool(size.isfinite()):
                half = len(self.layers)
                each = [torch.stack([norms[i], norms[half + i].to(norms[i])]) for i in range(half)]
                one = ((Group([i], 0, 0, 1.0), e.sum()[None]) for i, e in enumerate(each))
                self.check_finite(one)
            sizes = [size]
        else:
            sizes = [f.sum(-1).sqrt() for f in self.approximate(grads)]
            self.check_finite(zip(self.groups, sizes, strict=True))
        b = self.method.smoothing
        if self.smooth:
            pairs = zip(self.smooth, sizes, strict=True)
            sizes = [b * old + (1 - b) * now for old, now in pairs]
        self.smooth = sizes

    @torch.no_grad()
    def after_step(self) -> None:
        self.step += 1
        if not self.smooth:
            return  # no gradient yet, so no momentum
        self._follow(self._moments())
        self.moved = True
        self._lay()

    def _moments(self) -> list[Tensor]:
        moments = []
        for t in self.tensors():
            state = self.optimizer.state.get(t, {})
            m = state.get("exp_avg")
            moments.append(state.get("momentum_buffer") if m is None else m)
        if all(m is None for m in moments):
            raise RuntimeError(
                f"{type(self.optimizer).__name__} took a step but keeps neither exp_avg nor "
                "momentum_buffer; use Adam, AdamW, or SGD with momentum"
            )
        # a layer that had no gradient yet has no moment either
        pairs = zip(moments, self.shifts, strict=True)
        return [torch.zeros_like(s) if m is None else m.to(s.dtype) for m, s in pairs]

    def _follow(self, moments: list[Tensor]) -> None:
        """Set the shifts; zero where there is no direction, or no gradient to measure it by."""
        rho = self.method.rho * self.method.direction
        if self.method.variant == "mgpo":
            norms = torch._foreach_norm(moments)
            size = torch.stack([n.to(norms[0]) for n in norms]).norm() * self.smooth[0]
            factor = torch.where(size > 0, rho / size, torch.zeros_like(size))
            for s, m in zip(self.shifts, moments, strict=True):
                torch.mul(m, factor.to(m.device), out=s)
            return
        half, squares = len(self.layers), self.approximate(moments)
        for group, square, smooth in zip(self.groups, squares, self.smooth, strict=True):
            size = square.sum(-1).sqrt()
            factor = rho * (1 / (smooth + TINY)).clamp_max(CAP) / (size + TINY)
            factor = torch.where(size > TINY, factor, torch.zeros_like(factor))
            for i, c in zip(group.members, factor.unbind(), strict=True):
                torch.mul(moments[i], c, out=self.shifts[i])
                torch.mul(moments[half + i], c, out=self.shifts[half + i])

    def _lay(self) -> None:
        half = len(self.layers)
        for i, layer in enumerate(self.layers):
            if self.method.variant == "mgpo":
                layer.cover.shift = (self.shifts[i], self.shifts[half + i])
            else:
                parameter = self.sites_of[i].parameter
                keep = self.method.keep_noise
                layer.cover.lay(self.bases[i], parameter, self._maker(i), keep)

    def _maker(self, i: int) -> Callable[[], Tensor]:
        site, base, layer, half = self.sites_of[i], self.bases[i], self.layers[i], len(self.layers)

        @torch.no_grad()
        def make(out: Tensor | None = None) -> Tensor:
            weight = base._parameters[site.parameter]
            left = torch.cat([self.shifts[half + i], layer.B], 1)
            right = torch.cat([layer.A, self.shifts[i]], 0)
            move = site.to_weight(layer.scale * (left @ right))
            new = (weight.to(move.dtype) + move).to(weight.dtype)
            return new if out is None else out.copy_(new)

        return make

    def state(self) -> dict[str, Tensor]:
        state = {"step": torch.tensor(self.step), "moved": torch.tensor(self.moved)}
        state |= {f"smooth.{k}": s for k, s in enumerate(self.smooth)}
        return state | {f"shift.{i}": s for i, s in enumerate(self.shifts)}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take on a saved state, and what lay over the layers when it was saved."""
        self.check_same(state, ["step", "moved", *(f"shift.{i}" for i in range(len(self.shifts)))])
        self.step, self.moved = int(state["step"]), bool(state["moved"])
        known = sum(key.startswith("smooth.") for key in state)
        self.smooth = [state[f"smooth.{k}"].to(self.shifts[0]) for k in range(known)]
        for i, s in enumerate(self.shifts):
            s.copy_(state[f"shift.{i}"])
        if self.moved:
            self._lay()
