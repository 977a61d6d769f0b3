"""Test beds that several chapters share, so that their numbers can be put side by side.

Three tasks, each with a known difficulty: a teacher with planted ranks (is rank spent where it is
missing?), handwritten digits after a turn, with as many wrong labels as wanted (does a method
memorise?), and, in :mod:`toolkit.core.text_beds`, sentences with a pretrained transformer. One
training loop serves the first two. Nothing here knows a method by name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core import data, nets
from toolkit.core.adapted import adapt, trained_beside
from toolkit.core.seeds import generator

PLANTED = (0, 6, 0, 2, 0)
"""Planted ranks of the five layers."""
WIDTHS = (32, 48, 48, 48, 48, 8)


def linear(step: int, steps: int) -> float:
    """Share of the learning rate at a step, falling linearly from 1 to 0."""
    return 1 - step / steps


def cosine(step: int, steps: int) -> float:
    """Share of the learning rate at a step, falling along half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def dress(
    model: nn.Module, method: Any, seed: int, targets: Any = None, train: Sequence[str] = ()
) -> tuple[Any, list]:
    """A model with a method on it, and the tensors to train.

    Args:
        model: changed in place.
        method: a method, or None for plain fine-tuning.
        seed: of the method's start.
        targets: layers, as :func:`toolkit.adapt` takes them.
        train: parameters that train beside the method, as :func:`toolkit.adapt` takes them.
            Without a method, these alone train; with neither, everything does.

    Returns:
        The handle (None for plain fine-tuning) and the list of parameters.

    Raises:
        ValueError: an entry of ``train`` names no parameter.
    """
    if method is not None:
        adapted = adapt(model, method, targets, train=train, generator=generator(seed, "init"))
        return adapted, adapted.parameters()
    parameters = trained_beside(model, train).values() if train else model.parameters()
    parameters = list(parameters)
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return None, parameters


def optimise(parameters: Sequence[Tensor], rate: float, sgd: bool = False) -> Any:
    """Adam, or plain gradient descent for methods that bring their own moments."""
    if sgd:
        return torch.optim.SGD(parameters, lr=rate)
    return torch.optim.Adam(parameters, lr=rate, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group this learning rate, as a scheduler would."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def fit(
    model: nn.Module,
    method: Any,
    rate: float,
    seed: int,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    decay: Callable[[int, int], float],
    targets: Any = None,
    train: Sequence[str] = (),
    training: bool = True,
    sgd: bool = False,
    options: Mapping[str, Any] | None = None,
    step: Callable[..., Tensor] | None = None,
    watch: Callable[..., None] | None = None,
) -> tuple[Any, list[float]]:
    """The training loop of the beds.

    Args:
        model: changed in place.
        method: a method, or None for full fine-tuning.
        rate: learning rate at the start.
        seed: of the method's start.
        batches: ``steps`` pairs of inputs and targets.
        loss: of outputs and targets.
        steps: optimizer steps.
        decay: share of the rate at each step.
        targets: layers to adapt, as :func:`toolkit.adapt` takes them; None takes all.
        train: see :func:`dress`.
        training: put the model into training mode; False keeps the running statistics of its
            normalisations as they are.
        sgd: plain gradient descent instead of Adam.
        options: passed to ``adapted.attach``.
        step: replaces one step; called with a function that returns the loss, the optimizer and
            the handle, it must leave the weights stepped and return the loss. For methods that
            need two passes.
        watch: called with the step, the handle and the model after each step.

    Returns:
        The handle (None for full fine-tuning) and the loss of every step.
    """
    adapted, parameters = dress(model, method, seed, targets, train)
    optimizer = optimise(parameters, rate, sgd)
    if adapted is not None:
        adapted.attach(optimizer, total_steps=steps, **(options or {}))
    losses = []
    model.train(training)
    for number, (x, y) in enumerate(batches):
        set_rate(optimizer, rate * decay(number, steps))
        if step is None:
            optimizer.zero_grad()
            value = loss(model(x), y)
            value.backward()
            optimizer.step()
        else:
            value = step(lambda x=x, y=y: loss(model(x), y), optimizer, adapted)
        losses.append(value.detach())
        if watch is not None:
            watch(number, adapted, model)
    model.eval()
    return adapted, torch.stack(losses).tolist()


def planted_task(
    seed: int, ranks: Sequence[int] = PLANTED, widths: Sequence[int] = WIDTHS
) -> tuple[nn.Sequential, nn.Sequential]:
    """The student's network and its teacher, which differs from it by the planted ranks."""
    student, teacher = data.planted_teacher(ranks, widths, generator=generator(seed, "teacher"))
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


def planted_run(**job: Any) -> dict[str, Any]:
    """The record of :func:`planted_train`, for :func:`toolkit.core.trials.run_all`."""
    return planted_train(**job)[1]


def digits_run(**job: Any) -> dict[str, Any]:
    """The record of :func:`digits_train` without the losses, for ``trials.run_all``."""
    record = digits_train(**job)[2]
    return {key: value for key, value in record.items() if key != "losses"}
