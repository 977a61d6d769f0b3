r"""SNELLA: a change of full rank from two small factors, whose entries compete for a budget.

A kernel between the rows of A and B gives every entry of the change; inside a layer only those of
largest magnitude stay, and the layers compete for how many that may be:

.. math:: W = W_0 + \Delta W^s, \qquad \Delta W = \kappa(A, B)^\top, \qquad
    \Delta W^s = \Delta W\,|\Delta W|\,1[\,|\Delta W| > w_s\,]

Source: Shen, Sun, Wang, Huang, *Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition
for Vision Models*, arXiv 2510.24037, whose text was not read beyond its abstract; mixed kernel,
schedule and scores are those of the official code ``ssfgunner/SNELL``. The kernel without
competition between layers is :class:`~toolkit.select.snella.snell.SNELL`. Where paper and code
differ:

* the paper subtracts the limit from the magnitude, the code multiplies by the magnitude and holds
  it constant: ``like``. Either is quadratic, so the adapted model is close to its base at the
  start and not equal to it;
* the weights of the kernel's pieces are learned in the paper, and +-0.1 in the code: ``like``;
* importance is taken from the updated factors and the gradient that updated them, as in the code;
* the code schedules by epochs: here ``interval`` is the number of steps of one. Nothing is shared
  out before the first step or after the last, so without ``final`` steps the target is never quite
  reached;
* where all scores are zero the code fails; here all layers count the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch

from toolkit.core.adapt.model import Adapted
from toolkit.core.adapt.sites import KINDS, Site
from toolkit.core.declare.fields import (
    BelowOne,
    Declared,
    Interval,
    Range,
    Rank,
    Share,
    Smoothing,
    Steps,
)
from toolkit.core.declare.info import Info
from toolkit.select.snella.allocation import ShareController
from toolkit.select.snella.layer import KernelLayer, check_pieces, count


@dataclass(frozen=True)
class SNELLA(Declared):
    r"""SNELLA's hyperparameters; builds the factors of one layer.

    Of :math:`N=\sum_l m_l n_l` entries, :math:`V_0=(1-s_0)N` may differ from 0 for ``warmup``
    steps; then the number falls along a cubic to :math:`V_T=(1-s^*)N`, and every ``interval`` steps
    it is shared out by the layers' scores. Call ``adapted.attach(optimizer, total_steps=T)``.

    Args:
        rank: columns r of both factors; the change has a higher rank. Source: official code; its
            scripts 8, 16, 32.
        start_sparsity: share s0 of zeros at the start. Source: official scripts, FGVC; 0.01 for
            VTAB.
        target_sparsity: share of zeros at the end. Source: official code; scripts 0 to 0.93 by
            task.
        kernel: how rows become entries. Source: official code; piecewise and linear are SNELL's.
        pieces: parts P of a row, whose distances count with + and - in turn. Source: paper.
        scale: weight of a distance. Source: official code.
        like: multiply by the magnitude, held constant (code), subtract the limit and learn the
            pieces' weights (paper), or only mask (hard, ours). Source: official code.
        warmup: steps at the first budget. Source: official scripts.
        final: steps at the last budget. Source: official scripts.
        interval: steps between two allocations. Source: official scripts: one epoch.
        beta1: smoothing of the importance. Source: official code.
        beta2: smoothing of its uncertainty. Source: official code.
        dropout: dropout on the input of the change. Source: ours; official scripts 0.1.
        drop_path: share of examples that pass without the change. Source: ours; official scripts
            0.1.
        recompute: form the change again in the backward pass instead of keeping it. Source:
            official code.

    Raises:
        TypeError, ValueError: a hyperparameter of the wrong type or outside its range, or a rank
            that is no multiple of ``pieces``.
    """

    rank: Rank = 8
    start_sparsity: Share = 0.0
    target_sparsity: Share = 0.9
    kernel: Literal["mixed", "piecewise", "linear", "sigmoid", "rbf"] = "mixed"
    pieces: Annotated[int, Range(1, 64)] = 2
    scale: Annotated[float, Range(0.0, 100.0, open_low=True)] = 0.1
    like: Literal["paper", "code", "hard"] = "code"
    warmup: Steps = 0
    final: Steps = 0
    interval: Interval = 100
    beta1: Smoothing = 0.85
    beta2: Smoothing = 0.85
    dropout: BelowOne = 0.0
    drop_path: BelowOne = 0.0
    recompute: bool = True

    info: ClassVar[Info] = Info(
        slug="snella",
        part="select",
        title="SNELLA",
        arxiv="2510.24037",
        year=2025,
        code="ssfgunner/SNELL",
        equation=r"W = W_0 + \Delta W^s,\quad \Delta W = \kappa(A, B)^\top",
        acts_on="the entries of largest change, which a kernel of two factors gives",
        count=r"r\,(m+n) + 3",
        inference="none once merged",
        colour="#117733",
        zero_init=False,
        init_reason="a distance kernel has no zero; the change starts near its own square",
        kinds=KINDS,
    )
    # its gradient holds the magnitude constant, so it is not that of the function; "hard" has one
    tiny: ClassVar[dict[str, Any]] = {
        "rank": 4, "like": "hard", "interval": 2, "target_sparsity": 0.5,
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pieces(self)

    def build(self, site: Site, generator: torch.Generator | None = None) -> KernelLayer:
        return KernelLayer(self, site, generator, self.start_sparsity)

    def count(self, site: Site) -> int:
        """r (m + n) numbers for a layer of shape (m, n), and the kernel's own."""
        return count(self, site)

    def controller(
        self, adapted: Adapted, optimizer: torch.optim.Optimizer, total_steps: int | None, **options
    ) -> ShareController:
        return ShareController(self, adapted.adapters, optimizer, total_steps, **options)
