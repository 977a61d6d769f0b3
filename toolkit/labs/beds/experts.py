"""Experts: one base tuned on several tasks, each time whole, to be made one model again.

``images``: the small ViT, which reads upright MNIST digits, tuned on digits that are rotated,
mirrored, inverted and transposed. ``texts``: the small transformer, which read Shakespeare, tuned
on abstracts and on film reviews. Every seed draws the order of the tasks, the examples of each and
what judges them, and trains its experts anew, so that a run is one seed: experts first, then every
rule of merging. Scores are such that less is better: error in per cent, or nats per character.
MNIST's 10,000 test images are dealt to the four tasks, 2,500 each.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from toolkit.core import data
from toolkit.core.seeds import generator
from toolkit.core.states.merging import merge
from toolkit.core.states.rules import Rule
from toolkit.core.train import rates
from toolkit.labs.beds import arms, characters, tiny_text
from toolkit.labs.beds import images as digits

Judge: TypeAlias = Callable[[nn.Module, str, int], float]

SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rotated": lambda x: x.rot90(1, (1, 2)),
    "mirrored": lambda x: x.flip(2),
    "inverted": lambda x: 1 - x,
    "transposed": lambda x: x.transpose(1, 2),
}
"""What is done to images (n, 28, 28) in [0, 1], by task."""
TEXTS = ("abstracts", "reviews")
NAMES = ("images", "texts")


@dataclass(frozen=True)
class Size:
    """Steps of one expert, and how much judges a task: images, or windows of characters."""

    steps: int
    validation: int
    test: int


SIZES = {
    "images": {"ci": Size(30, 20, 60), "cpu": Size(80, 100, 2500)},
    "texts": {"ci": Size(20, 4, 8), "cpu": Size(40, 16, 196)},
}


class Chosen(NamedTuple):
    """What a search for the settings of a rule found: the merged numbers (D,), the place of its
    rule among those tried, its scale, and every mean validation score, rule by rule."""

    merged: Tensor
    rule: int
    scale: float
    scores: list[float]


@dataclass(frozen=True)
class Experts:
    """A base and what was tuned from it on several tasks, each as one vector of all D numbers.

    Attributes:
        tasks: their names, in the seed's order.
        network: of the base's form; its numbers are overwritten.
        base: what all experts started from (D,).
        models: one expert per task, each (D,).
        judge: (network, "validation" or "test", number of the task) -> score, less is better.
    """

    tasks: tuple[str, ...]
    network: nn.Module
    base: Tensor
    models: tuple[Tensor, ...]
    judge: Judge

    def scores(self, numbers: Tensor, part: str, tasks: Iterable[int]) -> list[float]:
        """What a network of these numbers scores on some tasks."""
        vector_to_parameters(numbers, self.network.parameters())
        return [self.judge(self.network, part, task) for task in tasks]

    def mean(self, numbers: Tensor, part: str, count: int) -> float:
        """The mean score over the first ``count`` tasks."""
        return statistics.fmean(self.scores(numbers, part, range(count)))

    def own(self, part: str) -> list[float]:
        """What each expert scores on its own task."""
        pairs = enumerate(self.models)
        return [self.scores(model, part, [task])[0] for task, model in pairs]

    def merged(self, rule: Rule, count: int, seed: int = 0) -> Tensor:
        """The first ``count`` experts merged by a rule (D,)."""
        models = [{"all": model} for model in self.models[:count]]
        return merge({"all": self.base}, models, rule, seed=seed)["all"]  # type: ignore[index]

    def search(
        self, rules: Sequence[Rule], scales: Sequence[float], count: int, seed: int = 0
    ) -> Chosen:
        """The rule and the scale of least mean validation score on the first ``count`` tasks.

        Each rule merges once, at a scale of 1: what it adds to the base is then scaled.

        Args:
            rules: settings to try, each with a scale of 1.
            scales: to try with each.
            count: of experts.
            seed: of random masks.
        """
        tried, scores = [], []
        for place, rule in enumerate(rules):
            whole = self.merged(rule, count, seed)
            for scale in scales:
                numbers = torch.lerp(self.base, whole, scale)
                scores.append(self.mean(numbers, "validation", count))
                tried.append((numbers, place, scale))
        return Chosen(*tried[scores.index(min(scores))], scores)


def load(bed: str, rate: float, seed: int, scale: str = "cpu", count: int | None = None) -> Experts:
    """Train the experts of a seed.

    Args:
        bed: "images" or "texts".
        rate: learning rate at its highest, of all experts.
        seed: of everything that is drawn.
        scale: "ci", "cpu" or "gpu".
        count: of experts; left out, one per task.

    Raises:
        ValueError: an unknown bed or scale.
    """
    if bed not in NAMES:
        raise ValueError(f"bed: choose one of {', '.join(NAMES)}, got {bed!r}")
    torch.set_num_threads(1)
    tasks, network, draws, judge = (_images if bed == "images" else _texts)(seed, scale)
    steps = SIZES[bed][arms.sizes_of(scale)].steps
    loss = F.cross_entropy if bed == "images" else characters.loss

    def trained(draw: Callable[[int], Iterable[tuple[Tensor, Tensor]]]) -> Tensor:
        model, whole = network(), arms.Arm("all")
        arms.learn(
            model, whole, rate, seed, draw, loss, steps=steps, decay=rates.cosine, targets=()
        )
        return _flat(model)

    models = tuple(trained(draw) for draw in draws[:count])
    return Experts(tasks, network(), _flat(network()), models, judge)


def first(bed: str, arm: str, rate: float, seed: int, scale: str = "cpu") -> dict[str, float]:
    """What the seed's first expert scores on its own task, as a job; ``arm`` is a label."""
    return {"validation": load(bed, rate, seed, scale, count=1).own("validation")[0]}


def _flat(model: nn.Module) -> Tensor:
    """All numbers of a network (D,). Neither network has a buffer that counts."""
    return parameters_to_vector(model.parameters()).detach().clone()


def _dealt(count: int, hands: int, each: int, draws: torch.Generator) -> list[Tensor]:
    """Places below ``count``, as many hands of ``each``; no place is dealt twice."""
    return list(torch.randperm(count, generator=draws)[: hands * each].split(each))


def _images(seed: int, scale: str) -> Any:
    """Tasks, a maker of networks, a stream of batches per task, the judge."""
    this, size = digits.size(scale), SIZES["images"][arms.sizes_of(scale)]
    every = digits.load(scale)
    order = torch.randperm(len(SHIFTS), generator=generator(seed, "order of the tasks"))
    tasks = tuple(list(SHIFTS)[i] for i in order.tolist())
    x, y = every.pool
    own = _dealt(len(y), len(tasks), this.examples, generator(seed, "examples"))
    pairs = [(SHIFTS[task](x[rows]), y[rows]) for task, rows in zip(tasks, own, strict=True)]
    judging = {
        part: _dealt(
            len(getattr(every, part)[1]), len(tasks), getattr(size, part), generator(seed, part)
        )
        for part in ("validation", "test")
    }  # fmt: skip

    def draw(count: int, pair: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        draws = generator(seed, "batches")
        for _ in range(count):
            rows = torch.randint(len(pair[1]), (this.batch,), generator=draws)
            yield pair[0][rows], pair[1][rows]

    def judge(network: nn.Module, part: str, task: int) -> float:
        images, labels = getattr(every, part)
        rows = judging[part][task]
        outputs = arms.scores(network, SHIFTS[tasks[task]](images[rows]))
        return 100 - arms.judged(outputs, labels[rows])["accuracy"]

    streams = [functools.partial(draw, pair=pair) for pair in pairs]
    return tasks, functools.partial(digits.network, "vit", scale), streams, judge


@functools.lru_cache(maxsize=2)
def _reviews(scale: str) -> dict[str, Tensor]:
    """SST-2's sentences as symbols: ``train`` (n,), windows of ``validation`` and ``test``."""
    context = characters.size(scale).context
    tables = tiny_text.tables() if scale == "ci" else data.load("sst2")
    texts = {
        part: characters.numbers("\n".join(
            line for line in tables[name].sentence if set(line) <= set(characters.ALPHABET)
        ))
        for part, name in {"train": "train", "validation": "dev", "test": "test"}.items()
    }  # fmt: skip
    return {
        part: text if part == "train" else characters.windows(text, context, len(text))
        for part, text in texts.items()
    }


def _texts(seed: int, scale: str) -> Any:
    """As :func:`_images`."""
    this, size = characters.size(scale), SIZES["texts"][arms.sizes_of(scale)]
    abstracts, reviews = characters.load(scale), _reviews(scale)
    both = {
        part: {"abstracts": getattr(abstracts, part), "reviews": reviews[part]}
        for part in ("train", "validation", "test")
    }
    order = torch.randperm(len(TEXTS), generator=generator(seed, "order of the tasks"))
    tasks = tuple(TEXTS[i] for i in order.tolist())
    judging = {
        part: [
            both[part][task][_dealt(len(both[part][task]), 1, getattr(size, part), draws)[0]]
            for task in tasks
        ]
        for part, draws in ((part, generator(seed, part)) for part in ("validation", "test"))
    }  # fmt: skip

    def draw(count: int, text: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        draws = generator(seed, "windows")
        return characters.batches(text, count, this.batch, this.context, draws)

    def judge(network: nn.Module, part: str, task: int) -> float:
        return characters.nats(network, judging[part][task])

    streams = [functools.partial(draw, text=both["train"][task]) for task in tasks]
    return tasks, functools.partial(characters.network, scale), streams, judge
