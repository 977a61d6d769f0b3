"""How well a merged model does on each validation example, as breeding wants to know it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core.seeds import generator
from toolkit.labs.beds import arms, characters, expert_sentences, experts
from toolkit.labs.beds import images as digits

Answers: TypeAlias = Callable[[nn.Module, int], Tensor]
"""(network, number of the task) -> for each validation example a number in [0, 1] (n,)."""


def answers(bed: str, found: experts.Experts, seed: int, scale: str) -> Answers:
    """The validation examples of a seed's experts, the same that its judge asks.

    1 where an image is read right or a label found, else 0; of a window of text the geometric mean
    of its characters' probabilities; of a query its nDCG@10.
    """
    if isinstance(found.judge, expert_sentences.Judging):
        judge = found.judge
        return lambda network, task: judge.plain(network, "validation", task)
    return (_images if bed == "images" else _texts)(found, seed, scale)


def _images(found: experts.Experts, seed: int, scale: str) -> Answers:
    x, y = digits.load(scale).validation
    each = experts.SIZES["images"][arms.sizes_of(scale)].validation
    rows = experts._dealt(len(y), len(found.tasks), each, generator(seed, "validation"))

    def right(network: nn.Module, task: int) -> Tensor:
        images = experts.SHIFTS[found.tasks[task]](x[rows[task]])
        return (arms.scores(network, images).argmax(1) == y[rows[task]]).float()

    return right


def _texts(found: experts.Experts, seed: int, scale: str) -> Answers:
    each = experts.SIZES["texts"][arms.sizes_of(scale)].validation
    texts = {
        "abstracts": characters.load(scale).validation,
        "reviews": experts._reviews(scale)["validation"],
    }
    draws = generator(seed, "validation")
    windows = [
        texts[task][experts._dealt(len(texts[task]), 1, each, draws)[0]] for task in found.tasks
    ]

    @torch.no_grad()
    def likely(network: nn.Module, task: int) -> Tensor:
        network.eval()
        before, after = windows[task][:, :-1], windows[task][:, 1:]
        losses = F.cross_entropy(network(before).transpose(1, 2), after, reduction="none")
        return (-losses.mean(1)).exp()

    return likely
