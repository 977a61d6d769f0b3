r"""Models merged without looking at what they changed: means, task arithmetic and spherical means.

.. math::
    \theta = \frac{\sum_i w_i\theta_i}{\sum_i w_i}, \qquad
    \theta = \theta_P + \lambda \sum_i w_i (\theta_i - \theta_P), \qquad
    \theta = \frac{\sin((1-t)\omega)\,\theta_1 + \sin(t\omega)\,\theta_2}{\sin\omega},\quad
    \cos\omega = \frac{\langle\theta_1,\theta_2\rangle}{\|\theta_1\|\,\|\theta_2\|}

Sources: Wortsman et al., *Model soups*, arXiv 2203.05482; Ilharco et al., *Editing models with task
arithmetic*, arXiv 2212.04089; Shoemake, *Animating rotation with quaternion curves*, 1985.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from toolkit.core.declare.fields import Range, Share
from toolkit.core.declare.info import Info
from toolkit.core.states.rules import Piece, Pieces, Rule

STRAIGHT = 0.9995
"""Cosine above which two models lie so close that the straight line between them is taken."""


@dataclass(frozen=True)
class Average(Rule):
    """The weighted mean of the models; needs no base."""

    needs_base: ClassVar[bool] = False

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


@dataclass(frozen=True)
class TaskArithmetic(Rule):
    """The base plus the weighted sum of the task vectors.

    Args:
        scale: common factor. Source: arXiv 2212.04089, 0.3 for eight tasks.
    """

    scale: Annotated[float, Range(-10.0, 10.0)] = 0.3

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


@dataclass(frozen=True)
class Slerp(Rule):
    """Two models along the arc between them; needs no base. Norms are those of the models.

    Args:
        t: place on the arc, 0 for the first model. Source: mergekit, none is given.
        over: whether the angle is that of each tensor or of all together. Source: mergekit, tensor.
    """

    t: Share = 0.5
    over: Literal["tensor", "model"] = "tensor"

    needs_base: ClassVar[bool] = False
    models: ClassVar[int | None] = 2

    info: ClassVar[Info] = Info(
        slug="slerp",
        part="core",
        title="SLERP",
        arxiv="",
        year=1985,
        equation=r"\theta = \frac{\sin((1-t)\omega)\theta_1 + \sin(t\omega)\theta_2}{\sin\omega}",
        acts_on="all numbers of two models",
        count="0",
        inference="none",
        colour="#9C755F",
    )

    @property
    def scope(self) -> str:  # type: ignore[override]
        return self.over

    def survey(self, pieces: Pieces) -> dict[str, Any]:
        """The cosine between the models; parallel or zero models count as equal in direction."""
        inner, first, second = 0.0, 0.0, 0.0
        for piece in pieces:
            a, b = (model.double() for model in piece.models)
            inner += float(a @ b)
            first += float(a @ a)
            second += float(b @ b)
        norms = math.sqrt(first) * math.sqrt(second)
        return {"cosine": max(-1.0, min(1.0, inner / norms)) if norms else 1.0}

    def merged(self, piece: Piece) -> Tensor:
        cosine = piece.facts["cosine"]
        one, two = 1 - self.t, self.t
        if abs(cosine) <= STRAIGHT:
            angle = math.acos(cosine)
            one, two = math.sin(one * angle) / math.sin(angle), math.sin(two * angle) / math.sin(angle)
        return torch.add(piece.models[0] * one, piece.models[1], alpha=two)
