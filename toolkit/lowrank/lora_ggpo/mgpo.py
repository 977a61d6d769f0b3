r"""LoRA-MGPO: take the gradient at a point along the optimizer's momentum, and step from here.

.. math:: \tilde\theta = \theta + \rho\,\frac{m}{\|m\|_2}\cdot\frac1{\bar g}, \qquad
    \bar g \leftarrow \mu\,\bar g + (1-\mu)\,\|\nabla\mathcal L(\tilde\theta)\|_2

with :math:`\theta` every A and B, m the optimizer's first moment, and :math:`\bar g` at first the
norm of the first gradient.

Source: Chang et al., *LoRA-MGPO: Mitigating Double Descent in Low-Rank Adaptation via
Momentum-Guided Perturbation Optimization*, arXiv 2502.14538 version 2; official code
``llm172/LoRA-MGPO``. Where they differ: the code moves the frozen weight and not the factors, each
layer along :math:`s(m_B A + B m_A)` by its own :math:`\bar g`, of :math:`s(\partial_B A +
B\,\partial_A)`, bounds :math:`1/\bar g` by 10, and goes *against* the momentum. ``like="code"``
does so; ``sign`` turns either round. That code smooths at every micro-batch, this one at every
step.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from toolkit.core.adapt.model import Adapted
from toolkit.core.adapt.sites import KINDS, Site
from toolkit.core.adapt.steps.gradients import finite
from toolkit.core.declare.fields import BelowOne, Like, Range, Rank
from toolkit.core.declare.info import Info
from toolkit.lowrank.lora import LoRA
from toolkit.lowrank.lora_ggpo.cover import CoveredLayer
from toolkit.lowrank.lora_ggpo.grouped import GroupedController

TINY = 1e-12  # the official code's guard of its two divisions
CAP = 10.0  # and its bound on 1 / gbar


@dataclass(frozen=True)
class LoRAMGPO(LoRA):
    """LoRA whose gradient is taken along the momentum; the factors of one layer are LoRA's.

    Nothing is moved before ``adapted.attach(optimizer)``, at the first step, nor where the momentum
    or the gradient is exactly zero. What a move lasts for and touches is as for LoRA-GGPO's noise.
    As in the paper nothing bounds 1 / gbar: where the loss is flat to rounding, the move is huge.

    Args:
        rank: rank r of the difference. Source: paper, all tables.
        alpha: numerator of the scale s = alpha / r. Source: paper, with r = 8.
        rho: length of the move, times gbar. Source: paper, T5-base; 0.01 for Llama-2-7B.
        smoothing: of gbar (the paper's beta). Source: paper, T5-base; 0.8 for Llama-2-7B.
        like: move the factors by one gbar, or each weight by its own. Source: paper; its code.
        sign: along the momentum (ascent) or against it. Source: paper: ascent; its code: descent.
        keep_noise: like the code: hold the moved weight between forward and backward, or form it
            twice. Source: ours; memory against time.

    Raises:
        ValueError: at attach, an optimizer without a first moment.
        FloatingPointError: at a step whose gradient is not finite, before any weight has changed.
        RuntimeError: at a step whose gradients are still scaled by a GradScaler.
    """

    rank: Rank = 8
    rho: Annotated[float, Range(0.0, 1000.0, open_low=True)] = 0.05
    smoothing: BelowOne = 0.9
    like: Like = "paper"
    sign: Literal["source", "ascent", "descent"] = "source"
    keep_noise: bool = True

    # the catalogue lists methods by their package, here LoRA-GGPO; this one shares its chapter
    info: ClassVar[Info] = Info(
        slug="lora_ggpo",
        part="lowrank",
        title="LoRA-MGPO",
        arxiv="2502.14538",
        year=2025,
        code="llm172/LoRA-MGPO",
        equation=r"\tilde\theta = \theta + \rho\,\frac{m}{\|m\|_2}\cdot\frac1{\bar g}",
        acts_on="a low-rank difference, trained along its momentum",
        count=r"r\,(m+n)",
        inference="none once merged",
        colour="#882255",
        kinds=KINDS,
    )

    def layer(self, site: Site, generator: torch.Generator | None) -> CoveredLayer:
        return CoveredLayer(self, site, generator)

    def controller(
        self, adapted: Adapted, optimizer: torch.optim.Optimizer, total_steps: int | None
    ) -> MomentumController:
        return MomentumController(self, adapted, optimizer)


class MomentumController(GroupedController):
    """Looks along the optimizer's first moment: the gradient is taken there, the step from here.

    Attributes: ``smooth`` (gbar: one number for all, or (k,) per group), ``shifts`` (c m for every
    A, then every B, by name: what lies over the layers now).
    """

    def __init__(self, method: LoRAMGPO, adapted: Adapted, optimizer: torch.optim.Optimizer):
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
        along = method.like == "paper" if method.sign == "source" else method.sign == "ascent"
        self.rho = method.rho if along else -method.rho
        self.smooth = self._sizes(self.shifts)

    @torch.no_grad()
    def before_step(self) -> None:
        """Smooth the size of the gradient, which was taken at the perturbed point."""
        grads = self.gradients()
        sizes = self._sizes(grads)
        paper = self.method.like == "paper"
        finite(grads | {"all": sizes[0]} if paper else self.by_layer(sizes), self.step)
        mu, pairs = self.method.smoothing, zip(self.smooth, sizes, strict=True)
        self.smooth = [mu * old + (1 - mu) * x for old, x in pairs] if self.known else sizes
        self.known = True

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        if self.known:  # else there is no momentum either
            self._follow(self._moments())
            self._lay()

    def _sizes(self, of: Mapping[str, Tensor]) -> list[Tensor]:
        """One norm of all that ``of`` holds for A and B, or s (dB A + B dA)'s, (k,) per group."""
        if self.method.like == "code":
            return [x.sum(-1).sqrt() for x in self.row_squares(of)]
        norms = torch._foreach_norm(list(of.values()))
        return [torch.stack([x.to(norms[0]) for x in norms]).norm()]

    def _moments(self) -> dict[str, Tensor]:
        states = {name: self.optimizer.state.get(p, {}) for name, p in self.factors.items()}
        found = {n: s.get("exp_avg", s.get("momentum_buffer")) for n, s in states.items()}
        if all(m is None for m in found.values()):
            raise RuntimeError(
                f"{type(self.optimizer).__name__} took a step but keeps neither exp_avg nor "
                "momentum_buffer; use Adam, AdamW, or SGD with momentum"
            )
        # a layer that had no gradient yet has no moment either
        pairs = [(name, found[name], shift) for name, shift in self.shifts.items()]
        return {n: torch.zeros_like(s) if m is None else m.to(s.dtype) for n, m, s in pairs}

    def _follow(self, moments: dict[str, Tensor]) -> None:
        """Set the shifts; zero where there is no direction, or no gradient to measure it by."""
        sizes = self._sizes(moments)
        if self.method.like == "paper":
            size = sizes[0] * self.smooth[0]
            factors = dict.fromkeys(self.names, torch.where(size > 0, self.rho / size, 0.0))
        else:
            bounded = [(1 / (gbar + TINY)).clamp_max(CAP) for gbar in self.smooth]
            pairs = zip(sizes, bounded, strict=True)
            found = [torch.where(x > TINY, self.rho * c / (x + TINY), 0.0) for x, c in pairs]
            factors = self.by_layer(found)
        for name, shift in self.shifts.items():
            layer = name.rpartition(".")[0]
            torch.mul(moments[name], factors[layer].to(shift.device), out=shift)

    def _lay(self) -> None:
        for i, (name, layer) in enumerate(zip(self.names, self.layers, strict=True)):
            pair = self.shifts[f"{name}.A"], self.shifts[f"{name}.B"]
            if self.method.like == "paper":
                layer.cover.move(*pair)
            else:
                self.lay(i, functools.partial(self._perturbed, i, *pair))

    @torch.no_grad()
    def _perturbed(self, i: int, dA: Tensor, dB: Tensor, out: Tensor | None = None) -> Tensor:
        """W0 + s (dB A + B dA) in the layer's own layout, the same each time."""
        layer, weight = self.layers[i], self.weight_of(i)
        product = torch.cat([dB, layer.B], 1) @ torch.cat([layer.A, dA], 0)
        move = layer.site.to_weight(layer.scale * product)
        new = (weight.to(move.dtype) + move).to(weight.dtype)
        return self.keep_padding(i, new if out is None else out.copy_(new))

    def kept(self) -> dict[str, Tensor]:
        smooth = {f"smooth.{k}": x for k, x in enumerate(self.smooth)}
        return smooth | {f"shift.{name}": x for name, x in self.shifts.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        super().load(state)
        if self.known:
            self._lay()
