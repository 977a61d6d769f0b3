"""One training loop for labs: a model, a method on it or none, batches, a loss or a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.put import adapt, trained_beside
from toolkit.core.seeds import generator


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
