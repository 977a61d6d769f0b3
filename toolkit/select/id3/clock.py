r"""Adam's averages corrected by the steps since a scalar was unmasked.

Adam divides its averages by :math:`1-\beta^t` with t the steps of the run. A scalar that joins late
starts from averages of 0 but is hardly corrected, so its first step is about
:math:`(1-\beta_1)/\sqrt{1-\beta_2}` times the usual one. With its own count s the averages must be
larger by :math:`r=(1-\beta^t)/(1-\beta^s)` when the optimizer reads them; they are laid out so
before its step and taken back behind it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

AVERAGES = (("exp_avg", 0, 1), ("exp_avg_sq", 1, 2))
"""Name in the optimizer's state, place in ``betas``, power of the gradient."""


def refuse_others(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError for optimizers without such averages, or with more of them."""
    for group in optimizer.param_groups:
        if "decoupled_weight_decay" not in group or group["amsgrad"]:
            raise ValueError(
                f"clock='own' corrects the averages of Adam and AdamW without amsgrad, and "
                f"{type(optimizer).__name__} is another optimizer; use clock='run'"
            )


class OwnClock:
    """The correction around one step of one optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        refuse_others(optimizer)
        self.optimizer = optimizer
        self.laid: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def before(self, tensors: list[tuple[nn.Parameter, Tensor]]) -> None:
        """Lay out the averages of tensors, given with the coming step's own count s >= 1 each."""
        groups = {id(p): g for g in self.optimizer.param_groups for p in g["params"]}
        for p, own in tensors:
            state = self.optimizer.state.get(p)
            if not state or p.grad is None:
                continue  # the first step of the run: both counts are 1
            group = groups[id(p)]
            gradient, count = self._gradient(p, group), float(state["step"]) + 1
            for name, place, power in AVERAGES:
                beta, average = float(group["betas"][place]), state[name]
                if not beta:
                    continue
                ratio = (1 - beta**count) / (1 - beta ** own.to(average.dtype))
                new = (1 - beta) * gradient**power
                old, laid = average.clone(), (ratio * (beta * average + new) - new) / beta
                average.copy_(laid)
                self.laid.append((average, ratio, old, laid))

    def after(self) -> None:
        """Take the factor back."""
        laid, self.laid = self.laid, []
        for average, ratio, _, _ in laid:
            average.div_(ratio)

    def undo(self) -> None:
        """Take it back where the step was broken off, before or behind the optimizer's part."""
        laid, self.laid = self.laid, []
        for average, ratio, old, now in laid:
            average.copy_(old if torch.equal(average, now) else average / ratio)

    @staticmethod
    def _gradient(p: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """What the optimizer takes into its averages."""
        gradient = p.grad.to(p.dtype)
        if group.get("maximize"):
            gradient = -gradient
        decoupled = group["decoupled_weight_decay"]
        decay = 0.0 if decoupled else float(group.get("weight_decay") or 0.0)
        return gradient + decay * p.detach()
