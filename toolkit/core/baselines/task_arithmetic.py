r"""The base plus the sum of what several tasks changed.

.. math:: \theta = \theta_P + \lambda \sum_i w_i (\theta_i - \theta_P)

Source: Ilharco et al., *Editing models with task arithmetic*, arXiv 2212.04089.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from toolkit.core.declare.fields import Range
from toolkit.core.declare.info import Info
from toolkit.core.states.rules import Piece, Rule


@dataclass(frozen=True)
class TaskArithmetic(Rule):
    """The base plus the weighted sum of the task vectors.

    Args:
        scale: common factor. Source: arXiv 2212.04089, 0.3 for eight tasks.
    """

    scale: Annotated[float, Range(-10.0, 10.0)] = 0.3

    spreads: ClassVar[bool] = True

    info: ClassVar[Info] = Info(
        slug="task_arithmetic",
        part="core",
        title="Task arithmetic",
        arxiv="2212.04089",
        year=2022,
        code="mlfoundations/task_vectors",
        equation=r"\theta = \theta_P + \lambda \sum_i w_i \tau_i",
        acts_on="all numbers of several models",
        count="0",
        inference="none",
        colour="#B07AA1",
    )

    def merged(self, piece: Piece) -> Tensor:
        assert piece.base is not None
        # the sum of the models first: no task vector is formed
        found = piece.base * (1 - self.scale * math.fsum(piece.weights))
        for model, weight in zip(piece.models, piece.weights, strict=True):
            found.add_(model, alpha=self.scale * weight)
        return found
