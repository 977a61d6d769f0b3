r"""DARE: drop numbers of each task vector by chance and scale up the rest.

.. math:: \theta = \theta_P + \lambda \sum_i w_i \frac{M_i \odot (\theta_i - \theta_P)}{1-p}

Source: Yu et al., *Language models are super Mario*, arXiv 2311.03099.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from toolkit.core.declare.fields import BelowOne
from toolkit.core.declare.info import Info
from toolkit.core.states.rules import Piece, Rule
from toolkit.core.states.vectors import Scale, dropped, elected, weighted


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
