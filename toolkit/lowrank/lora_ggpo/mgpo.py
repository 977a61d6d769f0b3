r"""LoRA-MGPO: take the gradient at a point along the optimizer's momentum, and step from here.

.. math:: \tilde\theta = \theta + \rho\,\frac{m}{\|m\|_2}\cdot\frac1{\bar g}, \qquad
    \bar g \leftarrow \mu\,\bar g + (1-\mu)\,\|\nabla\mathcal L(\tilde\theta)\|_2

with :math:`\theta` every A and B, m the optimizer's first moment, and :math:`\bar g` at first the
norm of the first gradient.

Source: Chang et al., *LoRA-MGPO: Mitigating Double Descent in Low-Rank Adaptation via
Momentum-Guided Perturbation Optimization*, arXiv 2502.14538 version 2; official code
``llm172/LoRA-MGPO``. Where they differ: the code moves the frozen weight and not the factors, each
layer along :math:`v = s(m_B A + B m_A)` by its own :math:`\bar g` (of :math:`s(\partial_B A +
B\,\partial_A)`), bounds :math:`1/\bar g` by 10, and goes *against* the momentum. ``like="code"``
does so; ``sign`` turns either round. That code smooths once per micro-batch, this one once per
step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch

from toolkit.core.adapt.model import Adapted
from toolkit.core.adapt.sites import KINDS, Site
from toolkit.core.declare.fields import BelowOne, Like, Range, Rank
from toolkit.core.declare.info import Info
from toolkit.lowrank.lora import LoRA
from toolkit.lowrank.lora_ggpo.cover import CoveredLayer
from toolkit.lowrank.lora_ggpo.momentum_control import MomentumController


@dataclass(frozen=True)
class LoRAMGPO(LoRA):
    """LoRA whose gradient is taken along the momentum; the factors of one layer are LoRA's.

    Nothing is moved before ``adapted.attach(optimizer)``, at the first step, nor where the momentum
    or the gradient is exactly zero. What lies over a layer, and for how long, is as in
    :class:`~toolkit.lowrank.lora_ggpo.LoRAGGPO`.

    Args:
        rank: rank r of the difference. Source: paper, all tables.
        alpha: numerator of the scale s = alpha / r. Source: paper, with r = 8.
        rho: length of the move along the momentum, times gbar. Source: paper, T5-base; 0.01 for
            Llama-2-7B.
        smoothing: smoothing of gbar (the paper's beta). Source: paper, T5-base; 0.8 for
            Llama-2-7B.
        like: move the factors by one gbar (paper), or each frozen weight by its own (code).
            Source: paper; official code.
        sign: along the momentum (ascent) or against it. Source: paper: ascent; its code: descent.
        keep_noise: like the code: hold the moved weight between forward and backward, or form it
            twice. Source: ours; memory against time.

    Raises:
        TypeError, ValueError: a hyperparameter of the wrong type or outside its range; at attach,
            an optimizer without a first moment.
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

    @property
    def direction(self) -> int:
        """+1 along the momentum, -1 against it."""
        along = self.like == "paper" if self.sign == "source" else self.sign == "ascent"
        return 1 if along else -1

    def layer(self, site: Site, generator: torch.Generator | None) -> CoveredLayer:
        return CoveredLayer(self, site, generator)

    def controller(
        self, adapted: Adapted, optimizer: torch.optim.Optimizer, total_steps: int | None
    ) -> MomentumController:
        return MomentumController(self, adapted, optimizer)
