r"""TIES: trim, elect a sign, and take the mean of those that agree.

.. math::
    \gamma = \mathrm{sign}\sum_i w_i\, M_i\odot\tau_i, \qquad
    \theta = \theta_P + \lambda\,\frac{\sum_i w_i\, A_i \odot \tau_i}{\sum_i w_i\, A_i},\qquad
    A_i = M_i \,[\mathrm{sign}(w_i\tau_i) = \gamma]

Source: Yadav et al., *TIES-Merging*, arXiv 2306.01708.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from toolkit.core.declare.info import Info
from toolkit.core.states.rules import Piece, Pieces, Rule
from toolkit.core.states.vectors import Density, Scale, elected, thresholds, trimmed


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
        equation=r"\theta = \theta_P + \lambda \sum_i w_i A_i \odot \tau_i \,/ \sum_i w_i A_i",
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
