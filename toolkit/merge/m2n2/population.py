"""The state of M2N2: archives of independent runs that step side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.merge.m2n2.niches import check_scores, kind_of, worst

Score = Callable[[Tensor], Tensor]
"""Parameters (R, D) -> what each model reaches on each example, (R, N)."""


class Draw(NamedTuple):
    """What is drawn for one child of each run; each (R,), ``noise`` (R, D).

    ``split`` None mixes whole parents with w; ``noise`` None leaves the child as it is.
    """

    first: Tensor
    second: Tensor
    w: Tensor
    split: Tensor | None = None
    noise: Tensor | None = None


@dataclass
class Population:
    """Archives and tables of scores of R runs.

    Attributes:
        archive: parameters (R, K, D), on any device, in any floating type; changed in place.
        scores: table (R, K, N), single precision where scores are truth values.
        reached: best score that any model of the run has reached on each example, (R, N): the
            capacity of an example.
        filled: whether a place holds a model yet, (R, K).
    """

    archive: Tensor
    scores: Tensor
    reached: Tensor
    filled: Tensor

    @classmethod
    def empty(cls, archive: Tensor, row: Tensor) -> Population:
        """Places for K models of each run, all free.

        Args:
            archive: storage (R, K, D), overwritten with zeros.
            row: scores (R, N) of any model, for their number and type.
        """
        archive.zero_()
        runs, places, _ = archive.shape
        scores = row.new_zeros((runs, places, row.shape[-1]), dtype=kind_of(row))
        filled = torch.zeros((runs, places), dtype=torch.bool, device=row.device)
        return cls(archive, scores, scores[:, 0].clone(), filled)

    @property
    def runs(self) -> int:
        """How many independent runs there are."""
        return self.archive.shape[0]

    def members(self, places: Tensor) -> Tensor:
        """The model at one place of each run, (R, D), copied."""
        return self.archive[torch.arange(self.runs), places.to(self.archive.device)]

    def insert(self, child: Tensor, row: Tensor, alpha: float = 1.0) -> Tensor:
        """Let a child join each archive and the least fit of K + 1 leave, all at once.

        Args:
            child: parameters (R, D); row: their scores (R, N).
            alpha: how strongly models compete.

        Returns:
            Where the child went, (R,): a place below K, or K where it was the least fit itself.

        Raises:
            ValueError: scores of another shape, outside [0, 1] or not finite; nothing is changed.
        """
        row = self.row(row)
        reached = torch.maximum(self.reached, row)
        place = worst(self.scores, row, alpha, reached)
        stays = (place < self.archive.shape[1]).nonzero()[:, 0]
        at = (stays, place[stays])
        self.scores[at], self.filled[at], self.reached = row[stays], True, reached
        there = self.archive.device
        moved = child[stays.to(child.device)].to(self.archive)
        self.archive[stays.to(there), at[1].to(there)] = moved
        return place

    def check(self, draw: Draw) -> None:
        """Raise ValueError unless a draw has one entry for each run, and parents there are."""
        for name, drawn in zip(Draw._fields, draw, strict=True):
            shape = (self.runs, self.archive.shape[2]) if name == "noise" else (self.runs,)
            if drawn is not None and drawn.shape != shape:
                raise ValueError(
                    f"draw.{name} has shape {tuple(drawn.shape)}: give one for each run, {shape}."
                )
        places = self.archive.shape[1]
        for name, drawn in (("first", draw.first), ("second", draw.second)):
            if not bool(((drawn >= 0) & (drawn < places)).all()):
                raise ValueError(
                    f"draw.{name} = {drawn.tolist()}: places go from 0 to K - 1 = {places - 1}."
                )

    def row(self, row: Tensor) -> Tensor:
        """Scores of one model of each run, checked, in the table's type and place."""
        wanted = (self.runs, self.scores.shape[-1])
        if row.shape != wanted:
            raise ValueError(
                f"score returned shape {tuple(row.shape)} for {self.runs} models: give {wanted}, "
                "a score for every model and example."
            )
        check_scores(row, "score")
        return row.to(self.scores)

    def accuracy(self) -> Tensor:
        """Mean score of each model, (R, K)."""
        return self.scores.mean(-1)

    def best(self) -> Tensor:
        """Parameters (R, D) of the model with the best mean score, of equals the first.

        Not of the best fitness: a rare specialist may be fit and poor.
        """
        return self.members(self.accuracy().argmax(-1))

    def coverage(self) -> Tensor:
        """Share of the examples that somebody in the archive solves, (R,)."""
        return self.scores.amax(-2).mean(-1)

    def disagreement(self) -> Tensor:
        """How far two models differ on an example, squared, mean over pairs and examples, (R,).

        With scores of 0 and 1 the share of examples that just one of two models solves. Free places
        are left out; 0 with fewer than two models.
        """
        count = self.filled.sum(-1).to(self.scores)
        spread = count * self.scores.square().sum((-2, -1)) - self.scores.sum(-2).square().sum(-1)
        pairs = count * (count - 1) / 2
        return spread / (pairs.clamp_min(1) * self.scores.shape[-1])


def started(
    parents: Tensor, score: Score, size: int, alpha: float = 1.0, archive: Tensor | None = None
) -> Population:
    """Archives with trained models in them, put there one by one as children are.

    Args:
        parents: the models of each run, (R, P, D).
        score: scores R models at once.
        size: places K of each archive.
        alpha: how strongly models compete.
        archive: storage (R, K, D) to use, such as a mapped file; left out, it is made beside the
            parents.

    Raises:
        ValueError: bad parents, storage or scores, or no parent of a run solves anything; nothing
            is changed.
    """
    if parents.dim() != 3 or not parents.is_floating_point() or not parents.numel():
        raise ValueError(
            f"parents has shape {tuple(parents.shape)} and type {parents.dtype}: give floating "
            "vectors (runs, parents, D)."
        )
    if not bool(parents.isfinite().all()) or not bool((parents != 0).any(-1).all()):
        raise ValueError("parents: a model is zero or not finite: leave it out, or train it.")
    wanted = (parents.shape[0], size, parents.shape[2])
    if archive is not None and (archive.shape != wanted or not archive.is_floating_point()):
        raise ValueError(
            f"archive has shape {tuple(archive.shape)} and type {archive.dtype}: give floating "
            f"storage {wanted}, which is (runs, size, D)."
        )
    rows = [score(parent) for parent in parents.unbind(1)]
    if rows[0].dim() != 2:
        raise ValueError(
            f"score returned shape {tuple(rows[0].shape)}: give (runs, examples), a score for "
            "every model and example."
        )
    scratch = Population.empty(parents.new_empty((wanted[0], 1, 1)), rows[0])
    rows = [scratch.row(row) for row in rows]
    if not bool(torch.stack(rows).amax((0, 2)).all()):
        raise ValueError(
            "score: no parent of a run is right on any example, so none can be chosen: start "
            "from models that solve something."
        )
    population = Population.empty(
        parents.new_empty(wanted) if archive is None else archive, rows[0]
    )
    for parent, row in zip(parents.unbind(1), rows, strict=True):
        population.insert(parent, row, alpha)
    return population


@dataclass(frozen=True)
class History:
    """What happened in R runs, at T moments.

    Attributes:
        evaluations: how many children had been scored, T numbers.
        best: best mean score in the archive, (R, T).
        coverage: share of the examples that somebody solves, (R, T).
        disagreement: how far two models differ on an example, (R, T).
        watched: what the caller's own function returned at each moment.
    """

    evaluations: list[int]
    best: Tensor
    coverage: Tensor
    disagreement: Tensor
    watched: list
