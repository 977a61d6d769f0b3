r"""AdaLoRA: spend a fixed budget of ranks where the loss needs them.

Each difference has the form of a singular value decomposition, and one global budget of triplets
is shared by all layers:

.. math:: W_k = W_k^{(0)} + \frac{\alpha}{r_0 + 10^{-5}}\,P_k \,\mathrm{diag}(\lambda_k)\, Q_k

Source: Zhang et al., *Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning*, arXiv
2303.10512; official code ``QingruZhang/AdaLoRA``. Where they differ:

* the penalty is a sum of squared norms in the paper, the mean of unsquared ones in the code:
  ``like``;
* importance is taken from the updated parameter and the gradient that updated it, steps count from
  0, the divisor stays at the initial rank and carries 1e-5: all as in the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from toolkit.core.adapt.lowrank import LowRankLayer, LowRankMethod
from toolkit.core.adapt.model import Share
from toolkit.core.adapt.peft import PeftNames
from toolkit.core.adapt.sites import KINDS, Site, normal
from toolkit.core.declare.fields import (
    Alpha,
    BelowOne,
    Interval,
    Like,
    Range,
    Rank,
    Smoothing,
    Steps,
    Weight,
)
from toolkit.core.declare.info import Info
from toolkit.lowrank.adalora.allocation import AllocationController


@dataclass(frozen=True)
class AdaLoRA(LowRankMethod):
    r"""AdaLoRA's hyperparameters; builds the triplets of one layer.

    A run of T steps keeps the full budget :math:`b_0` for ``warmup`` steps, shrinks it along a
    cubic to :math:`b_T` (``target_rank`` times the number of layers, or ``total_rank``), and keeps
    the chosen triplets for the last ``final`` steps. Call ``adapted.attach(optimizer,
    total_steps=T)``; options: :class:`~toolkit.lowrank.adalora.allocation.AllocationController`.
    The penalty acts after gradient clipping, unless attached with ``penalty="loss"``.

    Args:
        rank: initial rank r0 of every layer. Source: peft's default; official scripts 1.5 to 3
            times the target.
        target_rank: average rank per layer at the end. Source: peft's default; official scripts 1
            to 8.
        total_rank: final number of triplets in all; overrides target_rank. Source: official code,
            target_total_rank.
        alpha: numerator of the scale alpha / r0. Source: official scripts 16 or 32.
        dropout: dropout on the input of the branch. Source: official code.
        orthogonality: weight gamma of the orthogonality penalty. Source: official scripts 0.1 to
            0.3; paper from 0.1, 0.3, 0.5.
        like: penalty: squared norms, summed (paper, equation 4), or the mean of norms (code).
            Source: official code.
        warmup: steps t_i at the full budget. Source: official scripts, by task.
        final: steps t_f at the final budget. Source: official scripts, by task.
        interval: steps between two allocations. Source: official scripts 1, 10 or 100 by task.
        beta1: smoothing of the sensitivity. Source: paper, all tasks.
        beta2: smoothing of its uncertainty. Source: paper, all tasks.
        score: importance of a triplet. Source: paper, section 3.2 and table 4.

    Raises:
        ValueError: a target above the initial rank.
    """

    rank: Rank = 12
    target_rank: Annotated[int, Range(0, 256)] = 8
    total_rank: Annotated[int, Range(0, 100000)] | None = None
    alpha: Alpha = 16.0
    dropout: BelowOne = 0.0
    orthogonality: Weight = 0.1
    like: Like = "code"
    warmup: Steps = 0
    final: Steps = 0
    interval: Interval = 1
    beta1: Smoothing = 0.85
    beta2: Smoothing = 0.85
    score: Literal["full", "sensitivity", "magnitude"] = "full"

    info: ClassVar[Info] = Info(
        slug="adalora",
        part="lowrank",
        title="AdaLoRA",
        arxiv="2303.10512",
        year=2023,
        code="QingruZhang/AdaLoRA",
        equation=r"W = W_0 + \frac{\alpha}{r_0}\,P\,\mathrm{diag}(\lambda)\,Q",
        acts_on="a low-rank difference with a shared budget of ranks",
        count=r"r_0\,(m+n+1)",
        inference="none once merged",
        colour="#D55E00",
        kinds=KINDS,
    )
    peft: ClassVar[PeftNames] = PeftNames(
        kind="ADALORA",
        tensors={"Q": "lora_A", "E": "lora_E", "P": "lora_B"},
        fields={
            "init_r": "rank",
            "target_r": "target_rank",
            "lora_alpha": "alpha",
            "lora_dropout": "dropout",
            "orth_reg_weight": "orthogonality",
            "tinit": "warmup",
            "tfinal": "final",
            "deltaT": "interval",
            "beta1": "beta1",
            "beta2": "beta2",
        },
        kinds=("linear", "hf_conv1d"),
        extra={"total_step": 1_000_000_000},
        ranks="E",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.total_rank is None and self.target_rank > self.rank:
            raise ValueError(
                f"AdaLoRA(target_rank={self.target_rank}): the target is above the initial "
                f"rank={self.rank}; ranks only shrink, so start higher or aim lower"
            )

    @property
    def scale(self) -> float:
        """The factor of P diag(lambda) Q."""
        return self.alpha / (self.rank + 1e-5)

    def layer(self, site: Site, generator: torch.Generator | None) -> AdaLoRALayer:
        return AdaLoRALayer(self, site, generator)

    def count(self, site: Site) -> int:
        """r0 (m + n + 1) numbers for a layer of shape (m, n)."""
        return self.rank * (site.rows + site.cols + 1)

    def controller(self, share: Share, *where: Any, **options: Any) -> AllocationController:
        return AllocationController(self, share.adapters, *where, **options)


class AdaLoRALayer(LowRankLayer):
    """The triplets of one layer: ``P`` (m, r), ``E`` (r, 1) for lambda, ``Q`` (r, n)."""

    def __init__(self, method: AdaLoRA, site: Site, generator: torch.Generator | None):
        super().__init__(method, site)
        self.scale = method.scale
        r, m, n = method.rank, site.rows, site.cols
        self.P = nn.Parameter(normal((m, r), 0.02, site, generator))
        self.E = nn.Parameter(torch.zeros(r, 1, dtype=site.dtype, device=site.device))
        self.Q = nn.Parameter(normal((r, n), 0.02, site, generator))

    def factors(self) -> tuple[Tensor, Tensor]:
        """P (m, r) and diag(lambda) Q (r, n)."""
        return self.P, self.E * self.Q

    def alive(self) -> Tensor:
        """(r,) booleans: which triplets count."""
        return self.E.detach()[:, 0] != 0

    def compact(self) -> None:
        """Drop triplets with lambda = 0; the map and its scale stay the same."""
        self._keep(self.alive())

    def resize(self, state: dict[str, Tensor]) -> None:
        """Take on the rank of saved tensors, which is lower after :meth:`compact`."""
        if "E" in state:
            self._keep(torch.arange(len(self.E), device=self.E.device) < state["E"].shape[0])

    @torch.no_grad()
    def _keep(self, kept: Tensor) -> None:
        if not bool(kept.all()):
            self.P = nn.Parameter(self.P[:, kept].contiguous())
            self.E = nn.Parameter(self.E[kept].contiguous())
            self.Q = nn.Parameter(self.Q[kept].contiguous())

    def facts(self) -> dict[str, int]:
        return {"rank": int(self.alive().sum())}
