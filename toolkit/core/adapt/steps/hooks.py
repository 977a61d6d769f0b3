"""What a method does around each optimizer step, through the optimizer's own hooks.

Because the hooks belong to the optimizer, any training loop works unchanged: a plain one,
``transformers.Trainer``, Lightning, skorch or Accelerate, with ``step()`` or ``step(closure)``.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from toolkit.core.adapt.steps.controller import Controller
from toolkit.core.adapt.steps.gradients import finite, present, refuse_scaler, skipped


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


def check_shares(optimizer: torch.optim.Optimizer, title: str, exclusive: bool) -> None:
    """Raise ValueError where an optimizer that is driven already cannot be driven by another."""
    for hook in optimizer._optimizer_step_pre_hooks.values():
        other = getattr(hook, "__self__", None)
        if isinstance(other, Driver) and (exclusive or other.controller.exclusive):
            raise ValueError(
                f"{title} cannot share this optimizer, which {other.controller.title} drives "
                "already: one of them takes over what the optimizer does; give each its own"
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


class Driver:
    """Calls a controller around every step of one optimizer, once each.

    Before the optimizer moves anything, gradients are checked: there, dense, unscaled, finite in
    every trained tensor; a step that is refused has changed nothing. ``step(closure)`` runs the
    closure first and then the controller, so that it sees the gradients of the backward pass.

    Args:
        optimizer: what steps.
        controller: what acts.
        beside: tensors that the optimizer moves beside the controller's own, by name; their
            gradients must be finite too.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        controller: Controller,
        beside: dict[str, nn.Parameter],
    ):
        self.optimizer, self.controller, self.beside = optimizer, controller, beside
        self.acted = self.proven = False
        self.waits = False  # for a closure to be called
        self.began: tuple[Any, int] | None = None

    def before(self, _: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._nested():
            return None
        self._tidy()
        self.began = self.optimizer.state, len(self.optimizer.state)
        self.acted = self.waits = False
        if self._sets_up():
            return None
        refuse_scaler(self.optimizer, kwargs.get("grad_scaler"), self.controller.title)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self.act()
            return None
        closure, self.waits = self._acting(closure), True
        if kwargs.get("closure") is not None:
            return args, kwargs | {"closure": closure}
        return (args[0], closure, *args[2:]), kwargs

    def after(self, *_: Any) -> None:
        if self._nested():
            return
        self.began = None
        if self.waits:
            raise RuntimeError(
                f"{type(self.optimizer).__name__} did not call the closure it was given, so "
                f"{self.controller.title} did not act; call backward() and then step()"
            )
        if self.acted:
            self.acted, self.proven = False, True
            self.controller.after_step()

    @torch.no_grad()
    def act(self, may_lack: bool = False) -> None:
        """Let the controller act before the step, if its gradients are such as it can read.

        Args:
            may_lack: whether a step without any gradient is a step left out and no mistake.

        Raises:
            RuntimeError, TypeError, FloatingPointError: see
                :mod:`toolkit.core.adapt.steps.gradients`.
        """
        controller = self.controller
        try:
            if skipped(self.optimizer, controller.title):
                return
            if may_lack and all(p.grad is None for p in controller.trained.values()):
                return
            present(controller.trained, controller.title)
            controller.synchronise()
            named = controller.trained | self.beside
            finite({n: p.grad for n, p in named.items() if p.grad is not None}, controller.step)
            controller.before_step()
            self.acted = True
        finally:
            if not self.acted:
                controller.discard()

    def _acting(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """The closure, with what the method does before a step behind it."""
        held = None if self.proven else _Held(self.optimizer, self.controller)

        def acting(*args: Any, **kwargs: Any) -> Any:
            if not self.waits:
                name = type(self.optimizer).__name__
                if held is not None:
                    held.restore()
                raise RuntimeError(
                    f"{name} calls its closure more than once in a step, and "
                    f"{self.controller.title} acts on the gradients of one backward pass; use an "
                    "optimizer that calls it once, such as AdamW"
                )
            result = closure(*args, **kwargs)
            self.waits = False
            # Lightning's closure returns None where a training_step left its batch out
            self.act(may_lack=result is None)
            return result

        return acting

    def _nested(self) -> bool:
        """Whether the step runs inside another one of the optimizer: torch calls the hooks of both.

        So it does where a subclass calls its parent's step.
        """
        calls_hooks = getattr(type(self.optimizer).step, "__code__", None)
        frame, found = sys._getframe(1), 0
        while frame is not None and found < 2:
            if frame.f_code is calls_hooks:
                found += (frame.f_locals.get("args") or (None,))[0] is self.optimizer
            frame = frame.f_back
        return found > 1

    def _sets_up(self) -> bool:
        """Whether a step at rate 0, on gradients of 0, only makes the optimizer's state.

        So ``torch.distributed.checkpoint`` does before it saves or loads; for a method it is no
        step.
        """
        groups = self.optimizer.param_groups
        if self.optimizer.state or any(g.get("lr", 1) != 0 for g in groups if g["params"]):
            return False
        grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        return bool(grads) and not any(bool(grad.any()) for grad in grads)

    def _tidy(self) -> None:
        """After a step that was broken off: drop state that may be half made, undo what is laid."""
        if self.began is None:
            return
        state, known = self.began
        self.began = None
        if state is self.optimizer.state:
            for tensor in list(state)[known:]:
                del state[tensor]
        self.controller.undo()


class _Held:
    """What a step may change, copied: taken once, at the first step with a closure."""

    def __init__(self, optimizer: torch.optim.Optimizer, controller: Controller):
        self.optimizer, self.controller = optimizer, controller
        self.tensors = [p for group in optimizer.param_groups for p in group["params"]]
        self.values = [p.detach().clone() for p in self.tensors]
        self.groups = [
            {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups
        ]
        self.state = {p: copy.deepcopy(s) for p, s in optimizer.state.items()}
        self.schedule = {name: t.detach().clone() for name, t in controller.state().items()}

    @torch.no_grad()
    def restore(self) -> None:
        self.controller.undo()
        self.controller.load(self.schedule)
        torch._foreach_copy_(self.tensors, self.values)
        for group, held in zip(self.optimizer.param_groups, self.groups, strict=True):
            group.update(held)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)


def register(
    optimizer: torch.optim.Optimizer,
    controller: Controller,
    extra: Mapping[str, nn.Parameter] | None = None,
) -> None:
    """Call the controller around every step of the optimizer.

    Args:
        optimizer: see :func:`~toolkit.core.adapt.steps.wrappers.driven`.
        controller: what acts.
        extra: what trains beside the controller's own tensors, by name.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    beside = {name: p for name, p in (extra or {}).items() if id(p) in held}
    driver = Driver(optimizer, controller, beside)
    handles = [
        optimizer.register_step_pre_hook(driver.before),
        optimizer.register_step_post_hook(driver.after),
    ]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    controller.hooked(remove)
