"""Changes that happen whole or not at all, even where an interrupt breaks them off half way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

Result = TypeVar("Result")


def whole(containers: Iterable[Any], change: Callable[[], Result]) -> Result:
    """Run a change; if it raises, give all containers back what they held, and raise on.

    Args:
        containers: dictionaries, lists and sets, whose entries the change may replace but must not
            write into.
        change: called without arguments.
    """
    before = [(c, c.copy() if isinstance(c, dict | set) else list(c)) for c in containers]
    try:
        return change()
    except BaseException:  # a KeyboardInterrupt too
        for container, held in before:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(held)
        raise


def of_modules(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """The containers in which modules hold their tensors and attributes."""
    for module in modules:
        yield vars(module)
        yield module._parameters
        yield module._buffers
        yield module._non_persistent_buffers_set


def of_optimizer(optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    """The containers in which an optimizer holds its groups."""
    yield optimizer.param_groups
    for group in optimizer.param_groups:
        yield group
        yield from (v for v in group.values() if isinstance(v, list))
