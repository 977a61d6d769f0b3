"""Test beds that several chapters share, so that their numbers can be put side by side.

Three tasks, each with a known difficulty: a teacher with planted ranks (is rank spent where it is
missing?), handwritten digits after a turn, with as many wrong labels as wanted (does a method
memorise?), and, in :mod:`toolkit.labs.beds.sentences`, sentences with a pretrained transformer. One
training loop serves the first two. Nothing here knows a method by name.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core import data, nets
from toolkit.core.seeds import generator
from toolkit.core.train.fit import fit, set_rate
from toolkit.core.train.rates import cosine, linear

PLANTED = (0, 6, 0, 2, 0)
"""Planted ranks of the five layers."""
WIDTHS = (32, 48, 48, 48, 48, 8)


def planted_task(
    seed: int, ranks: Sequence[int] = PLANTED, widths: Sequence[int] = WIDTHS
) -> tuple[nn.Sequential, nn.Sequential]:
    """The student's network and its teacher, which differs from it by the planted ranks."""
    student, teacher = nets.planted_teacher(ranks, widths, generator=generator(seed, "teacher"))
    return student, teacher.requires_grad_(False)


@torch.no_grad()
def planted_error(
    student: nn.Module, teacher: nn.Module, seed: int, part: str = "test", count: int = 4096
) -> float:
    """Mean squared error on fresh inputs, relative to the variance of the teacher's outputs.

    1 is what always answering the mean would give. ``part`` names the stream of inputs: "test" or
    "validation".
    """
    x = torch.randn(count, teacher[0].in_features, generator=generator(seed, part))
    y = teacher(x)
    return ((student(x) - y).square().mean() / (y - y.mean(0)).square().mean()).item()


def planted_train(
    method: Any,
    rate: float,
    seed: int,
    *,
    steps: int = 1500,
    ranks: Sequence[int] = PLANTED,
    widths: Sequence[int] = WIDTHS,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """Train a student on the outputs of its planted teacher.

    Adam, 128 fresh inputs from a normal distribution a step, the rate falling linearly to 0: the
    same recipe, teachers and draws as in the chapter on AdaLoRA.

    Args:
        method: a method, or None for full fine-tuning.
        rate: learning rate at the start.
        seed: of teacher, inputs and the method's start.
        steps: optimizer steps.
        ranks: planted ranks; ``widths``: of the network.
        **options: see :func:`fit`.

    Returns:
        The handle (None for full fine-tuning) and a record: ``validation`` and ``test`` error,
        ``ranks`` at the end where the method's controller tells them, ``trained`` numbers.
    """
    torch.set_num_threads(1)  # networks this small are slower on two threads
    student, teacher = planted_task(seed, ranks, widths)
    x = torch.randn(steps, 128, widths[0], generator=generator(seed, "train"))
    adapted, _ = fit(
        student, method, rate, seed, zip(x, teacher(x), strict=True), F.mse_loss,
        steps=steps, decay=linear, **options,
    )  # fmt: skip
    record: dict[str, Any] = {
        part: planted_error(student, teacher, seed, part) for part in ("validation", "test")
    }
    return adapted, record | _facts(adapted, student)


def _facts(adapted: Any, model: nn.Module) -> dict[str, Any]:
    told = getattr(getattr(adapted, "controller", None), "ranks", None)
    parameters = model.parameters() if adapted is None else adapted.parameters()
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return {"trained": trained} | ({"ranks": list(told().values())} if told else {})


class Digits(NamedTuple):
    """Upright digits for a network that knows turned ones.

    ``model``: the network (64, 96, 96, 10), trained on digits turned by 90 degrees. ``x``:
    (examples, 64) training images, ``y``: their labels, some of them wrong; ``clean``: the right
    ones. ``validation`` and ``test``: pairs of images and right labels.
    """

    model: nn.Sequential
    x: Tensor
    y: Tensor
    clean: Tensor
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@functools.lru_cache(maxsize=32)
def _turned(seed: int, steps: int) -> nn.Sequential:
    images = data.digits()
    turned = torch.from_numpy(images.x_train[:1077]).rot90(1, (1, 2)).flatten(1)
    y = torch.from_numpy(images.y_train[:1077])
    model = nets.mlp((64, 96, 96, 10), generator=generator(seed, "base"))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, fused=True)
    draws = generator(seed, "turned")
    for step in range(steps):
        set_rate(optimizer, 3e-3 * linear(step, steps))
        rows = torch.randint(len(y), (64,), generator=draws)
        optimizer.zero_grad()
        F.cross_entropy(model(turned[rows]), y[rows]).backward()
        optimizer.step()
    return model.requires_grad_(False)


def digits_task(
    seed: int, *, examples: int | None = None, noise: float = 0.0, pretraining: int = 400
) -> Digits:
    """A network trained on turned digits, and upright digits to adapt it to.

    Args:
        seed: of the network, the choice of examples and the wrong labels.
        examples: training images, at most 1,077; None takes all.
        noise: share of training labels replaced by one of the ten classes at random, so a tenth
            of them stays right.
        pretraining: steps on the turned digits.

    Raises:
        ValueError: ``examples`` or ``noise`` out of range.
    """
    if examples is not None and not 1 <= examples <= 1077:
        raise ValueError(f"examples: must lie between 1 and 1077, got {examples}")
    if not 0 <= noise <= 1:
        raise ValueError(f"noise: a share between 0 and 1, got {noise}")
    images = data.digits()
    x, y = torch.from_numpy(images.x_train).flatten(1), torch.from_numpy(images.y_train)
    held, x, y = (x[1077:], y[1077:]), x[:1077], y[:1077]
    draws = generator(seed, "examples")
    rows = torch.randperm(len(y), generator=draws)[:examples]
    clean, noisy = y[rows], y[rows].clone()
    wrong = torch.randperm(len(rows), generator=draws)[: round(noise * len(rows))]
    noisy[wrong] = torch.randint(10, (len(wrong),), generator=draws)
    test = torch.from_numpy(images.x_test).flatten(1), torch.from_numpy(images.y_test)
    model = nets.mlp((64, 96, 96, 10))
    model.load_state_dict(_turned(seed, pretraining).state_dict())
    return Digits(model, x[rows], noisy, clean, held, test)


@torch.no_grad()
def accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Share of right answers, in percent."""
    x, y = part
    return 100 * (model(x).argmax(1) == y).float().mean().item()


def digits_train(
    method: Any,
    rate: float,
    seed: int,
    *,
    steps: int = 400,
    batch: int = 64,
    examples: int | None = None,
    noise: float = 0.0,
    **options: Any,
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Adapt the network of :func:`digits_task` to upright digits.

    Adam, ``batch`` images drawn at random a step, the rate falling along half a cosine to 0.

    Args:
        method: a method, or None for full fine-tuning.
        rate: learning rate at the start.
        seed: see :func:`digits_task`; also of the method's start and the order of images.
        steps: optimizer steps; ``batch``: images a step.
        examples, noise: see :func:`digits_task`.
        **options: see :func:`fit`.

    Returns:
        The model, the handle (None for full fine-tuning) and a record: ``validation`` and ``test``
        accuracy in percent on right labels, ``train`` loss on all training images with the labels
        they have, ``trained`` numbers, ``losses`` of every step.
    """
    torch.set_num_threads(1)
    task = digits_task(seed, examples=examples, noise=noise)
    rows = torch.randint(len(task.y), (steps, batch), generator=generator(seed, "order"))
    batches = ((task.x[r], task.y[r]) for r in rows)
    adapted, losses = fit(
        task.model, method, rate, seed, batches, F.cross_entropy,
        steps=steps, decay=cosine, **options,
    )  # fmt: skip
    with torch.no_grad():
        train = F.cross_entropy(task.model(task.x), task.y).item()
    record = {
        "validation": accuracy(task.model, task.validation),
        "test": accuracy(task.model, task.test),
        "train": train,
        "losses": losses,
    }
    return task.model, adapted, record | _facts(adapted, task.model)
