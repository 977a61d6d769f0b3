r"""Two models along the arc between them.

.. math::
    \theta = \frac{\sin((1-t)\omega)\,\theta_1 + \sin(t\omega)\,\theta_2}{\sin\omega},\qquad
    \cos\omega = \frac{\langle\theta_1,\theta_2\rangle}{\|\theta_1\|\,\|\theta_2\|}

Source: Shoemake, *Animating rotation with quaternion curves*, 1985.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from toolkit.core.declare.fields import Share
from toolkit.core.declare.info import Info
from toolkit.core.states.rules import Piece, Pieces, Rule

STRAIGHT = 0.9995
"""Cosine above which two models lie so close that the straight line between them is taken."""


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
    spreads: ClassVar[bool] = True
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
            one, two = (
                math.sin(one * angle) / math.sin(angle),
                math.sin(two * angle) / math.sin(angle),
            )
        return torch.add(piece.models[0] * one, piece.models[1], alpha=two)
