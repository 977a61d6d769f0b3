"""Which optimizer really steps, and which optimizers a method that acts around steps can drive."""

from __future__ import annotations

from typing import Any

import torch

PASSING_ON = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")
"""Packages whose optimizers do no more than call the one inside."""


def unwrap(optimizer: Any) -> Any:
    """The innermost object with parameter groups: what holds the tensors.

    Raises:
        TypeError: there is none.
    """
    inner = optimizer
    for name in ("optimizer", "base_optimizer", "base"):
        inside = getattr(inner, name, None)
        inner = inside if isinstance(inside, torch.optim.Optimizer) else inner
    if not isinstance(getattr(inner, "param_groups", None), list):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    return inner


def driven(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer whose ``step`` moves the tensors, for a method that acts around it.

    Accelerate, Lightning and Fabric wrap it; a SAM that has a ``base_optimizer`` over the same
    groups steps through that one, so the method sees the second gradient only.

    Raises:
        TypeError: it is none, or one whose step is more than: read each gradient once, move each
            tensor once. The message names what to use instead.
    """
    outer = optimizer
    name = type(outer).__name__
    base = getattr(outer, "base_optimizer", None)
    if isinstance(base, torch.optim.Optimizer):
        if base.param_groups is not outer.param_groups:
            raise TypeError(
                f"{name} moves the tensors through its base_optimizer, but has groups of its own, "
                "which would miss tensors that grow; call attach(optimizer.base_optimizer) first, "
                f"and then build {name}"
            )
        if getattr(outer, "decouple", False):
            raise TypeError(
                f"{name} with decouple=True moves the tensors again after its base_optimizer has "
                "stepped, so what the method decided would not last; use decouple=False"
            )
        return driven(base)
    inner = getattr(outer, "optimizer", None)
    if isinstance(getattr(inner, "param_groups", None), list):
        if not _passes_on(outer, inner):
            raise TypeError(
                f"{name} does more with the tensors than {type(inner).__name__} inside it, such as "
                "averaging them, which would undo what the method decides and knows no tensors "
                f"that grow; attach and step {type(inner).__name__} alone"
            )
        return driven(inner)
    if not isinstance(outer, torch.optim.Optimizer):
        more = (
            "; it averages weights beside one, so attach and step a plain one, such as AdamW"
            if hasattr(outer, "param_groups")
            else ""
        )
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {name}{more}")
    if isinstance(outer, torch.optim.LBFGS):
        raise TypeError(
            f"{name} calls its closure several times in a step and moves the tensors in between, "
            "so no gradient is the one that the method should act on; use an optimizer that calls "
            "it once, such as AdamW"
        )
    averages = all(callable(getattr(outer, verb, None)) for verb in ("train", "eval"))
    if averages or "schedulefree" in name.lower():
        raise TypeError(
            f"{name} holds two sets of weights, those that train and their average, and the method "
            "acts on one of them only; use AdamW with a learning-rate schedule"
        )
    if not hasattr(outer, "_optimizer_step_pre_hooks"):
        raise TypeError(
            f"{name} has no step hooks, as it never called torch.optim.Optimizer.__init__; attach "
            "the optimizer inside it"
        )
    return outer


def _passes_on(outer: Any, inner: Any) -> bool:
    """Whether a wrapper's step is no more than the step of what it wraps."""
    if any(c.__module__.partition(".")[0] in PASSING_ON for c in type(outer).__mro__):
        return True
    if "lookahead" in type(outer).__name__.lower():
        return False
    foreign = getattr(outer, "state", inner.state) is not inner.state
    return not (foreign or isinstance(outer, torch.optim.Optimizer))


def fresh(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer | None:
    """An optimizer of the same class and options over one number, as it is when it is built.

    It tells what the class itself keeps from the start: state for each tensor (torch's Adagrad), or
    an ``initial_lr``, which otherwise only schedulers write (Composer's DecoupledAdamW).

    Returns:
        None for a class that is built from something else.
    """
    rate = {"lr": optimizer.defaults["lr"]} if "lr" in optimizer.defaults else {}
    for options in (optimizer.defaults, rate):
        try:
            return type(optimizer)([torch.zeros(1, requires_grad=True)], **options)
        except Exception:  # of a constructor that is not ours: AdamW's takes not all its defaults
            continue
    return None
