"""LoRA-MGPO: where the gradient is taken follows the optimizer's first moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from toolkit.core.adapt.model import Adapted
from toolkit.core.adapt.steps.gradients import finite
from toolkit.lowrank.lora_ggpo.grouped import GroupedController

TINY = 1e-12  # the official code's guard of its two divisions
CAP = 10.0  # and its bound on 1 / gbar


class MomentumController(GroupedController):
    """Looks along the optimizer's first moment: the gradient is taken there, the step from here.

    Attributes: ``smooth`` (gbar: one number for all, or (k,) per group), ``shifts`` (c m for every
    A, then every B, by name: what lies over the layers now), ``known`` (whether there was a
    gradient yet).

    Raises:
        ValueError: the optimizer keeps no first moment of some tensor.
    """

    def __init__(self, method: Any, adapted: Adapted, optimizer: torch.optim.Optimizer):
        super().__init__(method, adapted, optimizer)
        ours = {id(p) for p in self.factors.values()}
        for group in optimizer.param_groups:
            held = ours & {id(p) for p in group["params"]}
            if held and not group.get("momentum") and not (group.get("betas") or (0,))[0]:
                raise ValueError(
                    f"{self.title} moves along the optimizer's first moment, and this "
                    f"{type(optimizer).__name__} keeps none; use Adam or AdamW with betas[0] > 0, "
                    "or SGD with momentum > 0"
                )
        self.shifts = {name: torch.zeros_like(p) for name, p in self.factors.items()}
        first = [self.layers[g[0]].A for g in self.groups]
        self.smooth = [p.new_zeros(len(g)) for p, g in zip(first, self.groups, strict=True)]
        if method.like == "paper":
            self.smooth = [first[0].new_zeros(())]
        self.known = False

    @torch.no_grad()
    def before_step(self) -> None:
        """Smooth the size of the gradient, which was taken at the perturbed point."""
        grads = self.gradients()
        if grads is None:
            return
        if self.method.like == "paper":
            size, norms = length(grads.values())
            finite(dict(zip(grads, norms, strict=True)) | {"all factors": size}, self.step)
            sizes = [size]
        else:
            sizes = [x.sum(-1).sqrt() for x in self.row_squares(grads)]
            finite(self.by_layer(sizes), self.step)
        mu, pairs = self.method.smoothing, zip(self.smooth, sizes, strict=True)
        self.smooth = [mu * old + (1 - mu) * x for old, x in pairs] if self.known else sizes
        self.known = True

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        if self.known:  # else there is no momentum either
            self._follow(self._moments())
            self._lay()

    def _moments(self) -> dict[str, Tensor]:
        states = {name: self.optimizer.state.get(p, {}) for name, p in self.factors.items()}
        found = {n: s.get("exp_avg", s.get("momentum_buffer")) for n, s in states.items()}
        if all(m is None for m in found.values()):
            raise RuntimeError(
                f"{type(self.optimizer).__name__} took a step but keeps neither exp_avg nor "
                "momentum_buffer; use Adam, AdamW, or SGD with momentum"
            )
        # a layer that had no gradient yet has no moment either
        pairs = ((n, m, self.shifts[n]) for n, m in found.items())
        return {n: torch.zeros_like(s) if m is None else m.to(s.dtype) for n, m, s in pairs}

    def _follow(self, moments: dict[str, Tensor]) -> None:
        """Set the shifts; zero where there is no direction, or no gradient to measure it by."""
        rho = self.method.rho * self.method.direction
        if self.method.like == "paper":
            size = length(moments.values())[0] * self.smooth[0]
            factor = torch.where(size > 0, rho / size, torch.zeros_like(size))
            factors = dict.fromkeys(self.names, factor)
        else:
            stacks = []
            for square, smooth in zip(self.row_squares(moments), self.smooth, strict=True):
                size = square.sum(-1).sqrt()
                factor = rho * (1 / (smooth + TINY)).clamp_max(CAP) / (size + TINY)
                stacks.append(torch.where(size > TINY, factor, torch.zeros_like(factor)))
            factors = self.by_layer(stacks)
        for name, shift in self.shifts.items():
            m, layer = moments[name], name.rpartition(".")[0]
            torch.mul(m, factors[layer].to(m.device), out=shift)

    def _lay(self) -> None:
        for i, (name, layer) in enumerate(zip(self.names, self.layers, strict=True)):
            dA, dB = self.shifts[f"{name}.A"], self.shifts[f"{name}.B"]
            if self.method.like == "paper":
                layer.cover.move(dA, dB)
            else:
                make, keep = self._maker(i, dA, dB), self.method.keep_noise
                layer.cover.lay(self.bases[i], layer.site.parameter, make, keep)

    def _maker(self, i: int, dA: Tensor, dB: Tensor) -> Callable[..., Tensor]:
        """What forms W0 + s (dB A + B dA), the same each time."""
        base, layer = self.bases[i], self.layers[i]

        @torch.no_grad()
        def make(out: Tensor | None = None) -> Tensor:
            weight = base._parameters[layer.site.parameter]
            product = torch.cat([dB, layer.B], 1) @ torch.cat([layer.A, dA], 0)
            move = layer.site.to_weight(layer.scale * product)
            new = (weight.to(move.dtype) + move).to(weight.dtype)
            return new if out is None else out.copy_(new)

        return make

    def state(self) -> dict[str, Tensor]:
        state = super().state() | {"known": torch.tensor(self.known)}
        state |= {f"smooth.{k}": s for k, s in enumerate(self.smooth)}
        return state | {f"shift.{name}": s for name, s in self.shifts.items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take on a saved state, and what lay over the layers when it was saved."""
        super().load(state)
        self.known = bool(state["known"])
        self.smooth = [state[f"smooth.{k}"].to(s) for k, s in enumerate(self.smooth)]
        for name, shift in self.shifts.items():
            shift.copy_(state[f"shift.{name}"])
        if self.known:
            self._lay()


def length(tensors: Iterable[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Norm of all tensors together, and of each."""
    norms = torch._foreach_norm(list(tensors))
    return torch.stack([x.to(norms[0]) for x in norms]).norm(), norms
