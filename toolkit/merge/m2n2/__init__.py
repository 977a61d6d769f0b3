r"""M2N2: models merged by evolution, with niches for specialists.

An archive of K models is filled with trained ones. At every step two parents make a child, whose
parameters before a random split point lean to one parent and behind it to the other; the child is
scored on every example, and of K + 1 models the least fit leaves. Fitness shares every example
among the models that solve it, so those that solve what others do not are kept:

.. math:: f_k = \sum_j c_j \frac{s_{kj}}{z_j^\alpha}, \qquad z_j = \sum_k s_{kj}, \qquad
    P(A = k) \propto f_k, \qquad
    P(B = k \mid A) \propto \sum_j c_j \frac{\max(s_{kj} - s_{Aj}, 0)}{z_j^\alpha}

Source: Abrantes, Lange, Tang, *Competition and Attraction Improve Model Fusion*, GECCO 2025, arXiv
2508.16204; official code ``SakanaAI/natural_niches``. Inferred: the capacity c of graded scores is
the best score that any model of the run has reached. What the code does otherwise:

* where no model beats A anywhere it divides 0 by 0; here the others are drawn by fitness;
* it steps one population after the other; here R populations step side by side, and their children
  are scored by one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from toolkit.core.declare.fields import Declared, Range
from toolkit.core.declare.info import Info
from toolkit.merge.m2n2.crossover import crossover, slerp
from toolkit.merge.m2n2.flat import correctness, flatten, unflatten
from toolkit.merge.m2n2.niches import attraction, choose, earned, fitness, gained, update, worths
from toolkit.merge.m2n2.population import Draw, History, Population, Score, started

__all__ = [
    "M2N2",
    "Draw",
    "History",
    "Population",
    "attraction",
    "correctness",
    "crossover",
    "fitness",
    "flatten",
    "slerp",
    "unflatten",
    "update",
]


@dataclass(frozen=True)
class M2N2(Declared):
    """How a population of models evolves.

    ``M2N2(alpha=0.0, attraction=False)`` is the plain genetic algorithm of the paper.

    Args:
        size: models K in the archive. Source: official code, 20.
        alpha: how strongly models that solve the same example compete; 0 counts plain successes.
            Source: official code, 1.
        attraction: whether the second parent is drawn by what it does better than the first,
            rather than by fitness, when both may be the same. Source: paper and code.
        split: whether the mixing ratio turns at a random split point. Source: paper and code.
        mutation: standard deviation of the noise on each child. Source: official code, none for
            trained models and 0.01 from scratch.
        angle: one angle between whole parents, or one for each side of the split. Source: official
            code, full; the paper's text has a segment's own.

    Raises:
        TypeError, ValueError: a hyperparameter of the wrong type or outside its range.
    """

    size: Annotated[int, Range(2, 100_000, log=True)] = 20
    alpha: Annotated[float, Range(0.0, 10.0)] = 1.0
    attraction: bool = True
    split: bool = True
    mutation: Annotated[float, Range(0.0, 10.0)] = 0.0
    angle: Literal["full", "segment"] = "full"

    info: ClassVar[Info] = Info(
        slug="m2n2",
        part="merge",
        title="M2N2",
        arxiv="2508.16204",
        year=2025,
        code="SakanaAI/natural_niches",
        equation=r"f_k = \sum_j c_j\, s_{kj} / z_j^{\alpha}",
        acts_on="whole parameter vectors, mixed in pairs without gradients",
        count="0",
        inference="none",
        colour="#AA4499",
        zero_init=False,
    )

    def start(self, parents: Tensor, score: Score, archive: Tensor | None = None) -> Population:
        """Archives with the parents in them; see :func:`~toolkit.merge.m2n2.population.started`."""
        return started(parents, score, self.size, self.alpha, archive)

    def draw(self, population: Population, generators: Sequence[torch.Generator]) -> Draw:
        """Parents, ratio, split point and noise of the next child of each run.

        Every run draws from its own generator, so it goes the same way whatever runs beside it.

        Args:
            population: the archives now.
            generators: one for each run, on the CPU.
        """
        uniform = torch.stack(
            [torch.rand(4, generator=own, dtype=torch.float64) for own in generators]
        )
        table = population.scores.double()
        one, two, w, place = uniform.to(table.device).unbind(-1)
        worth = worths(table, self.alpha, population.reached.double())
        fit = earned(table, worth)
        first = choose(fit, one)
        weights = fit
        if self.attraction:
            weights = gained(table, worth, first)
            # nobody beats A: the others by fitness, and A itself where the others have none
            others = fit.scatter(-1, first[:, None], 0.0)
            others = torch.where(others.sum(-1, keepdim=True) > 0, others, fit)
            weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, others)
        length = population.archive.shape[-1]
        split = (place * length).long() if self.split else None
        return Draw(first, choose(weights, two), w, split, self._noise(population, generators))

    def _noise(self, population: Population, generators: Sequence[torch.Generator]) -> Any:
        if not self.mutation:
            return None
        length = population.archive.shape[-1]
        drawn = torch.stack([torch.randn(length, generator=own) for own in generators])
        return self.mutation * drawn

    def step(self, population: Population, score: Score, draw: Draw) -> Tensor:
        """Make the children of a draw, score them, and let the least fit leave.

        Args:
            population: the archives, changed in place.
            score: scores R models at once.
            draw: from :meth:`draw`, or given.

        Returns:
            Where the children went, (R,): a place, or K where they are lost.

        Raises:
            ValueError: the draw or the scores do not fit; nothing is changed.
        """
        population.check(draw)
        there = population.archive.device
        a, b = population.members(draw.first), population.members(draw.second)
        split = None if draw.split is None else draw.split.to(there)
        child = crossover(a, b, draw.w.to(there), split, self.angle)
        if draw.noise is not None:
            child = child + draw.noise.to(child)
        return population.insert(child, score(child), self.alpha)

    def evolve(
        self,
        parents: Tensor,
        score: Score,
        evaluations: int,
        generators: torch.Generator | Sequence[torch.Generator],
        *,
        every: int = 1,
        watch: Callable[[Population], Any] | None = None,
        archive: Tensor | None = None,
    ) -> tuple[Population, History]:
        """Evolve R populations side by side; each child costs its run one evaluation.

        Args:
            parents: trained models (P, D) that all runs start from, or (R, P, D); see
                :func:`~toolkit.merge.m2n2.flat.flatten`.
            score: called with parameters (R, D), one child of each run; returns what each reaches
                on each example, (R, N), as truth values or numbers in [0, 1].
            evaluations: children of each run.
            generators: one for each run, or one for a single run.
            every: evaluations between two moments of the history.
            watch: called with the population at each moment; what it returns is kept.
            archive: as for :meth:`start`.

        Returns:
            The population at the end, and its history from before the first child on.

        Raises:
            ValueError: bad parents, scores, numbers or generators, before anything is changed.
        """
        own = [generators] if isinstance(generators, torch.Generator) else list(generators)
        if not isinstance(parents, Tensor):
            raise ValueError("parents is no tensor: flatten(models) makes one of networks.")
        if parents.dim() == 2:
            parents = parents.expand(len(own), *parents.shape)
        if not own or len(own) != len(parents):
            raise ValueError(
                f"generators: {len(own)} for {len(parents)} runs: give one generator for each run."
            )
        if evaluations < 0 or every < 1:
            raise ValueError(
                f"evaluations = {evaluations}, every = {every}: give 0 or more, and 1 or more."
            )
        population = self.start(parents, score, archive)
        moments, seen, watched = [], [], []
        for done in range(evaluations + 1):
            if done:
                self.step(population, score, self.draw(population, own))
            if done % every == 0 or done == evaluations:
                moments.append(done)
                now = population.accuracy().amax(-1), population.coverage()
                seen.append(torch.stack([*now, population.disagreement()]).cpu())
                watched.append(None if watch is None else watch(population))
        best, coverage, disagreement = torch.stack(seen, -1)
        return population, History(moments, best, coverage, disagreement, watched)
