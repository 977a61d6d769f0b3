"""What works from outside: the bed's network answers images with scores, and shows nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.core.seeds import generator
from toolkit.labs.beds import arms, images
from toolkit.labs.insert.kinds.arms import SHIFT

STEPS = 200


def run(arm: str, rate: float, seed: int, scale: str, part: str) -> dict[str, Any]:
    """What learns from answers alone, starting as nothing; Adam on all examples at once.

    "map" is a linear map of the log-probabilities, "pair" a scale and a shift for each class. It
    asks once for each image: the seed's turned images, as in the arms inside.

    Returns:
        ``loss`` (nats) and ``accuracy`` (%) on the part, and ``trained`` numbers.
    """
    torch.set_num_threads(1)
    network, every = images.network("vit", scale), images.load(scale)
    x, y = every.pool
    chosen = torch.randperm(len(y), generator=generator(seed, "examples"))
    chosen = chosen[: images.size(scale).examples]
    answers = arms.scores(network, images.shifted(x[chosen], SHIFT)).log_softmax(1)
    mapped, trained = fitted(arm, answers, y[chosen], rate)
    turned, labels = getattr(every, part)
    with torch.no_grad():
        said = mapped(arms.scores(network, images.shifted(turned, SHIFT)).log_softmax(1))
    found = arms.judged(said, labels)
    return {"loss": found["loss"], "accuracy": found["accuracy"], "trained": trained}


def fitted(
    arm: str, answers: Tensor, y: Tensor, rate: float
) -> tuple[Callable[[Tensor], Tensor], int]:
    """What takes log-probabilities (n, classes) to scores, and how many numbers it has.

    Args:
        arm: "map" or "pair".
        answers: log-probabilities (n, classes); y: labels (n,).
        rate: of Adam.
    """
    classes = answers.shape[1]
    weight = torch.eye(classes) if arm == "map" else torch.ones(classes)
    weight, bias = weight.requires_grad_(), torch.zeros(classes, requires_grad=True)

    def mapped(answers: Tensor) -> Tensor:
        return (answers @ weight.T if arm == "map" else answers * weight) + bias

    optimizer = torch.optim.Adam([weight, bias], lr=rate)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(mapped(answers), y).backward()
        optimizer.step()
    return mapped, weight.numel() + bias.numel()
