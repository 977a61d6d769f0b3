"""Rules of merging, each with a search of as many validation scores.

An evaluation judges one model on all tasks. Whatever a rule may choose, it has
:data:`EVALUATIONS` of them; a model judged on one task of n costs 1/n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils import vector_to_parameters

from toolkit.core.baselines.average import Average
from toolkit.core.baselines.dare import DARE
from toolkit.core.baselines.magnitude_merge import Magnitude
from toolkit.core.baselines.slerp import Slerp
from toolkit.core.baselines.task_arithmetic import TaskArithmetic
from toolkit.core.baselines.ties import TIES
from toolkit.core.seeds import generator
from toolkit.core.states.merging import merge
from toolkit.core.states.rules import Rule
from toolkit.labs.beds.experts import Experts
from toolkit.labs.merge.rivals.answers import Answers
from toolkit.merge.darex import DAREx
from toolkit.merge.m2n2 import M2N2
from toolkit.merge.pcb_merging import PCBMerging

EVALUATIONS = 24
DENSITIES = (0.1, 0.2, 0.5, 1.0)
"""Shares that a task keeps: PCB's ratio, TIES' density, what DARE does not drop."""
MEANS, SUMS = (0.5, 0.8, 1.2, 1.6, 2.1, 2.8), (0.15, 0.3, 0.45, 0.65, 0.9, 1.3)
"""Scales tried with each density: of rules that take a mean, and of those that add up."""
LINE = tuple(round(0.07 * i, 2) for i in range(1, EVALUATIONS + 1))
"""Scales of task arithmetic, which has no density."""
ARC = tuple(round(i / (EVALUATIONS + 1), 3) for i in range(1, EVALUATIONS + 1))
"""Places between two experts, for SLERP."""
DROPS = (0.5, 0.8)
"""Rates of dropping that DAREx tries, each with six divisors and six scales."""
ARCHIVE = 8
"""Models that breeding keeps."""


@dataclass
class Asked:
    """A seed's experts while one rule searches: every validation score is counted.

    Attributes:
        found: the experts.
        scores: mean scores of the models judged on all tasks, in order.
        judged: how many scores of a model on a task were asked for.
        best: the model of least mean score so far (D,), and what was chosen for it.
    """

    found: Experts
    scores: list[float] = field(default_factory=list)
    judged: int = 0
    best: tuple[Tensor, dict[str, float]] | None = None

    def on(self, numbers: Tensor, task: int) -> float:
        """The score of a model on one task."""
        self.judged += 1
        return self.found.scores(numbers, "validation", [task])[0]

    def mean(self, numbers: Tensor, **chosen: float) -> float:
        """The mean score of a model over all tasks; the least so far is kept."""
        count = len(self.found.tasks)
        self.judged += count
        score = self.found.mean(numbers, "validation", count)
        if self.best is None or score < min(self.scores):
            self.best = numbers, chosen
        self.scores.append(score)
        return score


def scaled(
    asked: Asked, rules: Sequence[tuple[float, Rule]], scales: Sequence[float], seed: int
) -> None:
    """Try rules, each named by its density, at some scales; each merges once."""
    for density, rule in rules:
        whole = asked.found.merged(rule, len(asked.found.tasks), seed)
        for scale in scales:
            numbers = torch.lerp(asked.found.base, whole, scale)
            asked.mean(numbers, density=density, scale=scale)


def arc(asked: Asked) -> None:
    """Try places on the arc between two experts."""
    for t in ARC:
        asked.mean(asked.found.merged(Slerp(t=t), 2), scale=t)


def divided(asked: Asked, seed: int) -> None:
    """DAREx: drop at random, find each expert's divisor on its own labels, add up, scale.

    Its rule has one mask for each expert; a divisor q only scales what the mask keeps by 1/q.
    """
    found = asked.found
    for drop in DROPS:
        divisors = [(1 - drop) ** (1 - i / (len(SUMS) - 1)) for i in range(len(SUMS))]
        rule = DAREx(drop=drop, q=1.0, prune="all")
        total = torch.zeros_like(found.base)
        for task, model in enumerate(found.models):
            pruned = _merged(found.base, [model], rule, len(found.tasks) * seed + task)
            kept = pruned - found.base
            tried = [asked.on(found.base + kept / q, task) for q in divisors]
            total += kept / divisors[tried.index(min(tried))]
        for scale in SUMS:
            asked.mean(found.base + scale * total, density=1 - drop, scale=scale)


def bred(asked: Asked, answers: Answers, seed: int) -> None:
    """M2N2 from the experts on: they are judged as its children are, and count as such."""
    found = asked.found
    count = len(found.tasks)

    def score(children: Tensor) -> Tensor:
        asked.mean(children[0])
        vector_to_parameters(children[0], found.network.parameters())
        return torch.cat([answers(found.network, task) for task in range(count)])[None]

    M2N2(size=ARCHIVE).evolve(
        torch.stack(list(found.models)), score, EVALUATIONS - count, generator(seed, "evolution")
    )


def _densities(rule: Callable[[float], Rule]) -> list[tuple[float, Rule]]:
    return [(density, rule(density)) for density in DENSITIES]


def search(name: str, found: Experts, answers: Answers, seed: int) -> Asked:
    """What a rule finds on a seed's experts.

    Args:
        name: of the rule, see :data:`RULES`.
        found: the experts.
        answers: from :func:`toolkit.labs.merge.rivals.answers.answers`, for breeding.
        seed: of masks and of breeding.
    """
    asked = Asked(found)
    SEARCHES[name](asked, answers, seed)
    return asked


SEARCHES: dict[str, Callable[[Asked, Answers, int], None]] = {
    "arithmetic": lambda a, _, s: scaled(a, [(1.0, TaskArithmetic(scale=1.0))], LINE, s),
    "slerp": lambda a, _, s: arc(a),
    "magnitude": lambda a, _, s: scaled(a, _densities(lambda d: Magnitude(density=d)), SUMS, s),
    "dare": lambda a, _, s: scaled(a, _densities(lambda d: DARE(drop=1 - d)), SUMS, s),
    "darex": lambda a, _, s: divided(a, s),
    "ties": lambda a, _, s: scaled(a, _densities(lambda d: TIES(density=d)), MEANS, s),
    "pcb": lambda a, _, s: scaled(a, _densities(lambda d: PCBMerging(ratio=d)), MEANS, s),
    "m2n2": bred,
}
"""Rule -> its search. The average is none of them: it has nothing to choose."""
GRIDS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "arithmetic": ((1.0,), LINE),
    "magnitude": (DENSITIES, SUMS), "dare": (DENSITIES, SUMS),
    "ties": (DENSITIES, MEANS), "pcb": (DENSITIES, MEANS),
}  # fmt: skip
"""Rules that try every density with every scale: both, in the order of their scores."""


def averaged(found: Experts, tasks: Sequence[int] | None = None) -> Tensor:
    """The mean of all experts, or of some (D,)."""
    chosen = range(len(found.models)) if tasks is None else tasks
    return _merged(None, [found.models[i] for i in chosen], Average())


def _merged(base: Tensor | None, models: Sequence[Tensor], rule: Rule, seed: int = 0) -> Tensor:
    """Vectors of all numbers merged by a rule (D,)."""
    start = None if base is None else {"all": base}
    result = merge(start, [{"all": model} for model in models], rule, seed=seed)
    assert isinstance(result, dict)
    return result["all"]
