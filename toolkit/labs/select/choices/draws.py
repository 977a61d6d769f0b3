"""Three tasks that a network is adapted to, and what it knew before: targets and sources."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core import data
from toolkit.core.seeds import generator
from toolkit.labs.beds import characters, images, tasks

Pair = tuple[Tensor, Tensor]


class Size(NamedTuple):
    """Numbers of one task: steps and batch of a run, and how many examples are judged.

    ``watched``: on the way, of the target and of the source.
    """

    steps: int
    batch: int
    validation: int
    test: int
    source: int
    watched: int


SIZES = {
    "digits": Size(60, 32, 360, 360, 360, 100),
    "images": Size(40, 32, 500, 2000, 1000, 200),
    "abstracts": Size(30, 8, 49, 196, 98, 28),
}


class Task(NamedTuple):
    """One draw of a task: ``layers`` are the names of those whose weights are chosen from."""

    model: Any
    layers: list[str]
    x: Tensor
    y: Tensor
    parts: dict[str, Pair]
    loss: Callable[[Tensor, Tensor], Tensor]


def draw(task: str, seed: int, scale: str) -> Task:
    """A fresh base, the seed's examples, and what is judged: validation, test and source."""
    if task == "digits":
        made = tasks.digits_task(seed, pretraining=40 if scale == "ci" else 400)
        found = data.digits()
        turned = torch.from_numpy(found.x_test).rot90(1, (1, 2)).flatten(1)
        source = turned, torch.from_numpy(found.y_test)
        return _task(made.model, made.x, made.y, made.validation, made.test, source)
    if task == "images":
        every = images.load(scale)
        x, y = every.pool
        rows = torch.randperm(len(y), generator=generator(seed, "examples"))
        rows = rows[: images.size(scale).examples]
        seen = [(images.shifted(x, "rotated"), y) for x, y in (every.validation, every.test)]
        model = images.network("vit", scale)
        return _task(
            model, images.shifted(x[rows], "rotated"), y[rows], seen[0], seen[1], every.test
        )
    texts, context = characters.load(scale), characters.size(scale).context
    starts = torch.randint(len(texts.train) - context, (1000,), generator=generator(seed, "rows"))
    rest = characters.windows(texts.before_rest, context, 784)
    read = texts.train[starts[:, None] + torch.arange(context + 1)]
    (x, y), *held = (
        (rows[:, :-1], rows[:, 1:]) for rows in (read, texts.validation, texts.test, rest)
    )
    return _task(characters.network(scale), x, y, held[0], held[1], held[2], characters.loss)


def _task(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    validation: Pair,
    test: Pair,
    source: Pair,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Task:
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if hasattr(model, "blocks"):
        names = [n for n in names if n.startswith("blocks.")]
    parts = {"validation": validation, "test": test, "source": source}
    return Task(model, names, x, y, parts, loss)
