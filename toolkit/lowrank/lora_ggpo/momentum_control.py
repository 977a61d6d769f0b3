"""LoRA-MGPO: where the gradient is taken follows the optimizer's first moment."""

from __future__ import annotations

import functools
from collections.abc import Iterable
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
    A, then every B, by name: what lies over the layers now).

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
        A = [layer.A.detach() for layer in self.layers]
        self.smooth = [A[g[0]].new_zeros(len(g)) for g in self.groups]
        if method.like == "paper":
            self.smooth = [A[0].new_zeros(())]

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
        return {
            name: torch.zeros_like(shift) if found[name] is None else found[name].to(shift.dtype)
            for name, shift in self.shifts.items()
        }

    def _follow(self, moments: dict[str, Tensor]) -> None:
        """Set the shifts; zero where there is no direction, or no gradient to measure it by."""
        rho = self.method.rho * self.method.direction
        if self.method.like == "paper":
            size = length(moments.values())[0] * self.smooth[0]
            factor = torch.where(size > 0, rho / size, torch.zeros_like(size))
            factors = dict.fromkeys(self.names, factor)
        else:
            found = []
            for square, smooth in zip(self.row_squares(moments), self.smooth, strict=True):
                size = square.sum(-1).sqrt()
                factor = rho * (1 / (smooth + TINY)).clamp_max(CAP) / (size + TINY)
                found.append(torch.where(size > TINY, factor, torch.zeros_like(factor)))
            factors = self.by_layer(found)
        for name, shift in self.shifts.items():
            factor = factors[name.rpartition(".")[0]].to(shift.device)
            torch.mul(moments[name], factor, out=shift)

    def _lay(self) -> None:
        for i, (name, layer) in enumerate(zip(self.names, self.layers, strict=True)):
            pair = self.shifts[f"{name}.A"], self.shifts[f"{name}.B"]
            if self.method.like == "paper":
                layer.cover.move(*pair)
            else:
                make = functools.partial(self._perturbed, i, *pair)
                parameter, keep = layer.site.parameter, self.method.keep_noise
                layer.cover.lay(self.bases[i], parameter, make, keep)

    @torch.no_grad()
    def _perturbed(self, i: int, dA: Tensor, dB: Tensor, out: Tensor | None = None) -> Tensor:
        """W0 + s (dB A + B dA) in the layer's own layout, the same each time."""
        layer = self.layers[i]
        weight = self.bases[i]._parameters[layer.site.parameter]
        product = torch.cat([dB, layer.B], 1) @ torch.cat([layer.A, dA], 0)
        move = layer.site.to_weight(layer.scale * product)
        new = (weight.to(move.dtype) + move).to(weight.dtype)
        return new if out is None else out.copy_(new)

    def kept(self) -> dict[str, Tensor]:
        smooth = {f"smooth.{k}": x for k, x in enumerate(self.smooth)}
        return smooth | {f"shift.{name}": x for name, x in self.shifts.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take on a saved state, and what lay over the layers when it was saved."""
        super().load(state)
        if self.known:
            self._lay()


def length(tensors: Iterable[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Norm of all tensors together, and of each."""
    norms = torch._foreach_norm(list(tensors))
    return torch.stack([x.to(norms[0]) for x in norms]).norm(), norms
