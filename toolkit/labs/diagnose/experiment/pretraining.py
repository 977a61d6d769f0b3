"""The foundation models of every seed, with their priors, and all data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from toolkit.core.lanes.nets import States, take
from toolkit.core.seeds import generator
from toolkit.diagnose.longtail_bias.checks import prior_from_counts
from toolkit.diagnose.longtail_bias.prior import PriorEstimate, estimate_prior
from toolkit.diagnose.longtail_bias.tails import longtail_counts
from toolkit.labs.diagnose.world import Design, DigitPairs, Set


@dataclass(frozen=True)
class Plan:
    """Sizes of the experiment.

    Args:
        models: M.
        pre_ratio, pre_largest: imbalance ratio and largest class of the pre-training sets.
        ratio, largest: of the downstream set.
        valid, test: examples per class of the balanced validation and test sets.
    """

    models: int = 5
    pre_ratio: float = 200
    pre_largest: int = 400
    ratio: float = 30
    largest: int = 60
    valid: int = 20
    test: int = 30


@dataclass
class Outcome:
    """What one seed gave.

    Attributes:
        seed: the seed.
        counts: (K,) downstream training counts.
        pre_counts: (M, K) of the foundation models with priors of their own.
        valid, test: balanced inputs and labels.
        estimates: prior of each of these M models, from its zero-shot logits on ``valid``.
        zero_shot: (M, N, K) their logits on ``test``.
        logits: name of the arm -> (m, N, K) on ``test``.
        valid_logits: the same on ``valid``, for the arms that need it.
        foundations: states of the M models.
        students: name of the arm -> states.
    """

    seed: int
    counts: Tensor
    pre_counts: Tensor
    valid: Set
    test: Set
    estimates: list[PriorEstimate]
    zero_shot: Tensor
    logits: dict[str, Tensor] = field(default_factory=dict)
    valid_logits: dict[str, Tensor] = field(default_factory=dict)
    foundations: States = field(default_factory=dict)
    students: dict[str, States] = field(default_factory=dict)

    @property
    def prior(self) -> Tensor:
        """Downstream prior (K,)."""
        return prior_from_counts(self.counts)


def order_of(classes: int, seed: int, *stream: int | str) -> Tensor:
    """A random class order."""
    return torch.randperm(classes, generator=generator(seed, "order", *stream))


def foundations(
    design: Design, worlds: Mapping[int, DigitPairs], plan: Plan, same: bool
) -> tuple[States, list[tuple[int, str, int]], dict[tuple[int, str, int], Tensor]]:
    """Pre-train the models of all seeds.

    Args:
        design: networks and training.
        worlds: seed -> its world.
        plan: sizes.
        same: whether to add M - 1 models with the first one's class order.

    Returns:
        States, the (seed, kind, number) of each, and the counts (K,) by that key.
    """
    keys, sets, counts = [], [], {}
    for seed, world in worlds.items():
        for kind in ("different", "same") if same else ("different",):
            for m in range(kind == "same", plan.models):
                order = order_of(world.classes, seed, m if kind == "different" else 0)
                key = (seed, kind, m)
                counts[key] = longtail_counts(
                    world.classes, plan.pre_largest, plan.pre_ratio, order=order
                )
                sets.append(world.pairs(counts[key], "train", generator(seed, "pre", kind, m)))
                keys.append(key)
    seeds = [1000 * seed + 100 * (kind == "same") + m for seed, kind, m in keys]
    return design.pretrained(sets, seeds), keys, counts


def start(
    design: Design, worlds: Mapping[int, DigitPairs], plan: Plan, same: bool = True
) -> tuple[States, dict[tuple[int, str, int], int], dict[int, Outcome]]:
    """Foundation models with their priors, and all data of every seed.

    Returns:
        States of all foundation models, the place of each by (seed, kind, number), and the
        outcomes as far as they are known.
    """
    states, keys, counts = foundations(design, worlds, plan, same)
    at = {key: i for i, key in enumerate(keys)}
    outcomes = {}
    for seed, world in worlds.items():
        at[seed, "same", 0] = at[seed, "different", 0]
        own = take(states, [at[seed, "different", m] for m in range(plan.models)])
        valid = world.pairs(torch.tensor(plan.valid), "valid", generator(seed, "valid"))
        test = world.pairs(torch.tensor(plan.test), "test", generator(seed, "test"))
        seen = design.logits(own, valid[0])
        outcomes[seed] = Outcome(
            seed=seed,
            counts=longtail_counts(
                world.classes, plan.largest, plan.ratio, order=order_of(world.classes, seed, "down")
            ),
            pre_counts=torch.stack([counts[seed, "different", m] for m in range(plan.models)]),
            valid=valid,
            test=test,
            estimates=[estimate_prior(z, valid[1]) for z in seen],
            zero_shot=design.logits(own, test[0]),
            foundations=own,
        )
    return states, at, outcomes


def downstream(world: DigitPairs, outcome: Outcome) -> Set:
    """The long-tailed training set of a seed."""
    return world.pairs(outcome.counts, "train", generator(outcome.seed, "downstream"))
