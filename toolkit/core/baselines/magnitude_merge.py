r"""The largest numbers of each task vector.

.. math:: \theta = \theta_P + \lambda \sum_i w_i\, M_i \odot (\theta_i - \theta_P)

Source: the trimming of Yadav et al., *TIES-Merging*, arXiv 2306.01708.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from toolkit.core.declare.info import Info
from toolkit.core.states.rules import Piece
from toolkit.core.states.vectors import Trimming, trimmed, weighted


@dataclass(frozen=True)
class Magnitude(Trimming):
    """The largest numbers of each task vector, added up.

    Args:
        scale: common factor. Source: arXiv 2212.04089, 0.3 for eight tasks; 1 for one.
    """

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

    def merged(self, piece: Piece) -> Tensor:
        kept = trimmed(piece)
        assert piece.base is not None
        return torch.add(piece.base, weighted(kept, piece.weights), alpha=self.scale)
