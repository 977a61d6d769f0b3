"""What SaRA does around each step: the nuclear norm before, the second stage after."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from toolkit.core.adapt.steps.rechoice import ChoiceController
from toolkit.core.adapt.steps.whole import whole
from toolkit.core.seeds import generator as stream
from toolkit.select.sara.nuclear import gradient

SIDE, ENTRIES = 64, 100
"""The official code's limits: a matrix has more rows and columns, and more entries move."""


class StageController(ChoiceController):
    """Adds the nuclear norm's gradient in each step, and starts the second stage once.

    Attributes: ``switch`` (the step after which the second stage starts, or None), ``stage`` (1 or
    2), ``matrices`` (names of the layers that may take part in the nuclear norm), ``last_matrix``
    (the one that did so last, "" before or where all do), and those of the base class.

    Args:
        method: the hyperparameters.
        share: the part of the model that the method acts on.
        optimizer: what steps.
        total_steps: optimizer steps of the run; needed where ``switch`` is a share of them.
        generator: source of the matrix that is drawn in each step; left out, a fixed seed.
        draw: replaces that draw: called with the number of the step from 0, it returns the name of
            a layer, or None for no penalty in this step.

    Raises:
        ValueError: the switch does not lie inside the run, or no matrix takes part in the norm.
    """

    def __init__(
        self,
        method: Any,
        share: Any,
        optimizer: torch.optim.Optimizer,
        total_steps: int | None,
        generator: torch.Generator | None = None,
        draw: Callable[[int], str | None] | None = None,
    ):
        super().__init__(method, share, optimizer)
        self.thresholds = [method.threshold_of(placed.site) for placed in share.sites.values()]
        self.total_steps, self.switch = total_steps, self._switch(total_steps)
        self.draw, self.stage, self.last_matrix = draw, 1, ""
        least = SIDE if method.like == "code" else 0
        self.matrices = [
            name
            for name, placed in share.sites.items()
            if len(placed.site.shape) == 2 and min(placed.site.shape) > least
        ]
        if method.rank_weight and not self.matrices:
            raise ValueError(
                f"rank_weight={method.rank_weight}: the nuclear norm needs a weight of two axes"
                + (f' with more than {SIDE} rows and columns; like="paper" takes' if least else "")
                + (" every size" if least else "")
                + ", and no adapted layer has one; set rank_weight=0"
            )
        self.seed = 0
        if generator is not None:
            self.seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))

    def _switch(self, total_steps: int | None) -> int | None:
        given = self.method.switch
        if given is None:
            return None
        if given < 1:
            if total_steps is None:
                raise ValueError(
                    f"switch={given} is a share of the run: attach(..., total_steps=T), or give a "
                    "step"
                )
            at = round(given * total_steps)
        elif given != int(given):
            raise ValueError(f"switch={given}: from 1 on it is a step, so a whole number")
        else:
            at = int(given)
        if at < 1 or (total_steps is not None and at >= total_steps):
            raise ValueError(
                f"switch={given}: the second stage would start after step {at} of "
                f"total_steps={total_steps}, outside the run; None keeps one stage"
            )
        return at

    @property
    def allocating(self) -> bool:
        """Whether the second stage starts when the coming step is done."""
        return self.stage == 1 and self.step + 1 == self.switch

    @torch.no_grad()
    def before_step(self) -> None:
        if self.method.rank_weight:
            for name in self._drawn():
                i = self.names.index(name)
                layer = self.layers[i]
                k = layer.in_weight()  # a bias takes no part
                slope = gradient(layer.site.shape, layer.index[:k].long(), layer.values[:k])
                layer.values.grad[:k].add_(slope, alpha=self.method.rank_weight)

    def _drawn(self) -> list[str]:
        """The layers whose nuclear norm counts in this step."""
        if self.method.like == "paper" and self.draw is None:
            chosen = self.matrices
        else:
            name = self._one()
            chosen = [] if name is None else [name]
            self.last_matrix = name or ""
        least = ENTRIES if self.method.like == "code" else 0
        places = dict(zip(self.names, self.layers, strict=True))
        return [
            name
            for name in chosen
            if places[name].in_weight() > least and places[name].values.grad is not None
        ]

    def _one(self) -> str | None:
        if self.draw is None:
            draws = stream(self.seed, "matrix", self.step)
            return self.matrices[int(torch.randint(len(self.matrices), (), generator=draws))]
        name = self.draw(self.step)
        if name is not None and name not in self.matrices:
            raise ValueError(f"draw gave {name!r}; the nuclear norm knows {self.matrices}")
        return name

    @torch.no_grad()
    def after_step(self) -> None:
        """Count the step and, if it is time, choose again: both or neither."""
        if not self.allocating:
            super().after_step()
            return
        whole(self._containers(), self._start_second_stage)

    def _start_second_stage(self) -> None:
        limits = zip(self.names, self.layers, self.thresholds, strict=True)
        small = {name: layer.index[layer.values.abs() < limit] for name, layer, limit in limits}
        self.rechoose(small, keep=self.method.moments == "kept")
        self.stage, self.step = 2, self.step + 1

    def shares(self) -> dict[str, float]:
        """Layer name -> share of the entries that ever moved whose value is below the threshold."""
        found = {}
        for name, layer, limit in zip(self.names, self.layers, self.thresholds, strict=True):
            values = torch.cat([layer.values.detach(), layer.held]).abs()
            found[name] = float((values < limit).float().mean()) if len(values) else math.nan
        return found

    def state(self) -> dict[str, Tensor]:
        return super().state() | {
            "stage": torch.tensor(self.stage),
            "seed": torch.tensor(self.seed),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        super().load(state)
        self.stage, self.seed = int(state["stage"]), int(state["seed"])
