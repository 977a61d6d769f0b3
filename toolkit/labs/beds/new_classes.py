"""Handwritten digits that a small ViT has never seen: it knows 0 to 4, and learns 5 to 9.

The base reads the digits 0 to 4 of MNIST. It gets a head of zeros with five outputs, and few
images of each new digit. Judged on the 4,861 test images of 5 to 9 by log-loss and accuracy.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core import nets
from toolkit.core.seeds import generator
from toolkit.core.train import rates
from toolkit.core.train.fit import fit
from toolkit.labs.beds import arms, bases, images
from toolkit.labs.beds.arms import Arm

JUDGED = images.JUDGED
SPLITS = (0,)
KNOWN = 5
"""Classes that the base knows, the digits below it; as many are new."""
EXAMPLES = {"ci": 16, "cpu": 64}
"""Images of each new class."""
STEPS = {"ci": 30, "cpu": 150}
PRETRAINING = {"ci": 120, "cpu": 1500}
START = {"head": 1.6e-2, "lora": 2e-3, "full": 1e-3, "full_twice": 1e-3}
"""Middle of the first rates tried."""
RATES = {"head": 0.128, "lora": 2e-3, "full": 1e-3, "full_twice": 5e-4}
"""What the search found, as :mod:`toolkit.labs.beds.rates` says; for ``cpu`` and ``gpu``."""


def load(scale: str = "cpu", new: bool = True) -> images.Parts:
    """The parts of :func:`toolkit.labs.beds.images.load`, of the new digits or of those known.

    Labels count from 0 for both.

    Raises:
        ValueError, toolkit.core.data.DataError: as there.
    """

    def of(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = part
        kept = (y >= KNOWN) == new
        return x[kept], y[kept] - KNOWN * new

    return images.Parts(*map(of, images.load(scale)))


def empty(scale: str, draws: torch.Generator | None = None) -> Any:
    """A network of the bed without its training.

    Raises:
        ValueError: an unknown scale.
    """
    this = images.size(scale)
    return nets.digits_transformer(this.width, this.depth, 4, KNOWN, 7, 28, generator=draws)


def pretrain(scale: str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The base: Adam on 0 to 4, moved by up to 2 pixels, 64 a step, the rate falling along half a
    cosine from 2e-3."""
    parts, draws = load(scale, new=False), bases.seeded()
    model, steps = empty(scale, draws), PRETRAINING[arms.sizes_of(scale)]
    x, y = parts.pool

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(steps):
            rows = torch.randint(len(y), (64,), generator=draws)
            yield images.moved(x[rows], 2, draws), y[rows]

    fit(
        model, None, 1e-2 if scale == "ci" else 2e-3, 0, stream(), F.cross_entropy, steps=steps,
        decay=lambda step, of: arms.warm(step, of) * rates.cosine(step, of),
    )  # fmt: skip
    reached = arms.judged(arms.scores(bases.restored(model), parts.test[0]), parts.test[1])
    return model, {
        "quantity": "accuracy (%) on test images of 0 to 4",
        "reached": reached["accuracy"],
    }


@functools.lru_cache(maxsize=2)
def base(scale: str = "cpu") -> nn.Module:
    """The network that knows 0 to 4; at ``ci`` trained on the spot."""
    if scale == "ci":
        return pretrain("ci")[0].eval()
    return bases.fill(empty(scale), "images_vit_known")


def network(scale: str = "cpu") -> Any:
    """A fresh copy of the base with a head of zeros for the new digits."""
    model = arms.fresh(base(scale))
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.zero_()
    return model


def train(
    arm: str | Arm,
    rate: float,
    seed: int,
    *,
    scale: str = "cpu",
    rank: int = 8,
    examples: int | None = None,
    steps: int | None = None,
    beside: tuple[str, ...] = ("head",),
    parts: tuple[str, ...] = ("validation", "test"),
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Teach the base the digits 5 to 9, 32 images a step (16 at ``ci``).

    Every seed draws its own examples of each class from the pool, and their order; the rate falls
    along half a cosine after the warm-up.

    Args:
        arm: a reference arm by name, or :class:`~toolkit.labs.beds.arms.Arm` with any method.
        rate: learning rate at its highest.
        seed: of the examples, their order and the method's start.
        scale: "ci", "cpu" or "gpu".
        rank: of LoRA.
        examples: of each class, instead of the scale's; ``steps`` likewise.
        beside: parameters that train beside a method.
        parts: which of "validation" and "test" to judge.

    Returns:
        The network, the method's handle or None, and a record: ``validation`` and ``test`` log-loss
        in nats, ``validation_accuracy`` and ``test_accuracy`` in percent, ``trained`` numbers.
    """
    torch.set_num_threads(1)
    arm, sizes, every = arms.named(arm, rank), arms.sizes_of(scale), load(scale)
    model, (x, y) = network(scale), every.pool
    each, batch = examples or EXAMPLES[sizes], images.size(scale).batch
    mixed = torch.randperm(len(y), generator=generator(seed, "examples"))
    chosen = torch.cat([mixed[y[mixed] == label][:each] for label in range(KNOWN)])
    x, y = x[chosen], y[chosen]

    def draw(count: int) -> Iterator[tuple[Tensor, Tensor]]:
        order, left = generator(seed, "order"), torch.empty(0, dtype=torch.int64)
        for _ in range(count):
            while len(left) < batch:
                left = torch.cat([left, torch.randperm(len(y), generator=order)])
            rows, left = left[:batch], left[batch:]
            yield x[rows], y[rows]

    adapted, trained = arms.learn(
        model, arm, rate, seed, draw, F.cross_entropy, steps=steps or STEPS[sizes],
        decay=rates.cosine, targets=images.TARGETS["vit"], beside=beside,
    )  # fmt: skip
    record: dict[str, Any] = {}
    for part in parts:
        inputs, labels = getattr(every, part)
        found = arms.judged(arms.scores(model, inputs), labels)
        record |= {part: found["loss"], f"{part}_accuracy": found["accuracy"]}
    return model, adapted, record | {"trained": trained}


def adapt(
    arm: str, rate: float, seed: int, scale: str = "cpu", rank: int = 8, split: int = 0,
    parts: tuple[str, ...] = ("validation", "test"),
) -> dict[str, Any]:  # fmt: skip
    """A reference arm as a job; see :func:`train`. There is one split, 0."""
    return train(arm, rate, seed, scale=scale, rank=rank, parts=tuple(parts))[2]
