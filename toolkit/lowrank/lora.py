r"""LoRA: learn a low-rank difference beside a frozen weight.

For a weight matrix :math:`W_0` of shape (m, n), factors :math:`B` (m, r) and :math:`A` (r, n):

.. math:: W = W_0 + s\,BA, \qquad s = \alpha / r

Source: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv 2106.09685; official
code ``microsoft/LoRA``. Where they differ: the paper's text draws A from a Gaussian, the code from
a Kaiming-uniform law, which is what stands here. Merging inside ``eval()``, as the code does, is an
explicit call here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from toolkit.core.adapt.lowrank import LowRankLayer, LowRankMethod
from toolkit.core.adapt.peft import PeftNames
from toolkit.core.adapt.sites import KINDS, Site, normal, uniform
from toolkit.core.declare.fields import Alpha, BelowOne, Rank
from toolkit.core.declare.info import Info


@dataclass(frozen=True)
class LoRA(LowRankMethod):
    r"""LoRA's hyperparameters; builds the factors of one layer.

    The difference is :math:`\Delta W = s\,BA` with :math:`s=\alpha/r`, or :math:`\alpha/\sqrt r`
    when ``rank_stabilised`` (rsLoRA). At the start :math:`B=0` and :math:`A` is drawn from
    :math:`U(-1/\sqrt n, 1/\sqrt n)`, so the model is its base. Embeddings start with :math:`A=0`
    and a normal :math:`B`, as in the official code, because a row of A is looked up there.

    Args:
        rank: rank r of the difference. Source: official code, examples use 4.
        alpha: numerator of the scale s = alpha / r. Source: official examples use 16 or 32.
        dropout: dropout on the input of the low-rank branch. Source: official code, default 0.
        rank_stabilised: divide alpha by sqrt(r) instead of r (rsLoRA). Source: rsLoRA, arXiv
            2312.03732.
    """

    rank: Rank = 4
    alpha: Alpha = 16.0
    dropout: BelowOne = 0.0
    rank_stabilised: bool = False

    info: ClassVar[Info] = Info(
        slug="lora",
        part="lowrank",
        title="LoRA",
        arxiv="2106.09685",
        year=2021,
        code="microsoft/LoRA",
        equation=r"W = W_0 + \frac{\alpha}{r}\,BA",
        acts_on="a low-rank difference of the weight",
        count=r"r\,(m+n)",
        inference="none once merged",
        colour="#6B7A8F",
        kinds=KINDS,
    )
    peft: ClassVar[PeftNames] = PeftNames(
        kind="LORA",
        tensors={"A": "lora_A.weight", "B": "lora_B.weight"},
        embedding={"A": "lora_embedding_A", "B": "lora_embedding_B"},
        fields={
            "r": "rank",
            "lora_alpha": "alpha",
            "lora_dropout": "dropout",
            "use_rslora": "rank_stabilised",
        },
        kinds=("linear", "hf_conv1d", "conv", "embedding"),
    )

    @property
    def scale(self) -> float:
        """s, the factor of BA."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def layer(self, site: Site, generator: torch.Generator | None) -> LoRALayer:
        return LoRALayer(self, site, generator)


class LoRALayer(LowRankLayer):
    """The factors of one layer: ``A`` of shape (r, n) and ``B`` of shape (m, r)."""

    def __init__(self, method: LoRA, site: Site, generator: torch.Generator | None):
        super().__init__(method, site)
        self.scale = method.scale
        r, m, n = method.rank, site.rows, site.cols
        if site.kind == "embedding":
            A, B = torch.zeros(r, n), normal((m, r), 1.0, site, generator)
        else:
            A, B = uniform((r, n), 1 / math.sqrt(n), site, generator), torch.zeros(m, r)
        self.A = nn.Parameter(A.to(site.device, site.dtype))
        self.B = nn.Parameter(B.to(site.device, site.dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.B, self.A
