"""What both controllers share: layers of one shape as one stack, and gradients read with care."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.cover import Maker
from toolkit.core.adapt.forwards import frozen
from toolkit.core.adapt.model import Adapted
from toolkit.core.adapt.steps.controller import Controller
from toolkit.core.adapt.steps.shapes import alike, groups
from toolkit.lowrank.lora_ggpo.noise import gradient_row_squares


class GroupedController(Controller):
    """Common to noise and momentum.

    Attributes: ``bases`` (the frozen layers), ``factors`` (every A, then every B, by name),
    ``groups`` (numbers of the layers of one shape), ``known`` (whether there was a gradient yet).
    """

    def __init__(self, method: Any, adapted: Adapted, optimizer: torch.optim.Optimizer):
        super().__init__(method, adapted.adapters, optimizer)
        self.bases = [adapted.sites[name].layer.base for name in self.names]
        self.groups = groups(self.layers, lambda x: (alike(x.A, x.B), x.scale))
        pairs = list(zip(self.names, self.layers, strict=True))
        self.factors = {f"{n}.{leaf}": getattr(x, leaf) for leaf in "AB" for n, x in pairs}
        self.known = False

    def named(self) -> dict[str, nn.Parameter]:
        return self.factors

    def released(self) -> None:
        for layer in self.layers:
            layer.cover.clear()

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by name, zeros where there is none."""
        return {
            n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.factors.items()
        }

    def stacks(self, group: Sequence[int], of: Mapping[str, Tensor]) -> list[Tensor]:
        """What ``of`` holds for A and for B of a group's layers, (k, r, n) and (k, m, r)."""
        pairs = [[of[f"{self.names[i]}.{leaf}"].detach() for i in group] for leaf in "AB"]
        return [torch.stack(tensors) for tensors in pairs]

    def row_squares(self, of: Mapping[str, Tensor]) -> list[Tensor]:
        """Squared row norms of s (dB A + B dA), (k, m) per group; ``of`` holds dA and dB."""
        found = []
        for g in self.groups:
            (A, B), (dA, dB) = self.stacks(g, self.factors), self.stacks(g, of)
            found.append(gradient_row_squares(A, B, dA, dB, self.layers[g[0]].scale))
        return found

    def by_layer(self, stacks: Sequence[Tensor]) -> dict[str, Tensor]:
        """Layer name -> its part of the groups' stacks."""
        pairs = zip(self.groups, stacks, strict=True)
        return {self.names[i]: x for g, s in pairs for i, x in zip(g, s.unbind(), strict=True)}

    def weight_of(self, i: int) -> Tensor:
        """The frozen weight of layer i, in its own layout."""
        site = self.layers[i].site
        return frozen(self.bases[i], site.parameter, site.name)

    def keep_padding(self, i: int, new: Tensor) -> Tensor:
        """A perturbed weight of layer i, its padding row put back in place as it is in the base."""
        row = getattr(self.bases[i], "padding_idx", None)
        if row is not None:
            new[row] = self.weight_of(i)[row]
        return new

    def lay(self, i: int, make: Maker) -> None:
        """Put what ``make`` forms over layer i."""
        parameter = self.layers[i].site.parameter
        self.layers[i].cover.lay(self.bases[i], parameter, make, self.method.keep_noise)

    def kept(self) -> dict[str, Tensor]:
        """The tensors of the state, by name."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"known": torch.tensor(self.known)} | self.kept()

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        super().load(state)
        self.known = bool(state["known"])
        for name, tensor in self.kept().items():
            tensor.copy_(state[name])
