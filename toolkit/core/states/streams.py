"""Tensors of several models in pieces, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from toolkit.core.seeds import generator
from toolkit.core.states.rules import Piece
from toolkit.core.states.stored import Stored

PIECE = 1 << 19
"""Numbers of a piece: small enough for a processor's cache, large enough to be worth a call."""


@dataclass
class Stream:
    """The pieces of some tensors, as :class:`~toolkit.core.states.rules.Pieces`.

    Args:
        base: where the base's tensors are, or None.
        models: where the models' are.
        names: the tensors.
        weights: one per model.
        seed: of the random masks; each tensor of each model has a stream of its own.
        facts: what the survey found.
        checked: tensors whose numbers are known to be finite; others are looked at once.
    """

    base: Stored | None
    models: Sequence[Stored]
    names: Sequence[str]
    weights: tuple[float, ...]
    seed: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    checked: set[str] = field(default_factory=set)

    @property
    def count(self) -> int:
        return sum(self.models[0].facts[name].count for name in self.names)

    def __iter__(self) -> Iterator[Piece]:
        for name in self.names:
            yield from self.pieces(name)

    def pieces(self, name: str) -> Iterator[Piece]:
        """Those of one tensor, in order.

        Raises:
            ValueError: a number that is not finite.
        """
        sources = [*self.models] if self.base is None else [self.base, *self.models]
        shape = self.models[0].facts[name].shape
        whole = [source.read(name).reshape(-1) for source in sources]
        draws = tuple(generator(self.seed, "merge", name, i) for i in range(len(self.models)))
        dtype = working(whole[0].dtype)
        for start in range(0, max(1, len(whole[0])), PIECE):
            parts = [one[start : start + PIECE].cpu().to(dtype) for one in whole]
            if name not in self.checked:
                refuse_infinite(name, sources, parts)
            base = None if self.base is None else parts[0]
            models = parts if self.base is None else parts[1:]
            yield Piece(name, shape, start, base, models, self.weights, self.facts, draws)
        self.checked.add(name)

    def culprit(self, piece: Piece) -> None:
        """Raise ValueError if it is the numbers of a model that are not finite."""
        parts = piece.models if piece.base is None else [piece.base, *piece.models]
        refuse_infinite(piece.name, [*([self.base] if self.base else []), *self.models], parts)


def working(dtype: torch.dtype) -> torch.dtype:
    """The dtype that numbers are merged in: at least 32 bits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def refuse_infinite(name: str, sources: Sequence[Stored], parts: Sequence[Tensor]) -> None:
    """Raise ValueError for numbers that are not finite, with their model and tensor."""
    for source, part in zip(sources, parts, strict=True):
        if not finite(part):
            raise ValueError(f"{source.label}: tensor {name!r} holds numbers that are not finite")


def finite(numbers: Tensor) -> bool:
    # a sum is the quickest look; finite numbers whose sum is not are looked at one by one
    return bool(numbers.sum().isfinite()) or bool(numbers.isfinite().all())
