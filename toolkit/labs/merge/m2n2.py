"""What is measured about M2N2: two specialists merged, and classifiers evolved from scratch.

Two beds. Digits: the published experiment; 8 x 8 pixels from 0 to 16, the first 80 % to train, a
perceptron of 256 hidden units. MNIST: its images shrunk to 14 x 14 pixels, judged on all 10,000 of
the test set; every seed draws its own training images. One specialist learns the digits 0 to 4, the
other 5 to 9. On digits they begin apart, as published; on MNIST from one common start that knows a
little of all ten digits, as models do that are merged in practice. The runs of a job step side by
side, as lanes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.jobs import grid
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.core.seeds import generator
from toolkit.labs.lab import Found, Lab, two_blocks
from toolkit.labs.merge.specialists.bed import (
    STD,
    accuracy,
    common_start,
    fresh,
    length,
    right,
    size,
    specialists,
    tested,
    trained,
    world,
)
from toolkit.labs.merge.specialists.searches import (
    evolution,
    layers,
    once,
    plain,
    ratios,
    record,
    searched,
    whose,
)
from toolkit.merge.m2n2 import M2N2, attraction, crossover, fitness, slerp, update

BEDS = {"mnist": "MNIST", "digits": "digits of 8 x 8 pixels"}
EVOLVED: dict[str, dict[str, Any]] = {
    "m2n2": {},
    "no competition": {"alpha": 0.0},
    "no attraction": {"attraction": False},
    "no split": {"split": False},
    "genetic": {"alpha": 0.0, "attraction": False},
}
"""Arms that evolve, by what they change of M2N2."""
SEARCHED = ("ratio", "once", "layers")
"""Arms that keep the best of as many children of the two specialists: of one ratio each, of random
ratios and split points, and of a ratio for each tensor that CMA-ES adapts."""
ARMS = {"mnist": (*EVOLVED, *SEARCHED), "digits": ("m2n2", "no competition", "no split",
        "genetic", "ratio", "layers")}  # fmt: skip
SCRATCH = ("m2n2", "genetic", "cma")
RATIOS, SPLITS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), (0.0, 0.25, 0.5, 0.75)


def plain_run(bed: str, seeds: list[int], scale: str) -> dict[str, Any]:
    """What needs no search, one entry a seed: test accuracies in per cent, and an angle.

    ``nothing`` is the specialist that is better on the training images, ``start`` what the first
    began with, ``average`` the mean of both, ``middle`` their child of ratio 1/2, ``full`` that
    start trained on all images, in ten times as many steps. ``angle``: between the specialists, in
    degrees.
    """
    torch.set_num_threads(1)
    there, this = world(bed, seeds, scale), size(bed, scale)
    both = specialists(bed, seeds, scale, there)
    a, b = both.unbind(1)
    start = common_start(bed, seeds, scale, there)
    long = this._replace(steps=10 * this.steps)
    whole = trained(start, there.x, there.y, torch.ones_like(there.y), long)
    known = torch.stack([accuracy(p, there.x, there.y, this.width) for p in (a, b)])
    models = {
        "nothing": both[torch.arange(len(seeds)), known.argmax(0)],
        "start": start, "first": a, "second": b, "average": (a + b) / 2,
        "middle": slerp(a, b, 0.5), "full": whole,
    }  # fmt: skip
    found = {name: plain(tested(p, there, this)) for name, p in models.items()}
    return found | {"angle": plain(F.cosine_similarity(a, b).arccos().rad2deg())}


def child_run(bed: str, seeds: list[int], scale: str) -> dict[str, Any]:
    """Test accuracy of single children, mean over seeds: a list over splits of lists over ratios.

    A split is a share of the vector; a split of 0 is a whole mixed with one ratio.
    """
    torch.set_num_threads(1)
    there, this = world(bed, seeds, scale), size(bed, scale)
    a, b = specialists(bed, seeds, scale, there).unbind(1)
    table = []
    for share in SPLITS:
        place = round(share * a.shape[1])
        made = (crossover(a, b, w if share else 1 - w, place) for w in RATIOS)
        table.append([float(tested(p, there, this).mean()) for p in made])
    return {"accuracy": table}


def merged_run(
    bed: str, arm: str, seeds: list[int], scale: str, evaluations: int, places: int, every: int
) -> dict[str, Any]:
    """One way to merge the specialists of some seeds, with so many children scored for each.

    Every entry lists one result a seed. ``test`` and ``train``: accuracy in per cent of the model
    that is best on the training images; ``curve`` and ``rising`` the same after every so many
    children. Of what evolves also ``coverage`` and ``disagreement``, in per cent over moments,
    and ``share``: of the second specialist in stretches of the best model's vector, in per cent.
    """
    torch.set_num_threads(1)
    there, this = world(bed, seeds, scale), size(bed, scale)
    both = specialists(bed, seeds, scale, there)
    score = functools.partial(right, there, this)
    judge = functools.partial(tested, there=there, this=this)
    if arm in SEARCHED:
        propose = {"ratio": ratios, "once": once, "layers": layers}[arm]
        children = propose(both, seeds, evaluations, this.width)
        return searched(children, score, judge, evaluations, every)
    method = M2N2(size=places, **EVOLVED[arm])
    found, best = _evolved(method, both, score, judge, seeds, evaluations, every)
    return found | {"share": plain(100 * whose(best, both))}


def scratch_run(
    arm: str, seeds: list[int], scale: str, evaluations: int, places: int, every: int
) -> dict[str, Any]:
    """Classifiers of digits evolved from random numbers; the record is that of :func:`merged_run`.

    ``cma`` is CMA-ES with a diagonal covariance and as many models in a generation as the archives
    of the others hold; a whole covariance of 19,210 numbers would take 3 GB.
    """
    torch.set_num_threads(1)
    there, this = world("digits", seeds, scale), size("digits", scale)
    starts = torch.stack([fresh(length(there.x, this.width), seeds, "start", i) for i in (0, 1)], 1)
    score = functools.partial(right, there, this)
    judge = functools.partial(tested, there=there, this=this)
    if arm == "cma":
        return searched(evolution(starts, seeds, places), score, judge, evaluations, every)
    method = M2N2(size=places, mutation=STD, **EVOLVED[arm])
    return _evolved(method, starts, score, judge, seeds, evaluations, every)[0]


def _evolved(
    method: M2N2, parents: Tensor, score: Any, judge: Any, seeds: list[int], evaluations: int,
    every: int,
) -> tuple[dict[str, Any], Tensor]:  # fmt: skip
    """The record of what evolves, and the best models (R, D)."""
    population, history = method.evolve(
        parents, score, evaluations, [generator(seed, "evolution") for seed in seeds],
        every=every, watch=lambda now: judge(now.best()),
    )  # fmt: skip
    found = record(history.evaluations, 100 * history.best, torch.stack(history.watched, 1))
    for name in ("coverage", "disagreement"):
        found[name] = plain(100 * getattr(history, name))
    return found, population.best()


def measure(runs: Runs, scale: Scale) -> None:
    """All merges on both beds, what needs no search, and evolution from scratch."""
    places = scale.pick(ci=6, cpu=20, gpu=20)
    counts = {
        "mnist": scale.pick(ci=40, cpu=1000, gpu=20000),
        "digits": scale.pick(ci=40, cpu=600, gpu=20000),
        "scratch": scale.pick(ci=40, cpu=2000, gpu=50000),
    }
    few = scale.pick(ci=4, cpu=8, gpu=20)
    many = scale.pick(ci=4, cpu=20, gpu=20)
    for bed in BEDS:
        blocks = two_blocks(many)
        runs.blocks(bed, blocks)
        for name, function in (("plain", plain_run), ("child", child_run)):
            runs.table(name, function, grid(bed=bed, seeds=blocks, scale=scale.name))
        runs.table("merged", merged_run, grid(
            bed=bed, arm=ARMS[bed], seeds=_jobs(blocks), scale=scale.name,
            evaluations=counts[bed], places=places, every=max(1, counts[bed] // 20),
        ))  # fmt: skip
    blocks = two_blocks(few)
    runs.blocks("scratch", blocks)
    runs.table("scratch", scratch_run, grid(
        arm=SCRATCH, seeds=_jobs(blocks), scale=scale.name, evaluations=counts["scratch"],
        places=places, every=max(1, counts["scratch"] // 20),
    ))  # fmt: skip


def _jobs(blocks: list[list[int]]) -> list[list[int]]:
    """At most five seeds a job: more lanes would not fit the processor's cache."""
    return [block[k : k + 5] for block in blocks for k in range(0, len(block), 5)]


def values(found: Found, table: str, column: str, **where: Any) -> dict[int, float]:
    """Seed -> one result, from the jobs that match, each of which lists one for each seed."""
    rows = found[table]
    for argument, value in where.items():
        rows = rows[rows[argument] == value]
    pairs = (zip(row.seeds, getattr(row, column), strict=True) for row in rows.itertuples())
    return {seed: value for part in pairs for seed, value in part}


def curves(found: Found, table: str, **where: Any) -> Any:
    """One row for each arm, seed and moment: test accuracy, and what was recorded of archives."""
    import pandas as pd

    jobs, rows = found[table], []
    for argument, value in where.items():
        jobs = jobs[jobs[argument] == value]
    for job in jobs.to_dict("records"):
        lists = {"test": job["curve"], "train": job["rising"]}
        for name in ("coverage", "disagreement"):
            if isinstance(job.get(name), list):
                lists[name] = job[name]
        for r, seed in enumerate(job["seeds"]):
            for i, moment in enumerate(job["moments"]):
                rows.append({"arm": job["arm"], "seed": seed, "evaluations": moment}
                            | {name: lines[r][i] for name, lines in lists.items()})  # fmt: skip
    return pd.DataFrame(rows)


def _merging(text: str, which: str, theirs: str, where: str, beds: bool = True) -> Claim:
    conditions = [Condition("MNIST", n=20, spread=1.8, support=(-100.0, 100.0), decides=True)]
    if beds:
        conditions.append(
            Condition("digits of 8 x 8 pixels", n=20, spread=2.0, support=(-100.0, 100.0))
        )
    return Claim(
        which, text, whose="paper", where=where, unit="points", margin=1.5,
        quantity=f"test accuracy, M2N2 minus {theirs}",
        reason="two sets of training images, or two starts, differ by as much",
        conditions=tuple(conditions),
    )  # fmt: skip


CLAIMS = (
    _merging(
        "From two specialists M2N2 ends above the genetic algorithm, which has neither competition "
        "nor attraction.",
        "genetic", "the genetic algorithm", "abstract; the code's README",
    ),
    _merging(
        "Competition carries it: without, all else equal, the end is lower.",
        "competition", "M2N2 without competition", "abstract",
    ),
    _merging(
        "The split point carries it: with one ratio for the whole vector the end is lower.",
        "split", "M2N2 without split points", "abstract",
    ),
    _merging(
        "Boundaries that evolve beat groups fixed beforehand: a ratio for each tensor, adapted by "
        "CMA-ES with as many evaluations.",
        "layers", "CMA-ES over a ratio for each tensor", "abstract",
    ),
    Claim(
        "scratch",
        "From random numbers M2N2 comes within 3 points of CMA-ES, or above it.",
        whose="paper", where="abstract", unit="points", than=-3.0, margin=2.0,
        quantity="test accuracy, M2N2 minus CMA-ES of diagonal covariance, from 3 points below",
        reason="the abstract calls both comparable; two points are less than two runs differ by",
        conditions=(
            Condition(
                "digits of 8 x 8 pixels", n=8, spread=2.3, support=(-97.0, 103.0), decides=True
            ),
        ),
    ),
)  # fmt: skip
AGAINST = {"genetic": "genetic", "competition": "no competition", "split": "no split",
           "layers": "layers"}  # fmt: skip
"""Claim -> the arm that M2N2 is compared with."""


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    measured: dict[str, dict[str, Measured]] = {}
    for claim, arm in AGAINST.items():
        measured[claim] = {name: against(found, bed, arm) for bed, name in BEDS.items()}
    ours, theirs = (values(found, "scratch", "test", arm=arm) for arm in ("m2n2", "cma"))
    ends = (values(found, "plain", name, bed="digits") for name in ("full", "start"))
    full, start = ({seed: end[seed] for seed in ours} for end in ends)
    measured["scratch"] = {
        BEDS["digits"]: Measured(
            ours, theirs, control=full, nothing=start, blocks=found.blocks("scratch")
        )
    }
    return measured


def against(found: Found, bed: str, arm: str) -> Measured:
    """M2N2 and another arm on one bed, seed by seed; gradients on all images as the control."""
    return Measured(
        values(found, "merged", "test", bed=bed, arm="m2n2"),
        values(found, "merged", "test", bed=bed, arm=arm),
        control=values(found, "plain", "full", bed=bed),
        nothing=values(found, "plain", "nothing", bed=bed),
        blocks=found.blocks(bed),
    )


def facts(found: Found) -> list[Fact]:
    """Identities of the published equations, checked by computing them."""
    draws = generator(0, "facts")
    scores = torch.rand(12, 300, generator=draws) < 0.15
    covered = int(scores.any(0).sum())
    shared, counted = fitness(scores, 1.0), fitness(scores, 0.0)
    a, b = torch.randn(2, 500, generator=draws)
    b = b * a.norm() / b.norm()
    middle, mean = slerp(a, b, 0.5).norm() / a.norm(), ((a + b) / 2).norm() / a.norm()
    best = int(counted.argmax())
    rare = torch.zeros(2, 5, dtype=torch.bool)
    rare[0, 0], rare[1, 1:] = True, True
    after = update(torch.zeros(2, 3), rare, torch.ones(3), rare[1])[1]
    return [
        Fact("total", "All fitness together is the number of examples that somebody solves.",
             abs(float(shared.sum()) - covered) < 1e-3, covered, "examples"),
        Fact("plain", "Without competition fitness counts a model's right answers.",
             torch.equal(counted, scores.sum(1).float())),
        Fact("itself", "Nobody is attracted to itself.",
             float(attraction(scores, best)[best]) == 0),
        Fact("length", "Between vectors of one length the spherical mean keeps that length.",
             abs(float(middle) - 1) < 1e-5, float(mean), "times that length has the plain mean"),
        Fact("coverage", "An update may lower how many examples somebody solves.",
             bool(rare.any(0).sum() > after.any(0).sum())),
    ]  # fmt: skip


LAB = Lab(
    slug="m2n2",
    part="merge",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("mnist",),
)
