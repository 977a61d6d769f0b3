"""What is measured on *PCB-Merging*: rules of merging at equal searches, and PCB without its parts.

Two beds of experts (:mod:`toolkit.labs.beds.experts`): four ways to turn MNIST's digits, merged
two or four at a time, and two texts. A run is one seed: it trains its experts, searches the
settings of every rule on validation data with 16 evaluations each, and judges the best one on test
data. All scores are given as shares of what the experts gain, each on its own task.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from toolkit.core.baselines.average import Average
from toolkit.core.baselines.dare import DARE
from toolkit.core.baselines.magnitude_merge import Magnitude
from toolkit.core.baselines.task_arithmetic import TaskArithmetic
from toolkit.core.baselines.ties import TIES
from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.core.seeds import generator
from toolkit.core.states.rules import Piece, Rule
from toolkit.labs.beds import experts, images
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks
from toolkit.merge.pcb_merging import PCBMerging, normalised


@dataclass(frozen=True)
class Lesser(PCBMerging):
    """PCB-Merging (``es``) without one of its parts.

    Args:
        without: "size", so that scores are agreement alone; "agreement", so that they are size
            alone; "rescaling", so that all that is kept weighs the same.
    """

    without: Literal["size", "agreement", "rescaling"] = "size"

    def _scores(self, piece: Piece, facts: Mapping[str, Any]) -> Tensor:
        size = normalised(piece.vectors.abs(), facts["low"], facts["high"])
        within = (len(size) * size.square()).exp()
        signed = torch.copysign(size, piece.vectors)
        between = torch.stack([torch.tanh(one * signed).sum(dim=0) for one in signed])
        if self.without == "size":
            return between
        return within if self.without == "agreement" else within * between

    def merged(self, piece: Piece) -> Tensor:
        if self.without != "rescaling":
            return super().merged(piece)
        assert piece.base is not None
        facts, size = piece.facts, piece.vectors.abs()
        low, high, least = (
            size.new_tensor(facts[end])[:, None] for end in ("low", "high", "least")
        )
        kept = (self._scores(piece, facts) > least).to(size.dtype)
        clipped = torch.copysign(size.clamp(low, high), piece.vectors) * kept
        mean = (clipped * size.new_tensor(piece.weights)[:, None]).sum(dim=0)
        return piece.base + self.scale * mean / kept.sum(dim=0).clamp(min=1.0)


@dataclass(frozen=True)
class Tried:
    """Settings of a rule that a search tries: a rule for each density, and scales for each."""

    rule: Callable[[float], Rule]
    densities: tuple[float, ...]
    scales: tuple[float, ...]


DENSITIES = (0.1, 0.2, 0.5, 1.0)
"""Shares that a task keeps: PCB's ratio, TIES' density, what DARE does not drop."""
MEANS, SUMS = (0.6, 1.0, 1.6, 2.5), (0.25, 0.45, 0.8, 1.4)
"""Scales tried with each density: of rules that take a mean, and of those that add up."""
LINE = tuple(round(0.1 * i, 1) for i in range(1, 17))
"""Scales of task arithmetic, which has no density."""
FINE = tuple(round(0.6 * (2.5 / 0.6) ** (i / 15), 3) for i in range(16))
"""Scales where the density is 1 by name; the same ends as :data:`MEANS`."""


def _pcb(**settings: Any) -> Callable[[float], Rule]:
    return lambda ratio: PCBMerging(ratio=ratio, **settings)


def _lesser(without: Any) -> Callable[[float], Rule]:
    return lambda ratio: Lesser(ratio=ratio, without=without)


RULES = {
    "arithmetic": Tried(lambda _: TaskArithmetic(scale=1.0), (1.0,), LINE),
    "ties": Tried(lambda density: TIES(density=density), DENSITIES, MEANS),
    "pcb": Tried(_pcb(), DENSITIES, MEANS),
    "dare": Tried(lambda density: DARE(drop=1 - density), DENSITIES, SUMS),
    "magnitude": Tried(lambda density: Magnitude(density=density), DENSITIES, SUMS),
    "without size": Tried(_lesser("size"), DENSITIES, MEANS),
    "without agreement": Tried(_lesser("agreement"), DENSITIES, MEANS),
    "without dropping": Tried(_pcb(), (1.0,), FINE),
    "without rescaling": Tried(_lesser("rescaling"), DENSITIES, MEANS),
    "raw": Tried(_pcb(variant="raw"), DENSITIES, MEANS),
    "softmax": Tried(_pcb(variant="softmax"), DENSITIES, MEANS),
}
"""Rule -> what is tried, 16 evaluations each."""
PARTS = ("without size", "without agreement", "without dropping", "without rescaling")
SPELLINGS = ("raw", "softmax")
ALWAYS = ("arithmetic", "ties", "pcb")
"""Rules that merge fewer than all tasks as well."""
ON = {"images": (2, 4), "texts": (2,)}
"""Bed -> how many experts are merged."""
OF = {"images": tuple(RULES), "texts": (*ALWAYS, "dare", "magnitude")}
"""Bed -> rules that merge all of its experts."""
START = {"images": 2e-3, "texts": 4e-3}
"""Middles of the first rates tried for the experts."""


def run(bed: str, rate: float, seed: int, scale: str = "cpu") -> dict[str, Any]:
    """Experts of a seed, merged by every rule, as a job.

    Returns:
        Test scores by ``"<rule>, <number of experts>"``, the mean over their tasks, less is better;
        beside each the ``density`` and ``scale`` chosen, and the ``validation`` scores, density by
        density. ``nothing`` is the base, ``own`` each expert on its own task, ``fixed`` PCB at a
        ratio of 0.1 and a scale of 1. ``others``: what each expert scores on each task.
    """
    found = experts.load(bed, rate, seed, scale)
    every = len(found.tasks)
    base, own = found.scores(found.base, "test", range(every)), found.own("test")
    record: dict[str, Any] = {
        "tasks": list(found.tasks),
        "others": list(itertools.chain(
            *(found.scores(model, "validation", range(every)) for model in found.models)
        )),
        f"fixed, {every}": found.mean(
            found.merged(PCBMerging(ratio=0.1, scale=1.0), every), "test", every
        ),
    }  # fmt: skip
    for count in ON[bed]:
        record |= {
            f"nothing, {count}": statistics.fmean(base[:count]),
            f"own, {count}": statistics.fmean(own[:count]),
            f"average, {count}": found.mean(found.merged(Average(), count), "test", count),
        }
        for name in OF[bed] if count == every else ALWAYS:
            record |= _searched(found, name, count, seed)
    return record


def _searched(found: experts.Experts, name: str, count: int, seed: int) -> dict[str, Any]:
    tried = RULES[name]
    best = found.search([tried.rule(d) for d in tried.densities], tried.scales, count, seed)
    label = f"{name}, {count}"
    return {
        label: found.mean(best.merged, "test", count),
        f"{label}, density": tried.densities[best.rule],
        f"{label}, scale": best.scale,
        f"{label}, validation": best.scores,
    }


def measure(runs: Runs, scale: Scale) -> None:
    """Every run of the page: the search for the experts' rate, then experts and their merges."""
    blocks = two_blocks(scale.pick(ci=4, cpu=8, gpu=8))
    seeds = [seed for block in blocks for seed in block]
    found = runs.tune(
        "experts", experts.first, {bed: {"bed": bed, "scale": scale.name} for bed in ON}, START,
        seeds=search_seeds(n=scale.pick(ci=1, cpu=3, gpu=3)), reported=seeds,
        judged="validation", better="min", factor=2.0, width=scale.pick(ci=1, cpu=3, gpu=3),
    )  # fmt: skip
    for bed in ON:
        runs.blocks(bed, blocks)
        runs.table(bed, run, [
            {"bed": bed, "rate": found[bed].rate, "seed": seed, "scale": scale.name}
            for seed in seeds
        ])  # fmt: skip


TITLES = {"images": "four turns of MNIST", "texts": "two texts"}
FIVE = "five points are a twentieth of what experts gain; merging loses several times that"
FOUR = Condition(TITLES["images"], n=8, spread=5.0, decides=True)
TWO = Condition(TITLES["texts"], n=8, spread=5.0)
CLAIMS = (
    Claim(
        "ties",
        "PCB-Merging keeps more of the experts' gain than TIES.",
        whose="paper", unit="points", margin=5.0, reason=FIVE,
        quantity="share of the experts' gain, PCB minus TIES, both searched alike",
        conditions=(FOUR, TWO),
    ),
    Claim(
        "arithmetic",
        "PCB-Merging keeps more of the experts' gain than task arithmetic.",
        whose="paper", unit="points", margin=5.0, reason=FIVE,
        quantity="share of the experts' gain, PCB minus task arithmetic, both searched alike",
        conditions=(FOUR, TWO),
    ),
    Claim(
        "fixed",
        "Without a search, a ratio of 0.1 and a scale of 1 cost little.",
        whose="paper", unit="points", margin=5.0, than=-10.0,
        reason="five points lost are a twentieth of what experts gain; ten would cost as much as "
        "a worse rule",
        quantity="share of the experts' gain, PCB at these settings minus PCB searched",
        conditions=(FOUR, TWO),
    ),
    Claim(
        "parts",
        "Each part of PCB-Merging adds to what it keeps.",
        whose="paper", unit="points", margin=2.0,
        reason="a part that adds less than two points is not worth a line of code",
        quantity="share of the experts' gain, PCB minus PCB without the part, both searched alike",
        conditions=tuple(
            Condition(part, n=8, spread=2.0, decides=part == "without agreement") for part in PARTS
        ),
    ),
    Claim(
        "more-tasks",
        "With four experts PCB-Merging is further ahead of TIES than with two.",
        whose="paper", unit="points", margin=5.0, reason=FIVE,
        quantity="share of the experts' gain, PCB minus TIES with four minus the same with two",
        conditions=(FOUR,),
    ),
)  # fmt: skip


def shares(found: Found, bed: str, count: int, names: Sequence[str]) -> dict[str, dict[int, float]]:
    """Rule -> seed -> how far it comes from the base (0) to the experts (100, on average)."""
    start, end = (found.values(bed, f"{name}, {count}") for name in ("nothing", "own"))
    whole = statistics.fmean(start[seed] - end[seed] for seed in start)
    return {
        name: {
            seed: 100 * (start[seed] - value) / whole
            for seed, value in found.values(bed, f"{name}, {count}").items()
        }
        for name in names
    }


def digits_network(scale: str) -> Any:
    """The vision transformer that the experts of the images are tuned from."""
    return images.network("vit", scale)


def times_read(rule: type[Rule], size: int) -> int:
    """How many times a merge of four models of ``size`` random numbers reads them all."""

    class Whole:
        """The models in one piece."""

        count, names, passes = size, ("all",), 1  # the merge itself reads them once

        def __iter__(self) -> Iterator[Piece]:
            self.passes += 1
            draws = generator(0, "differences")
            models = [torch.randn(size, generator=draws) for _ in range(4)]
            yield Piece("all", (size,), 0, torch.zeros(size), models, (1.0,) * 4, {})

    pieces = Whole()
    rule().survey(pieces)
    return pieces.passes


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    every = {
        bed: shares(found, bed, ON[bed][-1], ("nothing", "own", "fixed", *OF[bed])) for bed in ON
    }

    def paired(bed: str, ours: str, theirs: str) -> Measured:
        values = every[bed]
        return Measured(
            values[ours], values[theirs], control=values["own"], nothing=values["nothing"],
            blocks=found.blocks(bed), tuning_seeds=search_seeds(),
        )  # fmt: skip

    def ahead(count: int) -> dict[int, float]:
        values = shares(found, "images", count, ("pcb", "ties"))
        return {seed: value - values["ties"][seed] for seed, value in values["pcb"].items()}

    more = Measured(ahead(4), ahead(2), blocks=found.blocks("images"), tuning_seeds=search_seeds())
    return {
        **{
            rule: {TITLES[bed]: paired(bed, "pcb", rule) for bed in ON}
            for rule in ("ties", "arithmetic")
        },
        "fixed": {TITLES[bed]: paired(bed, "fixed", "pcb") for bed in ON},
        "parts": {part: paired("images", "pcb", part) for part in PARTS},
        "more-tasks": {TITLES["images"]: more},
    }


def facts(found: Found) -> list[Fact]:
    """Every searched rule had as many evaluations."""
    counts = {
        len(scores)
        for bed in ON
        for name in OF[bed]
        for scores in found[bed][f"{name}, {ON[bed][-1]}, validation"]
    }
    return [
        Fact("searches", "Every searched rule had as many evaluations, in every run.",
             len(counts) == 1, max(counts), "evaluations"),
    ]  # fmt: skip


LAB = Lab(
    slug="pcb_merging",
    part="merge",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("mnist", "tinyshakespeare", "cranfield", "sst2"),
)
