r"""Keep what matters most instead of what the lot picks: sizes of differences times their inputs.

.. math:: W' = W_P + M \odot \Delta, \qquad
    M_{ij} = 1 \text{ where } |\Delta_{ij}|\,\lVert x_j\rVert \text{ is among the largest}

Nothing is divided. With no inputs given this is magnitude pruning. Its mask must be stored.

Source: Deng et al., arXiv 2410.09344, which takes the score of Sun et al., *A simple and effective
pruning approach for large language models*, arXiv 2306.11695.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from toolkit.core.declare.fields import Share
from toolkit.core.declare.info import Info
from toolkit.core.states.rules import Piece, Pieces, Rule


@dataclass(frozen=True)
class Wanda(Rule):
    """The most important differences of each matrix; vectors are kept whole.

    Args:
        drop: share that is dropped. Source: arXiv 2410.09344, 0.99.
        over: whether differences compete within a row or within their tensor. Source: arXiv
            2306.11695, row.
    """

    drop: Share = 0.99
    over: Literal["row", "tensor"] = "row"

    scope: ClassVar[str] = "tensor"
    sizes: ClassVar[Mapping[str, Tensor]] = MappingProxyType({})
    """Weight name -> size of each input; see :meth:`with_inputs`."""

    info: ClassVar[Info] = Info(
        slug="wanda",
        part="merge",
        title="Importance",
        arxiv="2306.11695",
        year=2023,
        code="locuslab/wanda",
        equation=r"W' = W_P + M \odot \Delta",
        acts_on="the most important part of what fine-tuning changed",
        count="0",
        inference="none",
        colour="#C2A5CF",
    )

    def with_inputs(self, sizes: Mapping[str, Tensor]) -> Wanda:
        """The same with the size (n,) of each input of a weight (m, n); others count as 1."""
        new = copy.copy(self)
        object.__setattr__(new, "sizes", MappingProxyType(dict(sizes)))
        return new

    def settings(self) -> dict[str, Any]:
        return super().settings() | ({"inputs": "given"} if self.sizes else {})

    @classmethod
    def restored(cls, settings: Mapping[str, Any]) -> Wanda:
        """The rule that :meth:`settings` noted.

        Raises:
            ValueError: sizes of inputs were given, and are not in the recipe.
        """
        if settings.get("inputs"):
            raise ValueError("sizes of inputs are not noted: measure them, and use with_inputs")
        return cls(**settings)

    def survey(self, pieces: Pieces) -> dict[str, Any]:
        """The score from which on a model's differences are kept, of each row or of the tensor."""
        found = [(self.scores(piece), piece.shape) for piece in pieces]
        scores, shape = torch.cat([one for one, _ in found], dim=1), found[0][1]
        if len(shape) < 2:
            return {}
        rows = shape[0] if self.over == "row" else 1
        scores = scores.view(len(scores), rows, -1)
        count = scores.shape[-1]
        gone = min(int(count * self.drop), count)
        if gone == count:
            return {"least": [[float("inf")] * rows] * len(scores)}
        return {"least": scores.kthvalue(gone + 1, dim=-1).values.tolist()}

    def scores(self, piece: Piece) -> Tensor:
        """Importance (n, k) of the numbers of a piece.

        Raises:
            ValueError: sizes that do not fit the weight.
        """
        found, sizes = piece.vectors.abs(), self.sizes.get(piece.name)
        if sizes is None:
            return found
        if len(piece.shape) < 2 or tuple(sizes.shape) != (piece.shape[1],):
            raise ValueError(
                f"sizes of {piece.name!r} have shape {tuple(sizes.shape)}, the weight has "
                f"{piece.shape}: give one size per input"
            )
        each = torch.Size(piece.shape[2:]).numel()
        column = torch.arange(piece.start, piece.start + len(piece)) // each % piece.shape[1]
        return found.mul_(sizes.to(found)[column])

    def merged(self, piece: Piece) -> Tensor:
        assert piece.base is not None
        if len(piece.shape) < 2:
            if len(piece.models) == 1 and piece.weights == (1.0,):
                return piece.models[0]
            kept = piece.vectors
        else:
            least = piece.vectors.new_tensor(piece.facts["least"])
            per_row = torch.Size(piece.shape).numel() // least.shape[1]
            row = torch.arange(piece.start, piece.start + len(piece)) // per_row
            mask = self.scores(piece) >= least[:, row]
            if len(piece.models) == 1 and piece.weights == (1.0,):
                return torch.where(mask[0], piece.models[0], piece.base)
            kept = piece.vectors * mask
        return torch.add(piece.base, kept.new_tensor(piece.weights) @ kept)
