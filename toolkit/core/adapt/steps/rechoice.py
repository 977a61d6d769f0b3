"""Choosing again which entries of masked weights move, between two steps of any optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.steps.controller import Controller
from toolkit.core.adapt.steps.whole import of_modules, of_optimizer, whole


class ChoiceController(Controller):
    """A controller whose layers are :class:`~toolkit.core.adapt.rechosen.RechosenLayer`.

    The optimizer's groups stay, so a scheduler's rates stay too; their tensors are exchanged. Keep
    no list of the trained tensors: after a choice ask the model's handle for them anew.

    Attributes: ``bases`` (the frozen layers, in the order of ``layers``), and those of the base
    class.

    Args:
        method: the hyperparameters.
        share: the part of the model that the method acts on.
        optimizer: what steps.
    """

    def __init__(self, method: Any, share: Any, optimizer: torch.optim.Optimizer):
        super().__init__(method, share.adapters, optimizer)
        self.bases = [placed.layer.base for placed in share.sites.values()]

    @torch.no_grad()
    def rechoose(self, choices: Mapping[str, Tensor], keep: bool = True) -> None:
        """Let other entries move from the next step on: in all layers, or in none if it raises.

        Args:
            choices: layer name -> places of the entries, each once; other layers stay as they are.
            keep: whether an entry that goes on moving keeps its state in the optimizer. A new
                entry then starts with zeros at the layer's number of steps. Without, every layer
                that is named starts afresh.

        Raises:
            ValueError: no such layer, or places that do not fit.
        """
        strange = choices.keys() - set(self.names)
        if strange:
            raise ValueError(f"no layer {min(strange)!r} is masked here; there are {self.names}")

        def change() -> None:
            for name, layer, base in zip(self.names, self.layers, self.bases, strict=True):
                if name in choices:
                    old = layer.values
                    came = layer.choose(choices[name], base)
                    exchange(self.optimizer, old, layer.values, came if keep else None)
            self.trained = self.named()

        whole(self._containers(), change)

    def _containers(self) -> Iterator[Any]:
        """All that a choice writes into."""
        yield vars(self)
        yield from of_modules(self.layers)
        yield from of_optimizer(self.optimizer)
        yield self.optimizer.state

    def load(self, state: dict[str, Tensor]) -> None:
        super().load(state)
        held, now = self.trained, self.named()
        for name, parameter in now.items():  # a load may have changed how many entries move
            if parameter is not held[name]:
                exchange(self.optimizer, held[name], parameter, None)
        self.trained = now


def exchange(
    optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, came: Tensor | None
) -> None:
    """Put a vector in the place of another one, with the state of the entries that both have.

    Args:
        optimizer: holds the old vector.
        old: (k,) what moved until now.
        new: (k',) what moves from now on.
        came: (k',) where each entry stood in the old vector, or -1; None starts afresh.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state and came is not None:
        stays = came >= 0
        kept: dict[Any, Any] = {}
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == old.shape:
                kept[key] = value.new_zeros(new.shape)
                kept[key][stays] = value[came[stays]]
            else:
                kept[key] = value.clone() if isinstance(value, Tensor) else value
        optimizer.state[new] = kept
