"""One run of one arm on the shared bed of spoken digits, and what can be seen before any run."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from toolkit.core.adapt.put import adapt
from toolkit.core.seeds import generator
from toolkit.core.train import rates
from toolkit.core.train.fit import fit
from toolkit.insert.petl_ast import ASTAdapter
from toolkit.labs.beds import arms as bed
from toolkit.labs.beds import speech
from toolkit.labs.insert.zoo.arms import PLACES, part, trains_beside

STEPS = {"ci": 2, "cpu": 30, "gpu": 30}
BATCH = 16


def split_of(seed: int) -> int:
    """The split of a seed: which two speakers the base has not heard."""
    return speech.SPLITS[seed % 3]


def shown(seed: int, scale: str, few: int | None) -> torch.Tensor:
    """Places of the recordings to train on: all ten of a digit and speaker, or ``few`` of them."""
    chosen = speech.rows(split_of(seed), seed, scale)["train"]
    each = speech.size(scale).examples
    return chosen if few is None else chosen.view(-1, each)[:, :few].flatten()


def run(
    arm: str, rate: float, seed: int, scale: str, judged: str, budget: str = "middle",
    few: int | None = None, like: str = "paper", start: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Adapt the base of a seed's split, and judge it.

    Args:
        arm: a family, a placement, "linear", "full" or "nothing".
        rate: learning rate at its highest.
        seed: of the split, the recordings, their order and the method's start.
        scale: of the bed.
        judged: "validation" or "test".
        budget: how many numbers train.
        few: recordings of a digit and speaker; None takes the bed's ten.
        like, start: of an adapter.

    Raises:
        FloatingPointError: the run diverged.
    """
    torch.set_num_threads(1)
    changes: dict[str, Any] = {"like": like} if like != "paper" else {}
    changes |= {"start": start} if start is not None else {}
    network, every = speech.network(split_of(seed), scale), speech.load(scale)
    if arm != "nothing":
        made, steps = part(arm, scale, budget, **changes), STEPS[scale]
        rows, order = shown(seed, scale, few), generator(seed, "order")
        fit(
            network, made and made.method, rate, seed,
            speech.batches(every, rows, steps, BATCH, order), F.cross_entropy,
            steps=steps, decay=lambda step, of: bed.warm(step, of) * rates.cosine(step, of),
            targets=made and made.targets, train=trains_beside(network, arm, made),
        )  # fmt: skip
    rows = speech.rows(split_of(seed), seed, scale)[judged]
    found = bed.judged(bed.scores(network, every.frames[rows]), every.digit[rows])
    if not found["loss"] < 100:
        raise FloatingPointError(f"log-loss {found['loss']}")
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return {"loss": found["loss"], "accuracy": found["accuracy"],
            "trained": 0 if arm == "nothing" else trained}  # fmt: skip


@torch.no_grad()
def untrained(arm: str, place: str, seed: int, scale: str) -> dict[str, Any]:
    """Test log-loss with an adapter in a place and not one step of training."""
    network, every = speech.network(split_of(seed), scale), speech.load(scale)
    rows = speech.rows(split_of(seed), 0, scale)["test"]
    if arm != "nothing":
        size = part("adapter", scale)
        assert size is not None
        method = ASTAdapter(
            "bottleneck",
            size.method.reduction,
            place=place,  # type: ignore[arg-type]
            **PLACES[arm],  # type: ignore[arg-type]
        )
        adapt(network, method, generator=generator(seed, "init"))
    found = bed.judged(bed.scores(network, every.frames[rows]), every.digit[rows])
    return {"loss": found["loss"], "accuracy": found["accuracy"]}


def alive(arm: str, inner: str, seed: int, scale: str) -> dict[str, Any]:
    """Which tensors of the first block's adapter have moved after a few steps, by their start."""
    network, every = speech.network(0, scale), speech.load(scale)
    start: Any = arm
    method = ASTAdapter(inner, 4, kernel=3, start=start)  # type: ignore[arg-type]
    adapted = adapt(network, method, generator=generator(seed, "init"))
    one = next(iter(adapted.adapters.values()))
    before = {name: p.detach().clone() for name, p in one.named_parameters()}
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=5e-3, weight_decay=0.1)
    rows, order = shown(seed, scale, None), generator(seed, "order")
    for x, y in speech.batches(every, rows, STEPS[scale], BATCH, order):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    moved = [n for n, p in one.named_parameters() if not torch.equal(p, before[n])]
    return {"moved": moved, "tensors": len(before)}
