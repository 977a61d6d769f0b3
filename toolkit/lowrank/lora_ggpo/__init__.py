r"""LoRA-GGPO: train LoRA under weight noise that is larger for some output neurons than for others.

The weight of the forward pass in training is :math:`W' + \epsilon` with :math:`W' = W_0 + s\,BA`
of shape (m, n), and

.. math:: \epsilon_{ij} \sim \mathcal N\Big(0,\ \frac{\sigma^2}{n}
    \big(\|W'_{i,:}\|^2 + \beta\,\|\nabla W_{i,:}\|^2\big)\Big)

so the loss that falls is a mean over weights nearby, which is low in flat places. Inference and the
merge are LoRA's.

Source: Chang et al., *LoRA-GGPO: Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided
Perturbation Optimization*, arXiv 2502.14538 version 1. Version 2 of that entry, *LoRA-MGPO*, is
another algorithm, :class:`~toolkit.lowrank.lora_ggpo.mgpo.LoRAMGPO`, and official code exists for
that one only.

``kohya-ss/sd-scripts`` has version 1 with a sum of two scales over :math:`\sqrt m`, one mean row
norm for all rows of :math:`W_0`, no cross term, no s in the weight's norm, and no noise before the
first gradient. ``variant="kohya"`` does so. That code also takes no gradient through the noise to
the layers before, draws anew for every micro-batch, samples 1000 rows for the mean, and measures
before the step. Here the gradient is that of the noisy network, the mean is over all rows, and
norms are those of the weight that is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch

from toolkit.core.adapt.model import Adapted
from toolkit.core.adapt.sites import KINDS, Site
from toolkit.core.declare.fields import Interval, Range, Rank, Weight
from toolkit.core.declare.info import Info
from toolkit.lowrank.lora import LoRA
from toolkit.lowrank.lora_ggpo.cover import CoveredLayer
from toolkit.lowrank.lora_ggpo.mgpo import LoRAMGPO
from toolkit.lowrank.lora_ggpo.noise_control import NoiseController

__all__ = ["LoRAGGPO", "LoRAMGPO"]


@dataclass(frozen=True)
class LoRAGGPO(LoRA):
    r"""LoRA under noise on the weight; the factors of one layer are LoRA's.

    Nothing is perturbed before ``adapted.attach(optimizer)``. After it, a forward pass in training
    mode with gradients enabled runs at the perturbed weight. A pass in ``eval()`` or under
    ``no_grad``, the merge, copies and files are plain LoRA. A perturbation lasts until the next
    ``optimizer.step()``: all micro-batches of a step share it, and so do all processes, unless each
    attaches with a ``generator`` of its own. Activation checkpointing must be the non-reentrant
    kind; the other, whose first pass has no gradients and so no noise, is refused in backward.

    ``attach`` takes two options: ``generator``, and ``draw(step, name, (m, n))`` that returns the
    standard normal numbers themselves. Row norms of the gradient are read from ``A.grad`` and
    ``B.grad`` as the optimizer sees them, so after clipping. At the first step, and where a layer
    has no gradient, that term is 0. With ``sigma=0`` the training is LoRA's, bit for bit.

    Args:
        rank: rank r of the difference. Source: paper v2, all tables.
        alpha: numerator of the scale s = alpha / r. Source: paper v2, with r = 8.
        variant: form of the noise: ggpo, kohya's sum of two scales, or one size for all rows of a
            layer (isotropic). Source: v1: ggpo; code: kohya; control: isotropic.
        sigma: noise of a row relative to the row's norm. Source: independent implementations; v1
            not read.
        beta: weight of the gradient's row norms in the noise. Source: independent implementations;
            v1 not read.
        refresh: steps between two measurements of the weight's row norms. Source: ours; 1 is exact.
        keep_noise: hold the perturbed weight between forward and backward, or form it twice.
            Source: ours; memory against time.
        seed: seed of the noise, where attach gets no generator. Source: ours; the same on all
            processes of a run.

    Raises:
        FloatingPointError: at a step whose gradient is not finite, before any weight has changed
            (only where gradients are read: not with ``beta=0``).
        RuntimeError: at a step whose gradients are still scaled by a GradScaler; in the backward
            pass of reentrant checkpointing.
    """

    rank: Rank = 8
    variant: Literal["ggpo", "kohya", "isotropic"] = "ggpo"
    sigma: Weight = 0.03
    beta: Annotated[float, Range(0.0, 1000000000.0)] = 0.01
    refresh: Interval = 1
    keep_noise: bool = True
    seed: Annotated[int, Range(0, 2147483647)] = 0

    info: ClassVar[Info] = Info(
        slug="lora_ggpo",
        part="lowrank",
        title="LoRA-GGPO",
        arxiv="2502.14538",
        year=2025,
        code="llm172/LoRA-MGPO",
        equation=r"\min_{A,B}\ \mathbb{E}_\epsilon\,\mathcal{L}(W_0 + s\,BA + \epsilon)",
        acts_on="a low-rank difference, trained under noise on the weight",
        count=r"r\,(m+n)",
        inference="none once merged",
        colour="#E69F00",
        kinds=KINDS,
    )
    # The contracts hold a training pass under autocast to a plain pass within 5 %, which noise of
    # 3 % exceeds in layers of four units; 1 % still shows in every other contract.
    tiny: ClassVar[dict[str, Any]] = {"sigma": 0.01}

    @property
    def noisy(self) -> bool:
        """Whether there is any noise at all."""
        return self.sigma > 0 or (self.variant == "kohya" and self.beta > 0)

    def layer(self, site: Site, generator: torch.Generator | None) -> CoveredLayer:
        return CoveredLayer(self, site, generator)

    def controller(
        self, adapted: Adapted, optimizer: torch.optim.Optimizer, total_steps: int | None, **options
    ) -> NoiseController:
        return NoiseController(self, adapted, optimizer, **options)
