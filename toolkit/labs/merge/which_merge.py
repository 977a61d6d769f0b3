"""What is measured on *Average, trim, breed or cut?*: nine rules of merging at equal searches.

Three beds of experts (:mod:`toolkit.labs.beds.experts`,
:mod:`toolkit.labs.beds.expert_sentences`): four turns of MNIST's digits, two texts, three tasks of
a sentence encoder. A run is one seed: its experts are trained and merged by every rule, each with
24 evaluations on validation data (:mod:`toolkit.labs.merge.rivals.search`); what a rule found best
is judged on test data. All scores are given as shares of what the experts gain, each on its own
task.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from torch.nn.utils import vector_to_parameters

from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.labs.beds import expert_sentences, experts
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks
from toolkit.labs.merge.rivals.answers import answers
from toolkit.labs.merge.rivals.interference import lost, pairs
from toolkit.labs.merge.rivals.search import EVALUATIONS, GRIDS, averaged, search

BEDS = ("images", "texts", "sentences")
TITLES = {
    "images": "four turns of MNIST", "texts": "two texts", "sentences": "three sentence tasks",
}  # fmt: skip
START = {"images": 2e-3, "texts": 4e-3, "sentences": 2e-4}
"""Middles of the first rates tried for the experts; the first two are those of PCB-Merging."""
FIXED = ("arithmetic", "magnitude", "dare", "darex", "ties", "pcb")
"""Searched rules that every bed has beside breeding."""
OF = {
    "images": (*FIXED, "m2n2"),
    "texts": (*FIXED, "slerp", "m2n2"),
    "sentences": (*FIXED, "m2n2"),
}
"""Bed -> searched rules; SLERP takes two experts."""


def run(bed: str, rate: float, seed: int, scale: str = "cpu") -> dict[str, Any]:
    """Experts of a seed, merged by every rule, as a job.

    Returns:
        Test scores by rule, the mean over tasks, less is better; ``"<rule>, each"`` by task.
        Beside a rule that searches: its ``scores`` on validation data, how many ``evaluations``
        they cost, the ``density`` and ``scale`` chosen where there are such. ``nothing`` is the
        base, ``own`` each expert on its own task; both on ``validation`` data too. By pair of
        tasks: ``cosines``, ``both``, ``opposed`` (:class:`.rivals.interference.Pair`), and on
        images what is ``lost``. On sentences ``"<rule>, plain"``: by task log-loss in nats, then
        labels found or nDCG@10 in per cent.
    """
    if bed == "sentences":
        found = expert_sentences.load(rate, seed, scale)
    else:
        found = experts.load(bed, rate, seed, scale)
    every = range(len(found.tasks))
    asks = answers(bed, found, seed, scale)
    own = found.own("test")
    record: dict[str, Any] = {
        "tasks": list(found.tasks),
        "own": statistics.fmean(own), "own, each": own,
        "own, validation": statistics.fmean(found.own("validation")),
        "nothing, validation": found.mean(found.base, "validation", len(every)),
    }  # fmt: skip
    met = pairs(found)
    record |= {"cosines": [p.cosine for p in met], "both": [p.both for p in met],
               "opposed": [p.opposed for p in met]}  # fmt: skip
    if bed == "images":
        record["lost"] = lost(found, own)
    record |= _tested(found, "nothing", found.base)
    record |= _tested(found, "average", averaged(found))
    record["average, validation"] = found.mean(averaged(found), "validation", len(every))
    for name in OF[bed]:
        asked = search(name, found, asks, seed)
        assert asked.best is not None
        numbers, chosen = asked.best
        record |= _tested(found, name, numbers)
        record |= {f"{name}, {key}": value for key, value in chosen.items()}
        record |= {f"{name}, scores": asked.scores,
                   f"{name}, evaluations": asked.judged / len(every)}  # fmt: skip
    return record


def _tested(found: experts.Experts, name: str, numbers: Any) -> dict[str, Any]:
    """What a model scores on test data."""
    if isinstance(found.judge, expert_sentences.Judging):
        vector_to_parameters(numbers, found.network.parameters())
        told = [found.judge.both(found.network, "test", i) for i in range(len(found.tasks))]
        units = [expert_sentences.UNITS[task] for task in found.tasks]
        each = [100 * nats / unit for (nats, _), unit in zip(told, units, strict=True)]
        more = {f"{name}, plain": list(itertools.chain(*told))}
    else:
        each, more = found.scores(numbers, "test", range(len(found.tasks))), {}
    return {name: statistics.fmean(each), f"{name}, each": each, **more}


def sentences_first(arm: str, rate: float, seed: int, scale: str = "cpu") -> dict[str, float]:
    """What a seed's first expert of sentences scores on its own task."""
    return expert_sentences.first(arm, rate, seed, scale)


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the page: bed by bed the search for the experts' rate, then their merges.

    The rates of images and texts are those of PCB-Merging, found by the same runs.
    """
    blocks = two_blocks(scale.pick(ci=4, cpu=8, gpu=8))
    seeds = [seed for block in blocks for seed in block]
    for bed in BEDS:
        where = {"scale": scale.name} | ({} if bed == "sentences" else {"bed": bed})
        found = runs.tune(
            f"experts of {bed}", sentences_first if bed == "sentences" else experts.first,
            {bed: where}, {bed: START[bed]},
            seeds=search_seeds(n=scale.pick(ci=1, cpu=3, gpu=3)), reported=seeds,
            judged="validation", better="min", factor=2.0,
            width=scale.pick(ci=1, cpu=3, gpu=3),
        )  # fmt: skip
        runs.blocks(bed, blocks)
        runs.table(bed, run, [
            {"bed": bed, "rate": found[bed].rate, "seed": seed, "scale": scale.name}
            for seed in seeds
        ])  # fmt: skip


FIVE = "five points are a twentieth of what experts gain; merging loses several times that"
EVERYWHERE = tuple(
    Condition(TITLES[bed], n=8, spread=5.0, decides=bed == "sentences") for bed in BEDS
)
CLAIMS = (
    Claim(
        "trim",
        "Trimming and electing signs (TIES) keeps more than task arithmetic.",
        whose="paper", unit="points", margin=5.0, reason=FIVE,
        quantity="share of the experts' gain, TIES minus task arithmetic, both searched alike",
        conditions=EVERYWHERE,
    ),
    Claim(
        "balance",
        "Weighing each coordinate (PCB-Merging) keeps more than task arithmetic.",
        whose="paper", unit="points", margin=5.0, reason=FIVE,
        quantity="share of the experts' gain, PCB-Merging minus task arithmetic, both searched "
        "alike",
        conditions=EVERYWHERE,
    ),
    Claim(
        "breed",
        "Breeding (M2N2) keeps more than the best rule.",
        whose="paper", unit="points", margin=5.0, reason=FIVE,
        quantity="share of the experts' gain, M2N2 minus the rule that the seed's validation data "
        "prefer, at equal evaluations for each",
        conditions=EVERYWHERE,
    ),
    Claim(
        "scale",
        "A searched scale gives most of what any rule gives over the average.",
        whose="ours", unit="points", margin=5.0, reason=FIVE,
        quantity="share of the experts' gain: task arithmetic minus average, less what the rule "
        "that validation prefers adds to task arithmetic",
        conditions=EVERYWHERE,
    ),
    Claim(
        "signs",
        "Of two experts, those whose large changes oppose each other more lose more where they are "
        "averaged.",
        whose="ours", unit="rank correlation", margin=0.35,
        reason="a smaller correlation explains less than an eighth of the spread",
        quantity="over the six pairs of a seed: opposed signs among coordinates large in both, "
        "against the mean loss of the two on their own tasks",
        conditions=(
            Condition(TITLES["images"], n=8, spread=0.4, support=(-1.0, 1.0), decides=True),
        ),
    ),
)  # fmt: skip


def shares(found: Found, bed: str, names: Iterable[str]) -> dict[str, dict[int, float]]:
    """Rule -> seed -> how far it comes from the base (0) to the experts (100, on average)."""
    start, end = (found.values(bed, name) for name in ("nothing", "own"))
    whole = statistics.fmean(start[seed] - end[seed] for seed in start)
    return {
        name: {
            seed: 100 * (start[seed] - value) / whole
            for seed, value in found.values(bed, name).items()
        }
        for name in names
    }


def preferred(found: Found, bed: str, among: Sequence[str]) -> dict[int, str]:
    """Seed -> the rule whose best validation score is the least."""
    table = found[bed].set_index("seed")
    return {
        seed: min(among, key=lambda name: min(table[f"{name}, scores"][seed]))
        for seed in table.index.tolist()
    }


def best(found: Found, bed: str) -> dict[int, float]:
    """Seed -> share of the rule that validation prefers of all but breeding."""
    among = [name for name in OF[bed] if name != "m2n2"]
    share = shares(found, bed, among)
    return {seed: share[name][seed] for seed, name in preferred(found, bed, among).items()}


def tried(found: Found, bed: str, rule: str) -> Any:
    """Share of the gain on validation data, the mean over seeds (densities, scales)."""
    import numpy as np

    table = found[bed]
    start, end = (table[f"{name}, validation"].mean() for name in ("nothing", "own"))
    densities, scales = GRIDS[rule]
    scores = np.array(table[f"{rule}, scores"].tolist()).mean(0)
    return (100 * (start - scores) / (start - end)).reshape(len(densities), len(scales))


def correlations(found: Found) -> dict[int, float]:
    """Seed -> rank correlation, over pairs of tasks, of opposed signs and what is lost."""
    import pandas as pd

    return {
        row.seed: float(pd.Series(row.opposed).rank().corr(pd.Series(row.lost).rank()))
        for row in found["images"].itertuples()
    }


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""

    def against(bed: str, ours: dict[int, float], theirs: dict[int, float]) -> Measured:
        ends = shares(found, bed, ("own", "nothing"))
        return Measured(
            ours, theirs, control=ends["own"], nothing=ends["nothing"],
            blocks=found.blocks(bed), tuning_seeds=search_seeds(),
        )  # fmt: skip

    told: dict[str, dict[str, Measured]] = {
        name: {} for name in ("trim", "balance", "breed", "scale")
    }
    for bed in BEDS:
        share, top = shares(found, bed, ("average", *OF[bed])), best(found, bed)
        plain, title = share["arithmetic"], TITLES[bed]
        told["trim"][title] = against(bed, share["ties"], plain)
        told["balance"][title] = against(bed, share["pcb"], plain)
        told["breed"][title] = against(bed, share["m2n2"], top)
        by_scale = {seed: value - share["average"][seed] for seed, value in plain.items()}
        by_rule = {seed: top[seed] - value for seed, value in plain.items()}
        told["scale"][title] = against(bed, by_scale, by_rule)
    signs = Measured(
        correlations(found), blocks=found.blocks("images"), tuning_seeds=search_seeds()
    )
    return told | {"signs": {TITLES["images"]: signs}}


def facts(found: Found) -> list[Fact]:
    """Every rule had as many evaluations."""
    counts = {
        count for bed in BEDS for name in OF[bed] for count in found[bed][f"{name}, evaluations"]
    }
    return [
        Fact("searches", "Every rule that searches had as many evaluations, in every run.",
             counts == {EVALUATIONS}, EVALUATIONS, "evaluations"),
    ]  # fmt: skip


LAB = Lab(
    slug="which_merge",
    part="merge",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("mnist", "tinyshakespeare", "cranfield", "sst2", "minilm"),
)
