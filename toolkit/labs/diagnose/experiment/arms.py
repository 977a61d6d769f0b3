"""All arms of all seeds: losses on one model, and ensembles of M students."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from toolkit.core.lanes.nets import take
from toolkit.labs.diagnose.experiment.menu import MENU, training_loss
from toolkit.labs.diagnose.experiment.pretraining import Outcome, Plan, downstream, start
from toolkit.labs.diagnose.world import Design, DigitPairs

ENSEMBLES = ("LA/different", "CE/different", "CE/after", "LA/same", "LA/again")


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
        [training_loss(design, job[2], outcomes[job[0]]) for job in jobs],
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
