"""One choice of weights on one task: adapt, train, judge target and source."""

from __future__ import annotations

from typing import Any

import torch

from toolkit.core.adapt.put import adapt
from toolkit.core.baselines.bitfit import Train
from toolkit.core.baselines.sparse_mask import SparseMask
from toolkit.core.seeds import generator
from toolkit.core.train.fit import optimise, set_rate
from toolkit.core.train.rates import cosine
from toolkit.labs.beds import arms
from toolkit.labs.select.choices.draws import SIZES, Size, Task, draw
from toolkit.lowrank.lora import LoRA
from toolkit.select.id3 import ID3
from toolkit.select.sara import SaRA
from toolkit.select.snella import SNELLA
from toolkit.select.spt import SPT

CHECKS = (0.1, 0.2, 0.4, 0.7, 1.0)
"""Shares of a run at which target and source are both looked at."""
SCORED = 8
"""Batches that a choice by data reads before the first step."""


def room(task: Task) -> int:
    """Entries that are chosen from."""
    return sum(task.model.get_submodule(n).weight.numel() for n in task.layers)


def biases(task: Task) -> list[str]:
    """Names of the biases beside them."""
    return [f"{n}.bias" for n in task.layers]


def equal(task: Task) -> int:
    """The budget of images and abstracts: as many entries as biases."""
    return sum(task.model.get_parameter(n).numel() for n in biases(task))


def dress(task: Task, choice: str, budget: int, seed: int, steps: int, batch: int) -> Any:
    """Adapt the task's network by one choice, in place; 0 takes :func:`equal` as budget.

    A share is rounded up in every matrix, so half an entry is taken off before.
    """
    model, names, budget = task.model, task.layers, budget or equal(task)
    share = (budget - 0.5) / room(task)
    rows = torch.randperm(len(task.y), generator=generator(seed, "scored"))[: batch * SCORED]
    read: dict[str, Any] = {
        "batches": [(task.x[r], task.y[r]) for r in rows.chunk(SCORED)],
        "loss": lambda model, batch: task.loss(model(batch[0]), batch[1]),
    }  # fmt: skip
    methods: dict[str, Any] = {
        "smallest": lambda: SaRA(share=share, switch=None, rank_weight=0.0),
        "static": lambda: ID3(budget=budget, schedule="once"),
        "id3": lambda: ID3(budget=budget),
        "snella": lambda: SNELLA(
            rank=4, target_sparsity=1 - budget / room(task), interval=max(1, steps // 12),
            final=steps // 6, recompute=False,
        ),
        "lora": lambda: LoRA(rank=1, alpha=2.0),
        "spt": lambda: SPT(budget=budget, rank=4, dropout=0.0, drop_path=0.0).plan(
            model, targets=names, **read
        ),
    }  # fmt: skip
    whole: dict[str, Any] = {"biases": biases(task), "head": "head.*", "full": "*"}
    if choice in whole:
        return adapt(model, Train(), whole[choice])
    by: Any = choice
    method = methods[choice]() if choice in methods else SparseMask(share=share, by=by)
    targets: Any = None if choice == "spt" else names
    if choice == "lora":
        targets = [n for n in names if n.endswith((".query", ".value", ".up"))]
    scored = read if choice in ("gradient", "fisher") else {}
    return adapt(model, method, targets, generator=generator(seed, "init"), **scored)


@torch.no_grad()
def judged(task: Task, part: str, count: int) -> float:
    """Log-loss in nats on the first examples of a part."""
    x, y = (t[:count] for t in task.parts[part])
    return task.loss(arms.scores(task.model, x, 100), y).item()


def run(
    arm: str, task: str, choice: str, budget: int, rate: float, seed: int, scale: str, part: str
) -> dict[str, Any]:
    """One choice on one task, judged on "validation", or on "test" and the source.

    ``targets``, ``sources``: both losses on a few examples, from before the first step on.
    ``changed``: entries of the merged network that are not what they were.
    """
    torch.set_num_threads(1)
    this, made = SIZES[task], draw(task, seed, scale)
    steps = 2 if scale == "ci" else this.steps
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    watched = ("test", "source") if part == "test" else ()
    curve = {seen: [judged(made, seen, this.watched)] for seen in watched}
    adapted = None if choice == "nothing" else dress(made, choice, budget, seed, steps, this.batch)
    if adapted is not None:
        _train(made, adapted, rate, seed, steps, this, curve)
    found: dict[str, Any] = {part: judged(made, part, getattr(this, part))}
    if part == "test":
        found["source"] = judged(made, "source", this.source)
        found |= {"targets": curve["test"], "sources": curve["source"]}
    found["trained"] = 0 if adapted is None else adapted.costs()["trained"]
    model = made.model if adapted is None else adapted.merge()
    after = dict(model.named_parameters())
    found["changed"] = sum(int((after[n] != p).sum()) for n, p in before.items())
    return found


def _train(
    task: Task, adapted: Any, rate: float, seed: int, steps: int, this: Size, curve: dict
) -> None:
    """Adam without decay of weights; both losses at :data:`CHECKS` go into ``curve``."""
    optimizer = optimise(adapted.parameters(), rate)
    adapted.attach(optimizer, total_steps=steps)
    order = generator(seed, "order")
    moments = {max(1, round(share * steps)) for share in CHECKS}
    task.model.train()
    for step in range(steps):
        set_rate(optimizer, rate * arms.warm(step, steps) * cosine(step, steps))
        rows = torch.randint(len(task.y), (this.batch,), generator=order)
        optimizer.zero_grad()
        task.loss(task.model(task.x[rows]), task.y[rows]).backward()
        optimizer.step()
        if curve and step + 1 in moments:
            for part, losses in curve.items():
                losses.append(judged(task, part, this.watched))
            task.model.train()
    task.model.eval()
