"""Which parameters of the base train beside the adapters."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from toolkit.core.adapt import handles
from toolkit.core.adapt import targets as names


def trained_beside(
    model: nn.Module, train: Any, argument: str = "train"
) -> dict[str, nn.Parameter]:
    """The parameters of the base that patterns or a callable name, by name.

    A tied tensor goes by its first name; a warning says what else moves with it.

    Raises:
        ValueError: a pattern names no parameter.
    """
    if callable(train):
        return {name: p for name, p in handles.parameters(model) if train(name)}
    patterns = [train] if isinstance(train, str) else list(train)
    every = dict(handles.parameters(model, twice=True))
    named = [n for n in every if any(_covers(n, p) for p in patterns)]
    for pattern in patterns:
        if not any(_covers(n, pattern) for n in named):
            raise ValueError(
                f"{argument}={pattern!r} names no parameter of the model; its last ones are "
                f"{list(every)[-4:]}"
            )
    wanted = {id(every[name]) for name in named}
    found = {name: p for name, p in handles.parameters(model) if id(p) in wanted}
    for first, others in handles.also_called(model).items():
        unnamed = {first, *others} - set(named)
        if first in found and unnamed:
            warnings.warn(
                f"{argument}={train!r}: {sorted({first, *others} & set(named))} and "
                f"{sorted(unnamed)} are one tensor, so both move; untie them to train one alone",
                stacklevel=4,
            )
    return found


def _covers(name: str, pattern: str) -> bool:
    """A pattern covers a parameter by its own name or by that of a module that holds it."""
    parts = name.split(".")
    return any(names.matches(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))
