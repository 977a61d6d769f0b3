r"""Task vectors of which only a part is kept: by size (magnitude, TIES) or by chance (DARE).

.. math::
    \theta = \theta_P + \lambda \sum_i w_i\, M_i \odot \tau_i \;(\text{magnitude}), \qquad
    \theta = \theta_P + \lambda \sum_i w_i \frac{M_i \odot \tau_i}{1-p} \;(\text{DARE}),

and TIES: :math:`\gamma = \mathrm{sign}\sum_i w_i M_i\odot\tau_i`, then in every coordinate the mean
of those that agree with :math:`\gamma`.

Sources: Yadav et al., *TIES-Merging*, arXiv 2306.01708; Yu et al., *Language models are super
Mario*, arXiv 2311.03099.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from toolkit.core.declare.fields import BelowOne, Range
from toolkit.core.declare.info import Info
from toolkit.core.states.orders import order_statistics
from toolkit.core.states.rules import Piece, Pieces, Rule

Density = Annotated[float, Range(0.0, 1.0, log=True, open_low=True)]
"""The share of numbers that is kept."""
Scale = Annotated[float, Range(-10.0, 10.0)]
"""Factor of the merged task vector."""


@dataclass(frozen=True)
class Magnitude(Rule):
    """The largest numbers of each task vector, added up.

    Args:
        density: share of numbers that each model keeps. Source: arXiv 2306.01708, 0.2.
        scale: common factor. Source: arXiv 2212.04089, 0.3 for eight tasks; 1 for one.
        over: whether numbers compete within a tensor or within the model. Source: arXiv
            2306.01708, model.
    """

    density: Density = 0.2
    scale: Scale = 1.0
    over: Literal["model", "tensor"] = "model"

    info: ClassVar[Info] = Info(
        slug="magnitude",
        part="core",
        title="Magnitude",
        arxiv="2306.01708",
        year=2023,
        equation=r"\theta = \theta_P + \lambda \sum_i w_i\, M_i \odot \tau_i",
        acts_on="the largest numbers of each task vector",
        count="0",
        inference="none",
        colour="#76B7B2",
    )

    @property
    def scope(self) -> str:  # type: ignore[override]
        return self.over

    def survey(self, pieces: Pieces) -> dict[str, Any]:
        return thresholds(pieces, self.density)

    def merged(self, piece: Piece) -> Tensor:
        kept = trimmed(piece)
        assert piece.base is not None
        return torch.add(piece.base, weighted(kept, piece.weights), alpha=self.scale)


@dataclass(frozen=True)
class TIES(Rule):
    """Trim, elect a sign, and take the mean of those that agree.

    Args:
        density: share of numbers that each model keeps. Source: arXiv 2306.01708, 0.2.
        scale: factor of the merged task vector. Source: arXiv 2306.01708, 1.
        over: whether numbers compete within a tensor or within the model. Source: arXiv
            2306.01708, model.
    """

    density: Density = 0.2
    scale: Scale = 1.0
    over: Literal["model", "tensor"] = "model"

    info: ClassVar[Info] = Info(
        slug="ties",
        part="core",
        title="TIES",
        arxiv="2306.01708",
        year=2023,
        code="prateeky2806/ties-merging",
        equation=r"\theta = \theta_P + \lambda\,\mathrm{mean}\{\tau_{i}: \mathrm{sign}\,\tau_i = \gamma\}",
        acts_on="the largest numbers of each task vector",
        count="0",
        inference="none",
        colour="#4E79A7",
    )

    @property
    def scope(self) -> str:  # type: ignore[override]
        return self.over

    def survey(self, pieces: Pieces) -> dict[str, Any]:
        return thresholds(pieces, self.density)

    def merged(self, piece: Piece) -> Tensor:
        assert piece.base is not None
        return torch.add(piece.base, elected(trimmed(piece), piece.weights), alpha=self.scale)


@dataclass(frozen=True)
class DARE(Rule):
    """Drop numbers of each task vector by chance and scale up the rest.

    Args:
        drop: probability p to drop a number. Source: arXiv 2311.03099, 0.9.
        scale: common factor. Source: arXiv 2311.03099, 1.
        elect: whether signs are elected as in TIES. Source: arXiv 2311.03099, both are used.
    """

    drop: BelowOne = 0.9
    scale: Scale = 1.0
    elect: bool = False

    info: ClassVar[Info] = Info(
        slug="dare",
        part="core",
        title="DARE",
        arxiv="2311.03099",
        year=2023,
        code="yule-BUAA/MergeLM",
        equation=r"\theta = \theta_P + \lambda \sum_i w_i \frac{M_i \odot \tau_i}{1-p}",
        acts_on="a random part of each task vector",
        count="0",
        inference="none",
        colour="#F28E2B",
    )

    def merged(self, piece: Piece) -> Tensor:
        assert piece.base is not None
        kept = dropped(piece, self.drop, 1 - self.drop)
        join = elected if self.elect else weighted
        return torch.add(piece.base, join(kept, piece.weights), alpha=self.scale)


def thresholds(pieces: Pieces, density: float) -> dict[str, Any]:
    """The size from which on numbers are kept, per model."""
    keep = max(1, int(density * pieces.count))
    found = order_statistics(pieces, lambda piece: piece.vectors.abs(), [pieces.count - keep])
    return {"threshold": found[:, 0].tolist()}


def trimmed(piece: Piece) -> Tensor:
    """Task vectors (n, k) without what lies below the threshold."""
    least = piece.vectors.new_tensor(piece.facts["threshold"])[:, None]
    # not `hardshrink`, which drops what lies at the threshold
    return piece.vectors.masked_fill_(piece.vectors.abs() < least, 0.0)


def dropped(piece: Piece, drop: float, keep: float) -> Tensor:
    """Task vectors (n, k) with numbers dropped by chance and the rest divided by ``keep``."""
    found = piece.vectors
    for row, draws in zip(found, piece.generators, strict=True):
        row.masked_fill_(random_mask(len(piece), drop, draws).logical_not_(), 0.0)
    return found.mul_(1 / keep)


def random_mask(count: int, drop: float, generator: torch.Generator) -> Tensor:
    """Which numbers stay (count,), each with probability 1 - drop; bool."""
    return torch.rand(count, generator=generator) >= drop


def weighted(vectors: Tensor, weights: tuple[float, ...]) -> Tensor:
    """The weighted sum (k,) of task vectors (n, k)."""
    return vectors.new_tensor(weights) @ vectors


def elected(vectors: Tensor, weights: tuple[float, ...]) -> Tensor:
    """In every coordinate the weighted mean of those whose sign is that of the weighted sum.

    Args:
        vectors: (n, k), overwritten.
        weights: one per model.

    Returns:
        (k,); 0 where nothing is left.
    """
    strength = vectors.new_tensor(weights)
    sign = torch.where(strength @ vectors >= 0, 1.0, -1.0)
    turned = vectors.mul_(strength[:, None]).mul_(sign)  # what agrees is positive now
    agree = turned > 0
    mass = strength @ agree.to(vectors.dtype)
    mean = turned.clamp_(min=0).sum(dim=0) / mass.masked_fill_(mass.abs() < 1e-8, 1.0)
    return mean.mul_(sign)
