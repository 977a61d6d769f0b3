r"""PCB-Merging: every coordinate of every task has its own weight in the mean.

With task vectors :math:`T \in \mathbb{R}^{n\times D}`, their sizes clipped to their own quantiles,
:math:`a`, and :math:`u = \mathrm{sign}(T)\,\mathrm{Norm}(a)`:

.. math::
    B_i = \exp\!\big(n\,\mathrm{Norm}(a_i)^2\big) \odot \sum_j \tanh(u_i \odot u_j), \qquad
    W = \mathrm{Norm}\big(\mathrm{Clip}_{1-r,0}(B)\big), \qquad
    \theta = \theta_P + \lambda\,\frac{\sum_i w_i\, \bar T_i \odot W_i}{\sum_i W_i},

where :math:`\mathrm{Norm}(x) = (x-\min x)/(\max x-\min x)` within a row. The first factor asks
whether a coordinate is large within its task, the second whether the tasks agree on it; what lies
below the :math:`1-r` quantile has weight 0. Rows that are constant have weight 0 everywhere.

Source: Du et al., *Parameter Competition Balancing for Model Merging*, arXiv 2410.02396; official
code duguodong7/pcb-merging, which has three spellings of the second factor. The form with softmax
is inferred from secondary sources, as the paper's equations were not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from toolkit.core.declare.fields import Range
from toolkit.core.declare.info import Info
from toolkit.core.states.orders import order_statistics
from toolkit.core.states.rules import Piece, Pieces, Rule


@dataclass(frozen=True)
class PCBMerging(Rule):
    """A weighted mean of the task vectors, with a weight per coordinate and task.

    The weights given to ``merge`` are the paper's coefficients per task.

    Args:
        ratio: share r of the coordinates that each task keeps. Source: official code, 0.1; 0.05
            for vision, 0.2 for T5.
        scale: factor of the merged task vector. Source: official code, 1; 1.2 for vision.
        clip: share of the smallest and of the largest sizes that is clipped. Source: official code
            for vision and language, 0.01; 0.0001 in its top-level file.
        variant: how agreement is scored. Source: official code, pcb_ES.py (es), pcb.py (vision),
            merge_utils.py (raw); softmax is the paper's, inferred.
        over: whether coordinates compete within the model or within a tensor. Source: official
            code, model.
    """

    ratio: Annotated[float, Range(0.0, 1.0, log=True, open_low=True)] = 0.1
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0
    clip: Annotated[float, Range(0.0, 0.5, open_high=True)] = 0.01
    variant: Literal["es", "vision", "raw", "softmax"] = "es"
    over: Literal["model", "tensor"] = "model"

    info: ClassVar[Info] = Info(
        slug="pcb_merging",
        part="merge",
        title="PCB-Merging",
        arxiv="2410.02396",
        year=2024,
        code="duguodong7/pcb-merging",
        equation=r"\theta = \theta_P + \lambda \sum_i \bar T_i \odot W_i \,/ \sum_i W_i",
        acts_on="every coordinate of several task vectors",
        count="0",
        inference="none",
        colour="#B5403A",
    )

    @property
    def scope(self) -> str:  # type: ignore[override]
        return self.over

    def survey(self, pieces: Pieces) -> dict[str, Any]:
        """Per task: the clipped sizes' ends, and the scores' threshold and maximum."""
        facts: dict[str, Any] = {}
        if self.variant == "softmax":
            facts |= _masses(pieces)
        else:
            low, high = int(pieces.count * self.clip), int(pieces.count * (1 - self.clip) - 1)
            ends = order_statistics(pieces, _sizes, [low, max(low, high)])
            facts |= {"low": ends[:, 0].tolist(), "high": ends[:, 1].tolist()}
        least = min(int(pieces.count * (1 - self.ratio)), pieces.count - 1)
        found = order_statistics(
            pieces, lambda piece: self._scores(piece, facts), [least, pieces.count - 1]
        )
        return facts | {"least": found[:, 0].tolist(), "most": found[:, 1].tolist()}

    def merged(self, piece: Piece) -> Tensor:
        assert piece.base is not None
        scores, facts = self._scores(piece, piece.facts), piece.facts
        if self.variant == "softmax":
            clipped = piece.vectors
            share = scores.masked_fill_(scores < _column(scores, facts["least"]), 0.0)
        else:
            size = piece.vectors.abs()
            clipped = size.clamp_(_column(size, facts["low"]), _column(size, facts["high"]))
            clipped.copysign_(piece.vectors)
            share = normalised(scores, facts["least"], facts["most"])
        strength = clipped.new_tensor(piece.weights)
        merged = strength @ clipped.mul_(share)
        merged /= share.sum(dim=0).clamp_(min=1e-12 if self.variant != "softmax" else 1e-38)
        return torch.add(piece.base, merged, alpha=self.scale)

    def _scores(self, piece: Piece, facts: Mapping[str, Any]) -> Tensor:
        """How much each task's coordinate counts (n, k), before any is dropped."""
        if self.variant == "softmax":
            return _softmax_scores(piece.vectors, facts)
        unit = normalised(piece.vectors.abs(), facts["low"], facts["high"])
        n = len(unit)
        within = unit.square().mul_(n).exp_()
        if self.variant == "raw":
            return within.mul_(piece.vectors.mul(piece.vectors.sum(dim=0)).tanh_())
        unit.copysign_(piece.vectors)
        if self.variant == "vision":
            return within.mul_(piece.vectors.mul(unit.sum(dim=0)).tanh_())
        between = torch.zeros_like(unit)
        for i in range(n):
            between[i] += torch.tanh(unit[i] * unit[i])
            for j in range(i + 1, n):  # tanh(u_i u_j) is the same for both
                agreement = torch.tanh(unit[i] * unit[j])
                between[i] += agreement
                between[j] += agreement
        return within.mul_(between)


def _column(like: Tensor, numbers: Any) -> Tensor:
    return like.new_tensor(numbers)[:, None]


def _sizes(piece: Piece) -> Tensor:
    return piece.vectors.abs()


def normalised(rows: Tensor, low: Any, high: Any) -> Tensor:
    """Rows (n, k) clamped to their ends and spread over [0, 1]; 0 where the ends are one.

    Args:
        rows: overwritten.
        low: n numbers.
        high: n numbers, none below its ``low``.
    """
    least, most = _column(rows, low), _column(rows, high)
    span = most - least
    rows.clamp_(least, most).sub_(least)
    return rows.div_(span.masked_fill(span == 0, 1.0))


def _products(vectors: Tensor) -> Tensor:
    """Products of all pairs of tasks (n, n, k)."""
    return vectors[:, None] * vectors[None]


def _masses(pieces: Pieces) -> dict[str, Any]:
    """Ends of the products of all pairs, and the sums that a softmax over all D divides by."""
    low = high = None
    for piece in pieces:
        found = _products(piece.vectors).aminmax(dim=-1)
        low = found.min if low is None else torch.minimum(low, found.min)
        high = found.max if high is None else torch.maximum(high, found.max)
    assert low is not None
    assert high is not None
    n, span = len(low), (high - low)
    span = span.masked_fill(span == 0, 1.0)
    inner = torch.zeros(n, dtype=torch.float64)
    outer = torch.zeros((n, n), dtype=torch.float64)
    for piece in pieces:
        unit = (_products(piece.vectors) - low[..., None]) / span[..., None]
        inner += (n * unit.diagonal(dim1=0, dim2=1).T).exp().sum(dim=-1, dtype=torch.float64)
        outer += unit.exp().sum(dim=-1, dtype=torch.float64)
    return {
        "product_low": low.tolist(), "product_span": span.tolist(),
        "inner_mass": inner.tolist(), "outer_mass": outer.tolist(),
    }  # fmt: skip


def _softmax_scores(vectors: Tensor, facts: Any) -> Tensor:
    low, span = (vectors.new_tensor(facts[f"product_{end}"]) for end in ("low", "span"))
    unit = (_products(vectors) - low[..., None]) / span[..., None]
    n = len(vectors)
    within = (n * unit.diagonal(dim1=0, dim2=1).T).exp() / _column(vectors, facts["inner_mass"])
    mass = vectors.new_tensor(facts["outer_mass"])[..., None]
    return within * (unit.exp() / mass).sum(dim=1)
