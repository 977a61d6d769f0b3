"""The menu of losses, and the search for their learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from toolkit.core.lanes.nets import take
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
from toolkit.labs.diagnose.experiment.pretraining import Outcome, Plan, downstream, start
from toolkit.labs.diagnose.world import Design, DigitPairs

MENU = ("CE", "LA", "GLA-Train", "focal", "LDAM", "CB", "GRW", "LADE")


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


def training_loss(design: Design, name: str, outcome: Outcome) -> nn.Module:
    """A loss of the menu for the downstream set of a seed and its first foundation model."""
    return loss_of(name, outcome.counts, outcome.estimates[0].prior, design.scale)


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
        [training_loss(design, name, outcomes[seed]) for name, _, seed in jobs],
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
