r"""The largest numbers of each task vector.

.. math:: \theta = \theta_P + \lambda \sum_i w_i\, M_i \odot (\theta_i - \theta_P)

Source: the trimming of Yadav et al., *TIES-Merging*, arXiv 2306.01708.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from toolkit.core.declare.info import Info
from toolkit.core.states.rules import Piece, Pieces, Rule
from toolkit.core.states.vectors import Density, Scale, thresholds, trimmed, weighted


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
        slug="magnitude_merge",
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
