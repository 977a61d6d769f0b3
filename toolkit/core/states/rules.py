"""What a rule of merging is, and the pieces of a model that it sees.

A rule states its equation for a piece: some numbers of one tensor, from the base and from every
model. What it must know of the whole tensor or the whole model it asks in a survey before.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from toolkit.core.declare.fields import Declared, hyperparameters
from toolkit.core.declare.info import Info


@dataclass
class Piece:
    """Numbers ``start`` to ``stop`` of a tensor, counted as it lies in memory, from n models.

    Attributes:
        name: of the tensor.
        shape: of the whole tensor.
        start: first number.
        base: the base's (k,), in the working dtype; None without a base.
        models: the models', n times (k,).
        weights: one per model.
        facts: what the rule's survey returned.
        generators: one per model, for this tensor; draws go on from piece to piece.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    base: Tensor | None
    models: list[Tensor]
    weights: tuple[float, ...]
    facts: Mapping[str, Any]
    generators: tuple[torch.Generator, ...] = ()

    def __len__(self) -> int:
        return len(self.models[0])

    @functools.cached_property
    def vectors(self) -> Tensor:
        """The task vectors: models less base (n, k)."""
        assert self.base is not None
        found = self.base.new_empty((len(self.models), len(self)))
        for row, model in zip(found, self.models, strict=True):
            torch.sub(model, self.base, out=row)
        return found

    def every(self, step: int) -> Piece:
        """Every so manieth number, from the first on."""
        base = None if self.base is None else self.base[::step]
        models = [model[::step] for model in self.models]
        return Piece(self.name, self.shape, self.start, base, models, self.weights, self.facts)


class Pieces(Protocol):
    """Pieces that can be gone through again and again."""

    @property
    def count(self) -> int:
        """Numbers per model."""

    @property
    def names(self) -> Sequence[str]:
        """The tensors they come from."""

    def __iter__(self) -> Iterator[Piece]: ...


class Rule(Declared):
    """How several models become one. A rule is a frozen dataclass that says :meth:`merged`.

    Attributes:
        scope: what :meth:`survey` sees at a time, the whole "model" or one "tensor".
        needs_base: whether there is no merging without a base.
        models: how many models it takes, or None for one or more.
        spreads: whether a number that is not finite in any model makes the result so as well.
    """

    if TYPE_CHECKING:
        info: ClassVar[Info]

    scope: ClassVar[str] = "model"
    needs_base: ClassVar[bool] = True
    models: ClassVar[int | None] = None
    spreads: ClassVar[bool] = False

    def settings(self) -> dict[str, Any]:
        """What a recipe notes of the rule: its hyperparameters, as plain JSON."""
        return {h.name: getattr(self, h.name) for h in hyperparameters(self)}

    @classmethod
    def restored(cls, settings: Mapping[str, Any]) -> Rule:
        """The rule whose :meth:`settings` a recipe noted."""
        return cls(**settings)

    def check(self, weights: Sequence[float]) -> None:
        """Refuse weights that make no sense for this rule; raises ValueError."""

    def survey(self, pieces: Pieces) -> dict[str, Any]:
        """What must be known before merging: plain numbers and lists of them, by name."""
        return {}

    def merged(self, piece: Piece) -> Tensor:
        """The merged numbers (k,) of a piece."""
        raise NotImplementedError
