r"""DoRA: learn the direction of a weight by a low-rank difference, and its length apart.

.. math:: W = m\,\frac{W_0 + s\,BA}{\lVert W_0 + s\,BA\rVert_{row}}, \qquad s = \alpha / r

with one length :math:`m_i` per output, which starts at the norm of its row of :math:`W_0` (m, n).
Source: Liu et al., *DoRA: Weight-Decomposed Low-Rank Adaptation*, arXiv 2402.09353. The paper's
text takes norms over columns of the transposed weight, which are the rows here; its cheaper form
that holds the norm constant in the backward pass is ``like="code"``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from toolkit.core.adapt.lowrank import warn_above
from toolkit.core.adapt.peft import PeftNames
from toolkit.core.adapt.sites import Site, uniform
from toolkit.core.adapt.weight import WeightLayer
from toolkit.core.declare.fields import Alpha, Declared, Like, Rank
from toolkit.core.declare.info import Info


@dataclass(frozen=True)
class DoRA(Declared):
    """DoRA's hyperparameters; builds the length and the factors of one layer.

    Args:
        rank: rank r of the difference of the direction. Source: paper, 4 to 64.
        alpha: numerator of the scale s = alpha / r. Source: paper, twice the rank.
        like: gradient through the norm (paper), or the norm held constant (code). Source: paper,
            sections 4.1 and 4.3.
    """

    rank: Rank = 8
    alpha: Alpha = 16.0
    like: Like = "paper"

    info: ClassVar[Info] = Info(
        slug="dora",
        part="core",
        title="DoRA",
        arxiv="2402.09353",
        year=2024,
        code="NVlabs/DoRA",
        equation=r"W = m\,\frac{W_0 + s\,BA}{\lVert W_0 + s\,BA\rVert}",
        acts_on="length and direction of each row of the weight",
        count=r"r\,(m+n) + m",
        inference="none once merged",
        colour="#9B7653",
        kinds=("linear", "hf_conv1d", "conv"),
        init_tolerance=1e-6,
        init_reason="the length divides by the norm it was read from, which rounds",
    )
    peft: ClassVar[PeftNames] = PeftNames(
        kind="LORA",
        tensors={"A": "lora_A.weight", "B": "lora_B.weight", "length": "lora_magnitude_vector"},
        fields={"r": "rank", "lora_alpha": "alpha"},
        kinds=("linear", "hf_conv1d", "conv"),
        extra={"use_dora": True},
    )

    def build(self, site: Site, generator: torch.Generator | None = None) -> DoRALayer:
        warn_above(self.rank, site)
        return DoRALayer(self, site, generator)

    def count(self, site: Site) -> int:
        """r (m + n) + m numbers for a layer of shape (m, n)."""
        return self.rank * (site.rows + site.cols) + site.rows


class DoRALayer(WeightLayer):
    """``A`` (r, n), ``B`` (m, r) and ``length`` (m, 1) of one layer."""

    def __init__(self, method: DoRA, site: Site, generator: torch.Generator | None):
        super().__init__(site)
        self.scale, self.like = method.alpha / method.rank, method.like
        where = {"dtype": site.dtype, "device": site.device}
        self.A = nn.Parameter(
            uniform((method.rank, site.cols), 1 / math.sqrt(site.cols), site, generator)
        )
        self.B = nn.Parameter(torch.zeros(site.rows, method.rank, **where))
        assert site.weight is not None
        start = site.to_matrix(site.weight).to(site.dtype)
        self.length = nn.Parameter(start.norm(dim=1, keepdim=True))

    def new(self, weight: Tensor) -> Tensor:
        direction = weight + self.scale * (self.B @ self.A)
        norm = direction.norm(dim=1, keepdim=True)
        return self.length * direction / (norm.detach() if self.like == "code" else norm)
