"""The base of what a method does around each optimizer step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Controller:
    """Acts before and after a step; its state is tensors only, so that it can be saved.

    :class:`~toolkit.core.adapt.steps.hooks.Driver` calls it, once around each step whose gradients
    are there, dense, unscaled and finite.

    Attributes:
        method: the hyperparameters.
        names, layers: the adapted layers' names and adapters, in one order.
        step: steps done.
        exclusive: whether no other controller may share the optimizer, because this one takes
            over what the optimizer does. A method says the same by an attribute of this name.
        lengthening: beginnings of names in the state whose first dimension grows over a run.

    Args:
        method: the hyperparameters.
        layers: layer name -> its adapter.
        optimizer: what steps.
    """

    exclusive: ClassVar[bool] = False
    lengthening: ClassVar[tuple[str, ...]] = ()
    _unhook: Callable[[], None] = staticmethod(lambda: None)

    def __init__(
        self,
        method: Any,
        layers: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
    ):
        self.method, self.optimizer = method, optimizer
        self.names, self.layers = list(layers), list(layers.values())
        self.step = 0

    @property
    def title(self) -> str:
        """The method's name, for messages."""
        return self.method.info.title

    def named(self) -> dict[str, nn.Parameter]:
        """Every tensor of the adapters that trains now, by layer and leaf name."""
        pairs = zip(self.names, self.layers, strict=True)
        return {f"{n}.{leaf}": p for n, layer in pairs for leaf, p in layer.named_parameters()}

    @functools.cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        """:meth:`named`, kept: the tensors whose gradients are checked before each step."""
        return self.named()

    def synchronise(self) -> None:
        """Called before gradients are judged, so that all processes judge the same numbers."""

    def before_step(self) -> None:
        """Called before the optimizer moves anything; what it raises leaves all as it was."""

    def after_step(self) -> None:
        """Called when the optimizer has moved its tensors."""
        self.step += 1

    def undo(self) -> None:
        """Called when a step was broken off: take back what :meth:`before_step` had laid out."""

    def discard(self) -> None:
        """Called when a step is refused or left out: forget what its backward pass left, too."""
        self.undo()

    def hooked(self, unhook: Callable[[], None]) -> None:
        """Told by :func:`~toolkit.core.adapt.steps.hooks.register` how to let the optimizer go."""
        self._unhook = unhook

    def remove(self) -> None:
        """Let go of the optimizer, and take off what lies over the layers."""
        self._unhook()
        self.released()

    def released(self) -> None:
        """Called when the optimizer has been let go."""

    def state(self) -> dict[str, Tensor]:
        """All that the next steps depend on."""
        return {"step": torch.tensor(self.step)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a state.

        Raises:
            ValueError: it is the state of another method, or of other layers.
        """
        self.refuse_foreign(state)
        self.step = int(state["step"])

    def refuse_foreign(self, state: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless a saved state has the names and shapes of this one's."""
        own = self.state()
        for key in own.keys() | state.keys():
            ours, theirs = own.get(key), state.get(key)
            start = int(key.startswith(self.lengthening))
            if ours is None or theirs is None or ours.shape[start:] != theirs.shape[start:]:
                raise ValueError(
                    f"the saved schedule does not fit {self.title} on these {len(self.layers)} "
                    f"layers: {key!r} is {_shape(theirs)} there and {_shape(ours)} here; attach "
                    "with the method and options of the run that was saved"
                )


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"


class Several(Controller):
    """The controllers of several methods on one optimizer, one after the other."""

    def __init__(self, parts: Sequence[Controller]):
        self.parts = list(parts)
        self.exclusive = any(part.exclusive for part in self.parts)  # type: ignore[misc]

    @property
    def title(self) -> str:
        return " and ".join(part.title for part in self.parts)

    @property
    def step(self) -> int:  # type: ignore[override]
        """Steps done."""
        return self.parts[0].step

    @property
    def trained(self) -> dict[str, nn.Parameter]:  # type: ignore[override]
        return {name: p for part in self.parts for name, p in part.trained.items()}

    def synchronise(self) -> None:
        for part in self.parts:
            part.synchronise()

    def undo(self) -> None:
        for part in self.parts:
            part.undo()

    def discard(self) -> None:
        for part in self.parts:
            part.discard()

    def before_step(self) -> None:
        for part in self.parts:
            part.before_step()

    def after_step(self) -> None:
        for part in self.parts:
            part.after_step()

    def released(self) -> None:
        for part in self.parts:
            part.released()

    def state(self) -> dict[str, Tensor]:
        return {f"{i}.{k}": v for i, part in enumerate(self.parts) for k, v in part.state().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        for i, part in enumerate(self.parts):
            own = f"{i}."
            part.load({k.removeprefix(own): v for k, v in state.items() if k.startswith(own)})
