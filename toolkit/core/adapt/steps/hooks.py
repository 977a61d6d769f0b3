"""What a method does around each optimizer step, through the optimizer's own hooks.

Because the hooks belong to the optimizer, any training loop works unchanged: a plain one,
``transformers.Trainer``, Lightning or Accelerate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from toolkit.core.adapt.steps.controller import Controller


def unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer whose ``step`` really runs: Accelerate wraps it."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    base = getattr(inner, "base_optimizer", None)
    if isinstance(base, torch.optim.Optimizer):
        raise TypeError(
            f"{type(inner).__name__} moves the tensors through its base_optimizer; hooks on the "
            "outer one may never be called; call attach(optimizer.base_optimizer)"
        )
    return inner


def check_holds(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]
) -> None:
    """Raise ValueError unless the optimizer holds every named tensor."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in named if id(p) not in held]
    if missing:
        raise ValueError(
            f"optimizer holds none of {missing[:3]}{' ...' if len(missing) > 3 else ''} "
            f"({len(missing)} trained tensors missing); build it from adapted.parameters()"
        )


def group_of(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> int:
    """Position of the one group that holds all tensors."""
    where = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
    found: dict[int, str] = {}
    for name, p in named.items():
        found.setdefault(where[id(p)], name)
    if len(found) != 1:
        raise ValueError(
            f"the adapters' tensors lie in {len(found)} parameter groups of the optimizer (for "
            f"example {list(found.values())[:2]}); tensors that grow later copy the settings of "
            "one group, so give all tensors of the adapters to one group"
        )
    return next(iter(found))


def register(optimizer: torch.optim.Optimizer, controller: Controller) -> None:
    """Call the controller around every step of the optimizer."""

    def before(_: Any, args: tuple, kwargs: dict) -> None:
        # args[0] is the optimizer itself
        if any(a is not None for a in args[1:]) or kwargs.get("closure") is not None:
            raise RuntimeError(
                "optimizer.step(closure) computes gradients after the method has read them; call "
                "backward() yourself and then optimizer.step()"
            )
        controller.before_step()

    def after(*_: Any) -> None:
        controller.after_step()

    handles = [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(after),
    ]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    controller.hooked(remove)
