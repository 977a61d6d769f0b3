r"""TriAdaptLoRA: a small square core between the factors, which grows where it grew fastest.

Between LoRA's factors :math:`B` (m, r) and :math:`A` (r, n) stands a core :math:`C` (r, r), the sum
of a lower triangular part L and an upper triangular part U:

.. math:: W = W_0 + s\,B\,C\,A, \qquad C = L + U

A layer starts with a small rank. Growing by c adds c rows to L and A, and c columns to U and B;
what was learned is not moved. The layers that grow are those whose core's norm rose most since the
last look.

Source: Liang, Wang, Zeng, *TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for
Parameter-Efficient Fine-Tuning*, arXiv 2501.08008. Only its abstract could be read; what stands
here follows the files of its first author in ``YaoLiang2023/DiverValue-Bench`` (there is no other
known code), which disagree among themselves. Inferred, not read: the default start, the default
scale, the place of the growth after the optimizer's step, and everything about budget and limits.

Choices where the author's files disagree, each with the others as options:

- ``init="zero_core"`` (file ``block_c0``): the only start that is exact, whose growth changes no
  output, and in which every tensor learns.
- ``rescale="fixed"``: s = alpha / target rank, so that growth changes no output. The files divide
  by the current rank ("rank") or multiply by 2 ("constant").
- the budget is met exactly; the files' rule can pass it (``overshoot=True``).
- the previous norm is detached; in the files it keeps the graph of an old step alive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch

from toolkit.core.adapt.lowrank import LowRankMethod
from toolkit.core.adapt.model import Share
from toolkit.core.adapt.sites import KINDS, Site
from toolkit.core.declare.fields import (
    Alpha,
    BelowOne,
    Interval,
    Range,
    Rank,
    Steps,
    TotalRank,
    Weight,
)
from toolkit.core.declare.info import Info
from toolkit.lowrank.triadaptlora.layer import TriAdaptLoRALayer
from toolkit.lowrank.triadaptlora.triangular import TriangularController

INITS = ("zero_core", "identity", "gaussian")
DEAD = ("abc0", "cb0")


@dataclass(frozen=True)
class TriAdaptLoRA(LowRankMethod):
    r"""TriAdaptLoRA's hyperparameters; builds the core and the factors of one layer.

    Every layer starts at ``init_rank``. At each look the layers whose score is among the M highest
    grow by ``block``, until the ranks of all layers add up to ``target_rank`` times the number of
    layers, or to ``total_rank``. Looks fall on the steps t > ``warmup`` that ``interval`` divides,
    t counted from 0. Call ``adapted.attach(optimizer, total_steps=T)``. The penalty acts after
    gradient clipping, unless attached with ``penalty="loss"``. The score is told at
    :class:`~toolkit.lowrank.triadaptlora.triangular.TriangularController`.

    Args:
        init_rank: rank of every layer at the start. Source: author's files, init_rank.
        target_rank: average rank per layer at the end. Source: author's files, reference_rank.
        total_rank: final sum of ranks; overrides target_rank times the number of layers. Source:
            author's files, target_total_rank.
        alpha: numerator of the scale. Source: ours: 16 / 8 is the constant 2 of the author's main
            file; its LoRA default is 8.
        rescale: scale: alpha / target_rank, alpha / (r + 1e-5) with the current rank r, or 2.
            Source: ours (inferred); author's file block_c0; author's main file.
        dropout: dropout on the input of the branch. Source: author's files.
        init: start of the blocks. Source: author's files block_c0, main, and single.
        block: ranks c that a layer gains at once; None: half of target_rank. Source: author's
            files, incre_rank_num.
        growth: how the number of growing layers rises with time. Source: author's files,
            rank_growth_model; the abstract names linear as the best.
        warmup: steps before the first look. Source: author's files, init_warmup.
        interval: steps between two looks. Source: author's files, incre_interval.
        overshoot: let the last growth pass the target, as the author's files do. Source: author's
            files.
        orthogonality: weight gamma of the orthogonality penalty on A and B. Source: author's files,
            orth_reg_weight.
        weight_decay: weight decay of blocks that are born later. Source: author's files,
            weight_decay.
        restart: give new blocks a learning-rate schedule of their own, from their birth. Source:
            ours; the author's files leave it to the scheduler.

    Raises:
        ValueError: a target below the start, or a start that cannot learn.
    """

    init_rank: Rank = 1
    target_rank: Rank = 8
    total_rank: TotalRank | None = None
    alpha: Alpha = 16.0
    rescale: Literal["fixed", "rank", "constant"] = "fixed"
    dropout: BelowOne = 0.0
    init: Literal["zero_core", "identity", "gaussian"] = "zero_core"
    block: Annotated[int, Range(1, 256)] | None = None
    growth: Literal["linear", "exponential"] = "linear"
    warmup: Steps = 0
    interval: Interval = 1
    overshoot: bool = False
    orthogonality: Weight = 0.5
    weight_decay: Weight = 0.0
    restart: bool = False

    info: ClassVar[Info] = Info(
        slug="triadaptlora",
        part="lowrank",
        title="TriAdaptLoRA",
        arxiv="2501.08008",
        year=2025,
        code="YaoLiang2023/DiverValue-Bench",
        equation=r"W = W_0 + s\,B\,(L+U)\,A",
        acts_on="a low-rank difference with a growing core",
        count=r"r\,(m+n) + \sum_i 2\,c_i\,\rho_i",
        inference="none once merged",
        colour="#0072B2",
        kinds=KINDS,
    )
    tiny: ClassVar[dict[str, Any]] = {"init_rank": 1, "target_rank": 3, "block": 1}

    def __post_init__(self) -> None:
        if isinstance(self.init, str) and self.init in DEAD:
            raise ValueError(
                f"TriAdaptLoRA(init={self.init!r}): this start can never learn. B C A is a product "
                "of three factors and two of them, B and C, are 0, so the gradients of all three "
                f"are 0 at every step. Use one of {list(INITS)}"
            )
        super().__post_init__()
        if self.total_rank is None and self.target_rank < self.init_rank:
            raise ValueError(
                f"TriAdaptLoRA(target_rank={self.target_rank}): the target is below "
                f"init_rank={self.init_rank}; ranks only grow, so start lower or aim higher"
            )

    @property
    def step_rank(self) -> int:
        """c, the ranks that a layer gains at once."""
        return max(1, self.target_rank // 2) if self.block is None else self.block

    @property
    def start(self) -> int:
        return self.init_rank

    def layer(self, site: Site, generator: torch.Generator | None) -> TriAdaptLoRALayer:
        return TriAdaptLoRALayer(self, site, generator)

    def count(self, site: Site) -> int:
        """r (m + n) + 2 r^2 numbers at the start, r = ``init_rank``, for a layer (m, n)."""
        return self.init_rank * (site.rows + site.cols + 2 * self.init_rank)

    def controller(self, share: Share, *where: Any, **options: Any) -> TriangularController:
        return TriangularController(self, share.adapters, *where, **options)
