"""What is compared: solvers at equal calls, ratios searched, static and predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from toolkit.core.sample.loop import combined, sample
from toolkit.core.sample.plans import DPMpp2M, Heun, Plan, UniPC
from toolkit.generate.dc_solver import DCSolver, Searched, reference_states
from toolkit.labs.generate.compensation.worlds import World

OURS = DCSolver()
"""Order 2, bh2, K = 2: the published setting for guided sampling."""
THIRD = DCSolver(order=3, variant="bh1")
"""The published setting without labels."""
ALONE = DCSolver(solver="dpmpp_2m")
"""A predictor alone, compensated."""
RIVALS: dict[str, Plan] = {
    "unipc": UniPC(2), "unipc 3": UniPC(3, "bh1"), "predictor": UniPC(2, corrector=False),
    "dpmpp": DPMpp2M(), "static 1.1": OURS.given([1.1]),
}  # fmt: skip
STATIC = tuple(round(0.5 + 0.05 * n, 2) for n in range(31))
"""Static ratios that are tried on the noises of the search."""
FINE = 200
"""Steps, about, of the reference of a search."""


def searched(
    world: World, plan: DCSolver, calls: int, guidance: float, count: int, fine: int = FINE,
    **options: Any,
) -> Searched:  # fmt: skip
    """Ratios from so many noises of the world's own stream for searches."""
    x, labels = world.noise(count, "search")
    network, schedule = world.network(labels, guidance), world.schedule(calls)
    parts = max(1, round(fine / calls))
    goal = reference_states(network, schedule, x, world.law, parts, DPMpp2M())
    return plan.search(network, schedule, x, goal, **options)


def best_static(
    world: World, plan: DCSolver, calls: int, guidance: float, count: int,
    grid: Sequence[float] = STATIC,
) -> float:  # fmt: skip
    """The one ratio for all steps that ends nearest to the fine run, on the search's noises."""
    x, labels = world.noise(count, "search")
    goal = world.truth(x, labels, guidance)
    off = [distance(world.run(plan.given([r]), calls, x, labels, guidance), goal) for r in grid]
    return grid[off.index(min(off))]


def distance(x: Tensor, goal: Tensor) -> float:
    """The mean squared distance, per number."""
    return float((x - goal).double().square().mean())


def along(
    world: World, ratios: Sequence[float], calls: int, guidance: float, number: int,
    tried: Sequence[float], x: Tensor, labels: Tensor, goal: Tensor,
) -> list[float]:  # fmt: skip
    """Distances of the samples while the ratio of one step moves and the others stay."""
    found = []
    for ratio in tried:
        moved = [*ratios[:number], ratio, *ratios[number + 1 :]]
        found.append(distance(world.run(OURS.given(moved), calls, x, labels, guidance), goal))
    return found


def heun(world: World, calls: int, x: Tensor, labels: Tensor, guidance: float) -> Tensor:
    """Heun at an even number of calls: half as many steps."""
    made = sample(world.network(labels, guidance), world.schedule(calls // 2), Heun(), x)
    if made.calls != calls:
        raise ValueError(f"calls: Heun takes an even number here, got {calls}")
    return made.x


def alignment(
    world: World, plan: Plan, calls: int, guidance: float, x: Tensor, labels: Tensor
) -> list[float]:
    """How far the predictions that steps use lie from those at the states that they start at.

    Returns:
        Distances, from the second step to the last.
    """
    network, schedule = world.network(labels, guidance), world.schedule(calls)
    said: dict[int, Tensor] = {}

    def keep(prediction: Tensor, number: int, level: Any) -> Tensor:
        said[number] = prediction
        return prediction

    path = sample(network, schedule, plan, x, clean=keep, keep=True).path
    used: list[Tensor] = []
    found = []
    for number, step in enumerate(plan.steps(schedule)):
        used = [said[number], *used]
        if step.blend is not None:
            used[0] = combined(0.0, x, step.blend, used)
        found.append(distance(used[0], network(path[number], schedule.levels[number])))
    return found[1:]
