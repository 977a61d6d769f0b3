r"""Train only some entries of a weight: the smallest, the largest, or those that score on data.

.. math:: M_{ij} = 1 \text{ for the share } p \text{ of entries with the highest score},\qquad
    W = W_0 + M \odot \Delta

Scores: :math:`-|w|` ("smallest"), :math:`|w|` ("largest"), a uniform draw ("random"), and on data
:math:`\sum_b g_b^2` ("fisher", Sung, Nair, Raffel, *Training Neural Networks with Fixed Sparse
Masks*, arXiv 2111.09839) or :math:`|\sum_b g_b|` ("gradient").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from toolkit.core.adapt.mask import MaskLayer
from toolkit.core.adapt.sites import Site
from toolkit.core.declare.fields import Declared, Range
from toolkit.core.declare.info import Info


@dataclass(frozen=True)
class SparseMask(Declared):
    """A fixed sparse mask over each weight, chosen when the model is adapted.

    Args:
        share: share p of the entries that move. Source: arXiv 2111.09839, 0.005.
        by: what is ranked; "fisher" and "gradient" need ``adapt(..., batches=, loss=)``. Source:
            arXiv 2111.09839, fisher.
    """

    share: Annotated[float, Range(0.0, 1.0, log=True, open_low=True)] = 0.01
    by: Literal["smallest", "largest", "random", "fisher", "gradient"] = "largest"

    info: ClassVar[Info] = Info(
        slug="sparse_mask",
        part="core",
        title="Sparse mask",
        arxiv="2111.09839",
        year=2021,
        code="varunnair18/FISH",
        equation=r"W = W_0 + M \odot \Delta",
        acts_on="chosen entries of the weight",
        count=r"\lceil p\,mn \rceil",
        inference="none once merged",
        colour="#A0783C",
        kinds=("linear", "hf_conv1d", "conv", "embedding", "attention"),
    )

    tiny: ClassVar[dict[str, float]] = {"share": 0.5}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share == 1:
            raise ValueError(
                "SparseMask(share=1.0): share must lie in (0.0, 1.0); a mask of all entries "
                "chooses none, so let the parameter train with Train()"
            )

    @property
    def scores(self) -> str | None:
        """What must be measured on data before building."""
        return self.by if self.by in ("fisher", "gradient") else None

    def build(self, site: Site, generator: torch.Generator | None = None) -> MaskLayer:
        assert site.weight is not None
        if self.by == "random":
            where = generator.device if generator is not None else "cpu"
            shape = (site.rows, site.cols)
            score = torch.rand(shape, generator=generator, device=where).to(site.device)
        else:
            score = site.to_matrix(site.weight).abs() if self.scores is None else site.scores
        assert score is not None
        if bool(score.isnan().any()):
            raise ValueError(f"layer {site.name!r}: its scores hold NaN, so nothing can be ranked")
        return MaskLayer(site, top(-score if self.by == "smallest" else score, self.count(site)))

    def count(self, site: Site) -> int:
        """The share of m n, at least one."""
        return max(1, -int(-self.share * site.rows * site.cols // 1))


def top(score: Tensor, count: int) -> Tensor:
    """A mask of the ``count`` highest entries; of equal ones the first in memory."""
    order = torch.argsort(score.reshape(-1), descending=True, stable=True)
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[order[:count]] = True
    return mask.view(score.shape)
