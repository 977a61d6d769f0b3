"""Students of many downstream sets: of any imbalance, in any relation to the model's own order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from toolkit.core.lanes.nets import take
from toolkit.core.seeds import generator
from toolkit.diagnose.longtail_bias.tails import correlated_order, longtail_counts
from toolkit.labs.diagnose.experiment.menu import loss_of
from toolkit.labs.diagnose.experiment.pretraining import Outcome, Plan, order_of, start
from toolkit.labs.diagnose.world import Design, DigitPairs


def grid(
    design: Design,
    world: DigitPairs,
    seed: int,
    plan: Plan,
    ratios: Sequence[float],
    correlations: Sequence[float],
) -> tuple[Outcome, dict[tuple[float, float], tuple[Tensor, Tensor]]]:
    """Students trained with cross-entropy, for many downstream sets.

    Post-hoc adjustment of any strength and any number of models up to M can be read off their
    logits without another training.

    Args:
        design, world, seed, plan: as in ``experiment``.
        ratios: imbalance ratios of the downstream set.
        correlations: rank correlations of its class order with the first model's.

    Returns:
        The outcome without students, and (ratio, correlation) -> counts (K,) and test logits
        (M, N, K).
    """
    states, _, outcomes = start(design, {seed: world}, plan, same=False)
    outcome, found = outcomes[seed], {}
    order = order_of(world.classes, seed, 0)
    for ratio in ratios:
        jobs, counts, sets = [], {}, {}
        for rho in correlations:
            near = correlated_order(order, rho, generator(seed, "correlated", str(rho)))
            counts[rho] = longtail_counts(world.classes, plan.largest, ratio, order=near)
            sets[rho] = world.pairs(counts[rho], "train", generator(seed, "set", str(rho)))
            jobs += [(rho, m) for m in range(plan.models)]
        done = design.tuned(
            states,
            [m for _, m in jobs],
            [sets[rho] for rho, _ in jobs],
            [
                loss_of("CE", counts[rho], outcome.estimates[0].prior, design.scale)
                for rho, _ in jobs
            ],
            [seed] * len(jobs),
        )
        for rho in correlations:
            own = [i for i, (r, _) in enumerate(jobs) if r == rho]
            found[ratio, rho] = counts[rho], design.logits(take(done, own), outcome.test[0])
    return outcome, found
