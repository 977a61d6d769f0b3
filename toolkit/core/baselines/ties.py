r"""TIES: trim, elect a sign, and take the mean of those that agree.

.. math::
    \gamma = \mathrm{sign}\sum_i w_i\, M_i\odot\tau_i, \qquad
    \theta = \theta_P + \lambda\,\frac{\sum_i w_i\, A_i \odot \tau_i}{\sum_i w_i\, A_i},\qquad
    A_i = M_i \,[\mathrm{sign}(w_i\tau_i) = \gamma]

Source: Yadav et al., *TIES-Merging*, arXiv 2306.01708.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from toolkit.core.declare.info import Info
from toolkit.core.states.rules import Piece
from toolkit.core.states.vectors import Trimming, elected, trimmed


@dataclass(frozen=True)
class TIES(Trimming):
    """Trim, elect a sign, and take the mean of those that agree."""

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

    def merged(self, piece: Piece) -> Tensor:
        assert piece.base is not None
        return torch.add(piece.base, elected(trimmed(piece), piece.weights), alpha=self.scale)
