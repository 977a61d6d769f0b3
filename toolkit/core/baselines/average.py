r"""The mean of several models.

.. math:: \theta = \frac{\sum_i w_i\theta_i}{\sum_i w_i}

Source: Wortsman et al., *Model soups*, arXiv 2203.05482.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from toolkit.core.declare.info import Info
from toolkit.core.states.rules import Piece, Rule


@dataclass(frozen=True)
class Average(Rule):
    """The weighted mean of the models; needs no base."""

    needs_base: ClassVar[bool] = False
    spreads: ClassVar[bool] = True

    info: ClassVar[Info] = Info(
        slug="average",
        part="core",
        title="Average",
        arxiv="2203.05482",
        year=2022,
        code="mlfoundations/model-soups",
        equation=r"\theta = \sum_i w_i \theta_i \,/ \sum_i w_i",
        acts_on="all numbers of several models",
        count="0",
        inference="none",
        colour="#8A8A8A",
    )

    def check(self, weights: Sequence[float]) -> None:
        if not math.fsum(weights):
            raise ValueError(f"weights={list(weights)} add up to 0, so there is no mean")

    def merged(self, piece: Piece) -> Tensor:
        total = math.fsum(piece.weights)
        found = piece.models[0] * (piece.weights[0] / total)
        for model, weight in zip(piece.models[1:], piece.weights[1:], strict=True):
            found.add_(model, alpha=weight / total)
        return found
