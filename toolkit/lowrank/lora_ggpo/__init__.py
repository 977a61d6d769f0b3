r"""LoRA-GGPO: train LoRA under weight noise that is larger for some output neurons than for others.

The weight of the forward pass in training is :math:`W' + \epsilon` with :math:`W' = W_0 + s\,BA`
of shape (m, n), and

.. math:: \epsilon_{ij} \sim \mathcal N\Big(0,\ \frac{\sigma^2}{n}
    \big(\|W'_{i,:}\|^2 + \beta\,\|\nabla W_{i,:}\|^2\big)\Big)

so the loss that falls is a mean over weights nearby, which is low in flat places. Inference and the
merge are LoRA's.

Source: Chang et al., *LoRA-GGPO: Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided
Perturbation Optimization*, arXiv 2502.14538 version 1. Version 2 of that entry, *LoRA-MGPO*, is
another algorithm (``variant="mgpo"``):

.. math:: \tilde\theta = \theta + \rho\,\frac{m}{\|m\|_2}\cdot\frac1{\bar g}

with :math:`\theta` every A and B, m the optimizer's first moment, :math:`\bar g` the smoothed norm
of the gradient. Where texts and codes differ:

* Official code exists for version 2 only (``llm172/LoRA-MGPO``), and differs from its paper. It
  moves the frozen weight and not the factors, each layer by its own :math:`\bar g`, bounds
  :math:`1/\bar g` by 10, and goes *against* the momentum. ``variant="mgpo_code"`` does so;
  ``sign`` turns either round. That code smooths once per micro-batch, this one once per step.
* ``kohya-ss/sd-scripts`` has version 1 with a sum of two scales over :math:`\sqrt m`, one mean row
  norm for all rows of :math:`W_0`, no cross term, no s in the weight's norm, and no noise before
  the first gradient. ``variant="kohya"`` does so. That code also takes no gradient through the
  noise to the layers before, draws anew for every micro-batch, samples 1000 rows for the mean, and
  measures before the step. Here the gradient is that of the noisy network, the mean is over all
  rows, and norms are those of the weight that is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from toolkit.core.adapt import lowrank as factored
from toolkit.core.adapt.lowrank import warn_above
from toolkit.core.adapt.model import Adapted
from toolkit.core.adapt.peft import PeftNames
from toolkit.core.adapt.sites import KINDS, Site
from toolkit.core.declare.fields import Alpha, BelowOne, Declared, Interval, Range, Rank, Weight
from toolkit.core.declare.info import Info
from toolkit.lowrank.lora import LoRA, LoRALayer
from toolkit.lowrank.lora_ggpo.momentum_control import MomentumController
from toolkit.lowrank.lora_ggpo.noise import NOISES
from toolkit.lowrank.lora_ggpo.noise_control import NoiseController
from toolkit.lowrank.lora_ggpo.perturb import Cover


@dataclass(frozen=True)
class LoRAGGPO(Declared):
    r"""LoRA-GGPO's hyperparameters; builds the factors of one layer, which are LoRA's.

    Nothing is perturbed before ``adapted.attach(optimizer)``. After it, a forward pass in training
    mode with gradients enabled runs at the perturbed weight. A pass in ``eval()`` or under
    ``no_grad``, the merge, copies and files are plain LoRA. A perturbation lasts until the next
    ``optimizer.step()``: all micro-batches of a step share it, and so do all processes, unless each
    attaches with a ``generator`` of its own. Activation checkpointing must be the non-reentrant
    kind; the other runs its first pass without gradients, so without noise.

    ``attach`` takes two options for the noise: ``generator``, and ``draw(step, name, (m, n))`` that
    returns the standard normal numbers themselves. Row norms of the gradient are read from
    ``A.grad`` and ``B.grad`` as the optimizer sees them, so after clipping. At the first step, and
    where a layer has no gradient, that term is 0. With ``sigma=0`` the training is LoRA's, bit for
    bit.

    The variants that follow the momentum do nothing at the first step, nor where the momentum or
    the gradient is exactly zero.

    Args:
        rank: rank r of the difference. Source: paper v2, all tables.
        alpha: numerator of the scale s = alpha / r. Source: paper v2, with r = 8.
        dropout: dropout on the input of the low-rank branch. Source: as LoRA.
        rank_stabilised: divide alpha by sqrt(r) instead of r (rsLoRA). Source: rsLoRA, arXiv
            2312.03732.
        variant: what perturbs: noise (three forms) or the momentum (two). Source: v1: ggpo; v2:
            mgpo; codes: kohya, mgpo_code; control: isotropic.
        sigma: noise of a row relative to the row's norm. Source: independent implementations; v1
            not read.
        beta: weight of the gradient's row norms in the noise. Source: independent implementations;
            v1 not read.
        rho: length of the move along the momentum, times gbar. Source: paper v2, T5-base; 0.01 for
            Llama-2-7B.
        smoothing: smoothing of gbar (the paper's beta). Source: paper v2, T5-base; 0.8 for
            Llama-2-7B.
        sign: along the momentum (ascent) or against it. Source: paper v2: ascent; its code:
            descent.
        refresh: steps between two measurements of the weight's row norms. Source: ours; 1 is exact.
        keep_noise: hold the perturbed weight between forward and backward, or form it twice.
            Source: ours; memory against time.
        seed: seed of the noise, where attach gets no generator. Source: ours; the same on all
            processes of a run.

    Raises:
        TypeError, ValueError: a hyperparameter of the wrong type or outside its range; at attach,
            an optimizer without a first moment for ``"mgpo"`` and ``"mgpo_code"``.
        FloatingPointError: at a step whose gradient is not finite, before any weight has changed
            (only where gradients are read: not with ``beta=0``).
        RuntimeError: at a step whose gradients are still scaled by a GradScaler.
    """

    rank: Rank = 8
    alpha: Alpha = 16.0
    dropout: BelowOne = 0.0
    rank_stabilised: bool = False
    variant: Literal["ggpo", "kohya", "isotropic", "mgpo", "mgpo_code"] = "ggpo"
    sigma: Weight = 0.03
    beta: Annotated[float, Range(0.0, 1000000000.0)] = 0.01
    rho: Annotated[float, Range(0.0, 1000.0, open_low=True)] = 0.05
    smoothing: BelowOne = 0.9
    sign: Literal["source", "ascent", "descent"] = "source"
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
    peft: ClassVar[PeftNames] = LoRA.peft  # what is left after training is LoRA's
    # The contracts hold a training pass under autocast to a plain pass within 5 %, which noise of
    # 3 % exceeds in layers of four units; 1 % still shows in every other contract.
    tiny: ClassVar[dict[str, Any]] = {"sigma": 0.01}

    @property
    def scale(self) -> float:
        """s, the factor of BA."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    @property
    def noisy(self) -> bool:
        """Whether there is any noise at all."""
        return self.variant in NOISES and (
            self.sigma > 0 or (self.variant == "kohya" and self.beta > 0)
        )

    @property
    def direction(self) -> int:
        """+1 along the momentum, -1 against it."""
        along = self.variant == "mgpo" if self.sign == "source" else self.sign == "ascent"
        return 1 if along else -1

    def build(self, site: Site, generator: torch.Generator | None = None) -> LoRAGGPOLayer:
        warn_above(self.rank, site)
        return LoRAGGPOLayer(self, site, generator)

    def count(self, site: Site) -> int:
        """r (m + n) numbers for a layer of shape (m, n)."""
        return self.rank * (site.rows + site.cols)

    def controller(
        self, adapted: Adapted, optimizer: torch.optim.Optimizer, total_steps: int | None, **options
    ) -> NoiseController | MomentumController:
        kind = NoiseController if self.variant in NOISES else MomentumController
        return kind(self, adapted, optimizer, **options)


class LoRAGGPOLayer(LoRALayer):
    """The factors of one layer, as LoRA's, and the :class:`Cover` that may lie over it."""

    def __init__(self, method: LoRAGGPO, site: Site, generator: torch.Generator | None):
        super().__init__(method, site, generator)
        self.cover = Cover()

    def perturbed(self) -> bool:
        """Whether a forward pass now would run at the perturbed weight."""
        return self.training and self.cover.lies and torch.is_grad_enabled()

    def _factors(self) -> tuple[Tensor, Tensor]:
        if self.cover.shift is None:
            return self.A, self.B
        dA, dB = self.cover.shift
        return self.A + dA, self.B + dB

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        """The weight that a forward pass now would use: plain under ``no_grad``, as in a merge."""
        if not self.perturbed():
            return super().merged(base)
        A, B = self._factors()

        def new(layer: nn.Module) -> dict[str, Tensor]:
            return factored.merged(layer, self.site, A, B, self.scale)

        return self.cover.call(base, self.site.parameter, new)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.perturbed():
            return super().forward(base, *args, **kwargs)
        if self.site.kind == "attention" and not self.dropout:
            return functional_call(base, self.merged(base), args, kwargs)
        A, B = self._factors()

        def output(layer: nn.Module) -> Any:
            return factored.apply(
                layer, self.site, A, B, self.scale, self.dropout, True, args, kwargs
            )

        return self.cover.call(base, self.site.parameter, output)
