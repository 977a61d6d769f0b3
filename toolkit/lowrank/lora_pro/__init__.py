r"""LoRA-Pro: move A and B so that the merged weight moves as full fine-tuning would move it.

The layer is LoRA's, :math:`W = W_0 + s\,BA`. A step along :math:`-g^A, -g^B` moves the weight, to
first order, along

.. math:: -\tilde g = -(s\,B\,g^A + s\,g^B A),

and LoRA-Pro takes the pair that brings :math:`\tilde g` nearest to the full gradient g. It is known
in closed form and needs only LoRA's own gradients
(:func:`~toolkit.lowrank.lora_pro.projection.adjusted`).

Source: Wang et al., *LoRA-Pro: Are Low-Rank Adapters Properly Optimized?*, arXiv 2407.18242;
official code ``mrflogs/LoRA-Pro`` (``lorapro_full_adjustment``). Where they differ, the paper's
formulas stand here. The code counts one step too many in Adam's bias correction
(``like="code"`` repeats that), fixes s to 2, solves the Sylvester equation through complex
numbers, cuts small singular values in its inverses (``pinv``), and from the second step on rounds
the squared gradient to bfloat16. Which Adam the efficient mode uses was inferred, not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch

from toolkit.core.adapt.model import Adapted
from toolkit.core.adapt.sites import KINDS
from toolkit.core.declare.fields import BelowOne, Like, Range, Rank, Share
from toolkit.core.declare.info import Info
from toolkit.lowrank.lora import LoRA
from toolkit.lowrank.lora_pro.adjustment import Adjustment
from toolkit.lowrank.lora_pro.moments import AdamAdjustment


@dataclass(frozen=True)
class LoRAPro(LoRA):
    r"""LoRA with another step: its hyperparameters, the factors of one layer, and the step's.

    ``mode="full"`` runs Adam inside, on :math:`\tilde g` of shape (m, n), and hands the adjusted
    pair of Adam's direction to the optimizer, which must be ``torch.optim.SGD`` without momentum:
    its ``lr`` is the learning rate, its ``weight_decay`` acts as in AdamW. **Memory**: two moments
    of the size of every adapted weight, :math:`2mn` numbers a layer, as in full fine-tuning.

    ``mode="efficient"`` adjusts the gradients and leaves the rest to any optimizer. Memory: that
    of LoRA. Clip gradients of all tensors together, never of one factor alone.

    In full mode, parameters named by ``train`` get plain Adam with the same betas, at the learning
    rate of their SGD group. To use another optimizer for them, which takes them out of the SGD::

        optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-3)
        head = torch.optim.AdamW(model.head.parameters(), lr=1e-3)
        adapted.attach(optimizer, beside=head)    # then call optimizer.step() and head.step()

    What the SGD holds besides is left to it. During the step ``p.grad`` holds the adjusted pair,
    before and after it the raw gradients.

    Args:
        rank: rank r of the difference. Source: official Llama-2-7B scripts.
        alpha: numerator of the scale s = alpha / r. Source: official Llama-2-7B scripts.
        rank_stabilised: divide alpha by sqrt(r) instead of r (rsLoRA). Source: official scripts,
            flag rslora.
        mode: Adam on the whole weight's gradient, or adjusted gradients for any optimizer. Source:
            full is what the official code runs.
        X: how the change is shared between A and B. Source: paper; official code.
        beta1: full mode: Adam's average of gradients. Source: official code.
        beta2: full mode: Adam's average of squares. Source: official code.
        eps: full mode: added to Adam's denominator. Source: official code.
        damping: added to the diagonal of B'B and AA' before they are inverted. Source: official
            code.
        like: full mode: Adam's own bias correction (paper), or one step ahead (code). Source:
            paper; the published code increases its counter first.

    Raises:
        TypeError, ValueError: at ``attach``, an optimizer that does not fit the mode.
    """

    rank: Rank = 8
    mode: Literal["full", "efficient"] = "full"
    X: Literal["sylvester", "zero", "symmetric"] = "sylvester"
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.999
    eps: Annotated[float, Range(0.0, 1.0, log=True, open_low=True)] = 1e-08
    damping: Share = 1e-08
    like: Like = "paper"

    info: ClassVar[Info] = Info(
        slug="lora_pro",
        part="lowrank",
        title="LoRA-Pro",
        arxiv="2407.18242",
        year=2024,
        code="mrflogs/LoRA-Pro",
        equation=r"\min_{g^A, g^B} \|s\,B g^A + s\,g^B A - g\|_F",
        acts_on="the gradients of LoRA's factors",
        count=r"r\,(m+n)",
        inference="none once merged",
        colour="#CC79A7",
        kinds=KINDS,
    )
    # the contract tests drive every method with AdamW, which full mode must refuse
    tiny: ClassVar[dict[str, Any]] = {"mode": "efficient"}

    @property
    def exclusive(self) -> bool:
        """Whether no other method may share the optimizer: full mode runs Adam itself."""
        return self.mode == "full"

    def controller(
        self,
        adapted: Adapted,
        optimizer: torch.optim.Optimizer,
        total_steps: int | None,
        beside: torch.optim.Optimizer | None = None,
    ) -> Adjustment:
        if self.mode == "full":
            return AdamAdjustment(self, adapted.adapters, optimizer, adapted.extra, beside)
        if beside is not None:
            raise TypeError(
                "beside is for mode='full', where the optimizer must be SGD; in efficient mode "
                "any optimizer may hold the other parameters"
            )
        return Adjustment(self, adapted.adapters, optimizer)
