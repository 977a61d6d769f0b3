r"""IncreLoRA: start every layer at rank 1 and add ranks where the loss asks for them.

Differences have the form of a singular value decomposition, and each layer keeps a few *reserve*
components whose :math:`\lambda` is frozen near 0, so that their vectors train before they count:

.. math:: W_k = W_k^{(0)} + s\Big(\sum_{i\le r_k} \lambda_{k,i}\, b_{k,i} a_{k,i}
    + \sum_{\text{reserve}} \lambda_s\, b_{k,j} a_{k,j}\Big)

Source: Zhang et al., *IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient
Fine-tuning*, arXiv 2308.12043; official code ``FeiyuZhang98/IncreLoRA``. Where they differ:

* the score is a mean in the paper, a sum over :math:`\sqrt{mn}` in the code: ``like``;
* the penalty is a sum of squared norms in the paper, the mean of unsquared ones in the code, over
  the concatenated factors in its trainer and block by block in its library helper: ``like``.

Different from the code by default, each with an option or a reason:

* :math:`s` is :math:`\alpha / (\bar r + 10^{-5})` with the *target* average rank :math:`\bar r`, so
  that growing keeps the function. The code divides by :math:`r_k`, which shrinks the whole
  difference of a layer at the moment it grows (``rescale=True``).
* the budget is met exactly; the code may pass it and then never stops scoring
  (``overshoot=True``, which stops all the same).
* under gradient accumulation the scores of the micro-batches add up; the code keeps the last.
* reserves exist from the start and not from the first optimizer step on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch

from toolkit.core.adapt import model
from toolkit.core.adapt.lowrank import LowRankMethod
from toolkit.core.adapt.sites import KINDS, Site
from toolkit.core.declare.fields import (
    Alpha,
    BelowOne,
    Interval,
    Range,
    Rank,
    Share,
    Smoothing,
    Steps,
    TotalRank,
    Weight,
)
from toolkit.core.declare.info import Info
from toolkit.lowrank.increlora.increment import IncrementController
from toolkit.lowrank.increlora.layer import IncreLoRALayer


@dataclass(frozen=True)
class IncreLoRA(LowRankMethod):
    r"""IncreLoRA's hyperparameters; builds the components of one layer.

    In a run of T steps every step t > ``warmup`` divisible by ``interval`` lets the ``top``
    highest-scoring layers grow by ``growth``, until the total is ``target_rank`` times the number
    of layers, or ``total_rank``. Call ``adapted.attach(optimizer, total_steps=T)`` before a
    scheduler is built: attach reserves the parameter groups that growth will fill. With ``restart``
    their learning rate warms up anew and then falls linearly to 0 at T, which suits a schedule that
    also falls linearly; with another one use ``restart=False``. The penalty acts after gradient
    clipping, unless attached with ``penalty="loss"``.

    The score needs the model in training mode. It is exact, also for layers that a step calls more
    than once in the sense that the scores of the calls add up; with ``dropout`` it is taken at the
    input without dropout.

    Args:
        rank: initial rank of every layer. Source: paper and official scripts: 1.
        target_rank: average rank per layer at the end; also the divisor of the fixed scale. Source:
            paper and official scripts 2 or 8.
        total_rank: final rank of all layers together; overrides target_rank as the budget. Source:
            official code, target_total_rank.
        top: layers h that grow at a time. Source: official scripts 2 to 22 by task.
        growth: ranks c a layer gets at a time, and width of its reserve. Source: official code 1,
            2, 3, 4 for an average target of 2, 4, 6, 8.
        interval: steps nu between two growths. Source: official scripts 100 for small tasks, 500 to
            1000 for large ones.
        warmup: steps before the first growth. Source: paper: as many as interval.
        window: score only in so many steps up to a growth; None scores every step while growing.
            Source: ours: a score costs a third of a step, and the averages forget within 30 steps.
        beta1: smoothing of the importance. Source: paper and official scripts.
        beta2: smoothing of its uncertainty. Source: paper and official scripts.
        orthogonality: weight gamma of the orthogonality penalty. Source: official scripts 0.1, for
            two tasks 0.3.
        like: the score's divisor and the penalty: mn, and squared norms, summed (paper); sqrt(mn),
            and the mean of norms over the concatenated factors (code); the same with the norms of
            each block alone, which never makes blocks orthogonal to each other (library). Source:
            official trainer; its library helper takes the blocks alone.
        advance: advance learning: reserves train before they count. Source: paper; official
            advance_learn.
        reserve: frozen lambda of the reserves under advance learning, else 0. Source: paper and
            official code.
        alpha: numerator of the scale. Source: official scripts 16 or 32.
        rescale: divide by the layer's own rank, which rescales it at each growth. Source: official
            code; the default divides by target_rank.
        dropout: dropout on the input of the branch. Source: official code.
        restart: new tensors warm up anew; else they have the learning rate of the others. Source:
            paper; official multi_lr.
        restart_warmup: steps of that warm-up. Source: official code: as many as the run's own warm-
            up.
        overshoot: let ties and growth > 1 pass the budget. Source: official code; the default meets
            it exactly.
    """

    rank: Rank = 1
    target_rank: Annotated[int, Range(1, 256)] = 2
    total_rank: TotalRank | None = None
    top: Annotated[int, Range(1, 10000)] = 4
    growth: Annotated[int, Range(1, 64)] = 1
    interval: Interval = 100
    warmup: Steps = 100
    window: Annotated[int, Range(1, 1000000)] | None = None
    beta1: Smoothing = 0.85
    beta2: Smoothing = 0.85
    orthogonality: Weight = 0.1
    like: Literal["paper", "code", "library"] = "code"
    advance: bool = True
    reserve: Share = 1e-05
    alpha: Alpha = 16.0
    rescale: bool = False
    dropout: BelowOne = 0.0
    restart: bool = True
    restart_warmup: Steps = 100
    overshoot: bool = False

    info: ClassVar[Info] = Info(
        slug="increlora",
        part="lowrank",
        title="IncreLoRA",
        arxiv="2308.12043",
        year=2023,
        code="FeiyuZhang98/IncreLoRA",
        equation=r"W = W_0 + \frac{\alpha}{\bar r}\,B\,\mathrm{diag}(\lambda)\,A,"
        r"\quad r_k(t)\ \text{grows}",
        acts_on="a low-rank difference whose rank grows where it is needed",
        count=r"r_0\,(m+n+1) + c\,(m+n)\ \text{at the start}",
        inference="none once merged",
        colour="#009E73",
        kinds=KINDS,
        init_tolerance=1e-6,
        init_reason="the reserve components act with lambda 1e-5, so that their vectors can train",
    )
    tiny: ClassVar[dict[str, Any]] = {
        "rank": 1,
        "target_rank": 2,
        "top": 1,
        "interval": 2,
        "warmup": 0,
        "restart_warmup": 2,
    }

    def scale(self, rank: int) -> float:
        """s of a layer of that rank."""
        return self.alpha / ((rank if self.rescale else self.target_rank) + 1e-5)

    def layer(self, site: Site, generator: torch.Generator | None) -> IncreLoRALayer:
        return IncreLoRALayer(self, site, generator)

    def count(self, site: Site) -> int:
        """r0 (m + n + 1) + c (m + n) numbers at the start, for a layer of shape (m, n).

        The reserve counts only under advance learning, and is narrower, or not there, where r0 + c
        would pass min(m, n).
        """
        room = max(0, min(site.rows, site.cols) - self.rank)
        spare = min(self.growth, room) if self.advance else 0
        return (self.rank + spare) * (site.rows + site.cols) + self.rank

    def controller(self, share: model.Share, *where: Any, **options: Any) -> IncrementController:
        return IncrementController(self, share.adapters, *where, **options)
