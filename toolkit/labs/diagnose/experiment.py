"""The whole experiment of the chapter in the world of digit pairs, many seeds at once.

For each seed: M foundation models whose pre-training sets have class orders of their own
(``different``), M - 1 more with the order of the first (``same``), one downstream set with an
independent order, and students of all kinds. The controls that the paper lacks are among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from toolkit.core.lanes.nets import States, take
from toolkit.core.seeds import generator
from toolkit.diagnose.longtail_bias.checks import prior_from_counts
from toolkit.diagnose.longtail_bias.ensemble import gla
from toolkit.diagnose.longtail_bias.losses import (
    ClassBalancedLoss,
    FocalLoss,
    GLATrainLoss,
    LADELoss,
    LDAMLoss,
    LogitAdjustedLoss,
    ReweightedLoss,
)
from toolkit.diagnose.longtail_bias.prior import PriorEstimate, estimate_prior
from toolkit.diagnose.longtail_bias.tails import correlated_order, longtail_counts
from toolkit.labs.diagnose.world import Design, DigitPairs, Set

MENU = ("CE", "LA", "GLA-Train", "focal", "LDAM", "CB", "GRW", "LADE")
ENSEMBLES = ("LA/different", "CE/different", "CE/after", "LA/same", "LA/again")


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


def loss_of(name: str, counts: Tensor, model_prior: Tensor, scale: float) -> nn.Module:
    """A loss of the menu for training counts (K,); ``scale`` is that of the cosine head."""
    prior = prior_from_counts(counts)
    made = {
        "CE": lambda: LogitAdjustedLoss(prior, tau=0.0),
        "LA": lambda: LogitAdjustedLoss(prior),
        "GLA-Train": lambda: GLATrainLoss(prior, model_prior),
        "focal": FocalLoss,
        "LDAM": lambda: LDAMLoss(counts, scale=scale),
        "CB": lambda: ClassBalancedLoss(counts),
        "GRW": lambda: ReweightedLoss(prior),
        "LADE": lambda: LADELoss(prior),
    }
    return made[name]()


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


def rates_tried(
    design: Design,
    worlds: Mapping[int, DigitPairs],
    plan: Plan,
    rates: Sequence[float],
    names: Sequence[str] = MENU,
) -> list[dict[str, object]]:
    """Validation accuracy of every loss at every learning rate, from the first foundation model.

    Returns:
        One record per loss, rate and seed: ``arm``, ``rate``, ``seed``, ``accuracy``. The arm
        ``CE, adjusted after`` is CE judged after post-hoc adjustment, ``GLA`` is LA judged with the
        zero-shot model added.
    """
    plan = Plan(**{**vars(plan), "models": 1})
    states, at, outcomes = start(design, worlds, plan, same=False)
    sets = {seed: downstream(world, outcomes[seed]) for seed, world in worlds.items()}
    jobs = [(name, rate, seed) for name in names for rate in rates for seed in worlds]
    done = design.tuned(
        states,
        [at[seed, "different", 0] for _, _, seed in jobs],
        [sets[seed] for _, _, seed in jobs],
        [_loss(design, name, outcomes[seed]) for name, _, seed in jobs],
        [seed for _, _, seed in jobs],
        [rate for _, rate, _ in jobs],
    )
    records = []
    for i, (name, rate, seed) in enumerate(jobs):
        x, y = outcomes[seed].valid
        z = design.logits(take(done, [i]), x)[0]
        found = {name: z}
        if name == "CE":
            found["CE, adjusted after"] = z - outcomes[seed].prior.log()
        if name == "LA":
            zero_shot = design.logits(outcomes[seed].foundations, x)[0]
            found["GLA"] = gla(z, zero_shot, outcomes[seed].estimates[0].prior)
        for arm, logits in found.items():
            accuracy = float((logits.argmax(1) == y).double().mean())
            records.append({"arm": arm, "rate": rate, "seed": seed, "accuracy": accuracy})
    return records


def _loss(design: Design, name: str, outcome: Outcome) -> nn.Module:
    return loss_of(name, outcome.counts, outcome.estimates[0].prior, design.scale)


def experiment(
    design: Design,
    worlds: Mapping[int, DigitPairs],
    plan: Plan,
    rates: Mapping[str, float],
    names: Sequence[str] = MENU,
    ensembles: Sequence[str] = ENSEMBLES,
) -> list[Outcome]:
    """Run all arms of all seeds.

    Arms of M students: ``LA/different``, ``LA/same`` (the first one's prior, other seeds),
    ``LA/again`` (the first model, fine-tuned M times), ``CE/different``, and ``CE/after``, the same
    at the rate that suits adjusting afterwards. Arms of one student, of the first model: the other
    names of the menu, ``GLA-Train/LA``, GLA-Train at the rate of LA, and ``LA/GLA``, LA at the rate
    of GLA.

    Args:
        design: networks and training.
        worlds: seed -> its world.
        plan: sizes.
        rates: learning rate of every loss, of ``CE, adjusted after`` (that of CE by default), and
            of ``GLA`` (without it ``LA/GLA`` is not run).
        names: losses to be run on the first model.
        ensembles: arms of M students to be run; ``LA/different`` belongs to ``LA/same`` and
            ``LA/again``, which share its first student.

    Returns:
        One outcome per seed.

    Raises:
        ValueError: an arm of ``ensembles`` that is not known, or one without ``LA/different``.
    """
    odd = set(ensembles) - set(ENSEMBLES)
    if odd or ("LA/different" not in ensembles and {"LA/same", "LA/again"} & set(ensembles)):
        raise ValueError(
            f"ensembles={tuple(ensembles)}: choose among {ENSEMBLES}, and keep LA/different."
        )
    states, at, outcomes = start(design, worlds, plan, "LA/same" in ensembles)
    # seed, arm, loss, foundation, own seed, rate
    jobs: list[tuple[int, str, str, int, int, float]] = []
    after = "CE, adjusted after" if "CE, adjusted after" in rates else "CE"
    for seed in worlds:
        first = at[seed, "different", 0]
        for m in range(plan.models):
            for arm in (a for a in ENSEMBLES if a in ensembles):
                if arm in ("LA/same", "LA/again") and m == 0:
                    continue  # the first of these is the first of the others
                kind = "same" if arm == "LA/same" else "different"
                model = first if arm == "LA/again" else at[seed, kind, m]
                own_seed = 1000 * seed + m if arm == "LA/again" else seed
                loss = arm[:2]
                rate = rates[after if arm == "CE/after" else loss]
                jobs.append((seed, arm, loss, model, own_seed, rate))
        jobs += [(seed, n, n, first, seed, rates[n]) for n in names if n not in ("CE", "LA")]
        if "GLA-Train" in names:
            jobs.append((seed, "GLA-Train/LA", "GLA-Train", first, seed, rates["LA"]))
        if "GLA" in rates and "LA" in names:
            jobs.append((seed, "LA/GLA", "LA", first, seed, rates["GLA"]))
    sets = {seed: downstream(world, outcomes[seed]) for seed, world in worlds.items()}
    done = design.tuned(
        states,
        [job[3] for job in jobs],
        [sets[job[0]] for job in jobs],
        [_loss(design, job[2], outcomes[job[0]]) for job in jobs],
        [job[4] for job in jobs],
        [job[5] for job in jobs],
    )
    for seed, outcome in outcomes.items():
        for arm in dict.fromkeys(job[1] for job in jobs):
            own = [i for i, job in enumerate(jobs) if job[:2] == (seed, arm)]
            outcome.students[arm] = take(done, own)
            outcome.logits[arm] = design.logits(outcome.students[arm], outcome.test[0])
        for arm in {"LA/same", "LA/again"} & set(outcome.logits):
            outcome.logits[arm] = torch.cat(
                [outcome.logits["LA/different"][:1], outcome.logits[arm]]
            )
        outcome.valid_logits = {
            arm: design.logits(outcome.students[arm], outcome.valid[0])
            for arm in ("LA/different", "CE/different", "LA/GLA")
            if arm in outcome.students
        }
    return list(outcomes.values())


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
        design, world, seed, plan: as in :func:`experiment`.
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
