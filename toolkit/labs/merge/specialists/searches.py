"""Searches that keep the best child they have seen; what boundaries they may set differs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit.core.seeds import generator
from toolkit.labs.merge.specialists.bed import STD
from toolkit.merge.m2n2 import crossover, slerp

BLOCKS = 48
"""Stretches of the parameter vector for which is told whose they are."""

Children = Generator[Tensor, Tensor, None]
"""Gives children (R, D), and is sent what share of the training images each of them knows (R,)."""


def ratios(both: Tensor, seeds: Sequence[int], evaluations: int, width: int) -> Children:
    """Evenly spaced ratios of the two, in random order."""
    a, b = both.unbind(1)
    steps = torch.linspace(0, 1, evaluations, dtype=torch.float64)
    order = torch.stack(
        [torch.randperm(evaluations, generator=generator(seed, "order")) for seed in seeds], 1
    )
    for t in steps[order]:
        yield slerp(a, b, t[:, None])


def once(both: Tensor, seeds: Sequence[int], evaluations: int, width: int) -> Children:
    """Random ratios and split points of the two: children without grandchildren."""
    a, b = both.unbind(1)
    draws = torch.stack([
        torch.rand(evaluations, 2, generator=generator(seed, "once"), dtype=torch.float64)
        for seed in seeds
    ], 1)  # fmt: skip
    for w, place in (row.unbind(-1) for row in draws):
        yield crossover(a, b, w, (place * a.shape[1]).long())


def layers(both: Tensor, seeds: Sequence[int], evaluations: int, width: int) -> Children:
    """A ratio for each of the four tensors, adapted by CMA-ES: groups that are fixed beforehand."""
    from cmaes import CMA

    a, b = both.unbind(1)
    pixels = (a.shape[1] - width - width * 10 - 10) // width
    sizes = torch.tensor([pixels * width, width, width * 10, 10])
    bounds = np.array([[0.0, 1.0]] * 4)
    solvers = [CMA(mean=np.full(4, 0.5), sigma=0.25, bounds=bounds, seed=seed) for seed in seeds]

    def child(asked: Any) -> Tensor:
        return slerp(a, b, torch.from_numpy(asked).repeat_interleave(sizes, 1))

    yield from _generations(solvers, child)


def evolution(starts: Tensor, seeds: Sequence[int], places: int) -> Children:
    """CMA-ES with a diagonal covariance, from the first start of each seed."""
    from cmaes import SepCMA

    solvers = [
        SepCMA(mean=start.double().numpy(), sigma=STD, population_size=places, seed=seed)
        for start, seed in zip(starts[:, 0], seeds, strict=True)
    ]
    yield from _generations(solvers, lambda asked: torch.from_numpy(asked).float())


def _generations(solvers: Sequence[Any], child: Callable[[Any], Tensor]) -> Children:
    """Generation after generation of solvers of the package cmaes, one for each run."""
    while True:
        asked = [np.stack([s.ask() for s in solvers]) for _ in range(solvers[0].population_size)]
        known = []
        for one in asked:
            known.append((yield child(one)))
        for r, solver in enumerate(solvers):
            solver.tell([(x[r], -float(k[r])) for x, k in zip(asked, known, strict=True)])


def searched(
    children: Children, score: Any, judge: Any, evaluations: int, every: int
) -> dict[str, Any]:
    """The record of a search that keeps the best child it has seen."""
    best, known = torch.empty(0), torch.empty(0)
    moments, rising, curve = [], [], []
    child = next(children)
    for done in range(1, evaluations + 1):
        reached = score(child).float().mean(1)
        if done == 1:
            best, known = child.clone(), reached
        better = reached > known
        best[better], known = child[better], torch.maximum(known, reached)
        if done % every == 0 or done == evaluations:
            moments.append(done)
            rising.append(100 * known)
            curve.append(judge(best))
        if done < evaluations:
            child = children.send(reached)
    return record(moments, torch.stack(rising, 1), torch.stack(curve, 1))


def record(moments: list[int], rising: Tensor, curve: Tensor) -> dict[str, Any]:
    """Moments, and accuracies (R, T) on training and test images, as a job returns them."""
    return {
        "moments": moments, "test": plain(curve[:, -1]), "train": plain(rising[:, -1]),
        "curve": plain(curve), "rising": plain(rising),
    }  # fmt: skip


def whose(children: Tensor, both: Tensor) -> Tensor:
    """Share of the second specialist in :data:`BLOCKS` stretches of each child, (R, BLOCKS).

    By least squares: in a stretch without a boundary the child is a sum of both with two weights.
    """
    wide = children.shape[-1] // BLOCKS * BLOCKS
    a, b, c = (
        v[:, :wide].reshape(len(v), BLOCKS, -1).double() for v in (both[:, 0], both[:, 1], children)
    )
    found = torch.linalg.lstsq(torch.stack([a, b], -1), c[..., None]).solution[..., 0]
    parts = found.clamp(min=0)
    return parts[..., 1] / parts.sum(-1).clamp_min(1e-12)


def plain(values: Tensor) -> Any:
    """A number or lists of numbers, with four decimals."""
    return values.double().round(decimals=4).tolist()
