"""What AdaLoRA does around each step: importance, the budget, and who is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.steps.budget import budget
from toolkit.core.adapt.steps.importance import smooth
from toolkit.core.adapt.steps.ranks import RankController

MOST = 1000  # records of a run; of more allocations every so many are kept, and the last


class AllocationController(RankController):
    """Around each step: penalty before; scores, schedule and pruning after.

    Attributes: ``budget`` (triplets allowed now), ``initial`` (at the start), ``sensitivity`` and
    ``uncertainty`` (smoothed, one tensor per P, E, Q of each layer), and those of the base class.
    The history has a record per allocation, at most about 1000; the final phase, which repeats one
    decision, has one.

    Arguments and options are the base class's; ``scorer`` returns one (r,) tensor per layer.

    Raises:
        ValueError: ``total_steps`` missing or too short for the schedule, or a target above b0.
    """

    def __init__(self, method: Any, layers: Mapping[str, nn.Module], *where: Any, **options: Any):
        widths = [len(layer.E) for layer in layers.values()]
        super().__init__(method, layers, *where, **options | {"widths": widths})
        self.squared, self.initial = method.like == "paper", sum(widths)
        if method.warmup + method.final >= self.total_steps:
            raise ValueError(
                f"warmup={method.warmup} and final={method.final} leave no step to shrink the "
                f"budget in total_steps={self.total_steps}; lower them or train longer"
            )
        if self.target > self.initial:
            raise ValueError(
                f"total_rank={self.target} is above the initial budget of {self.initial} triplets "
                f"({len(self.layers)} layers of rank {method.rank}); aim lower or start higher"
            )
        self.tensors = [t for layer in self.layers for t in (layer.P, layer.E, layer.Q)]
        self.sensitivity = [torch.zeros_like(t) for t in self.tensors]
        self.uncertainty = [torch.zeros_like(t) for t in self.tensors]
        self.budget = self.initial
        owner = torch.arange(len(widths)).repeat_interleave(torch.tensor(widths))
        self.owner = owner.to(self.tensors[0].device)
        allocations = (self.total_steps - method.final) // method.interval
        self.every = method.interval * max(1, -(-allocations // MOST))

    def blocks(self) -> list[tuple[Sequence[Tensor], Sequence[Tensor]]]:
        return [([layer.P], [layer.Q]) for layer in self.layers]

    @property
    def allocating(self) -> bool:
        """Whether the coming step ends with an allocation."""
        t, m = self.step, self.method
        if t <= m.warmup:
            return False
        return t > self.total_steps - m.final or t % m.interval == 0

    @torch.no_grad()
    def before_step(self) -> None:
        """Add the gradient of the penalty."""
        self.add_penalty()

    @torch.no_grad()
    def after_step(self) -> None:
        """Score the updated triplets, then prune if this step is one for it."""
        prune, m = self.allocating, self.method
        # official order: scores are frozen in the final phase, so the same triplets stay pruned
        if self.step < self.total_steps - m.final:
            self.update_scores()
        self.budget = budget(
            self.step, self.initial, self.target, m.warmup, m.final, self.total_steps
        )
        if prune:
            self.prune(self.budget)
        super().after_step()

    @torch.no_grad()
    def update_scores(self) -> None:
        r"""Take :math:`I(w)=|w\,\nabla_w\mathcal L|` of every entry into the averages."""
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in self.tensors]
        now = torch._foreach_mul([t.detach() for t in self.tensors], grads)
        torch._foreach_abs_(now)
        m = self.method
        smooth(now, self.sensitivity, self.uncertainty, m.beta1, m.beta2)

    def scores(self) -> list[Tensor]:
        r"""Importance of every triplet, one (r,) tensor per layer.

        .. math:: S_i = s(\lambda_i) + \frac1{d_1}\sum_j s(P_{ji}) + \frac1{d_2}\sum_j s(Q_{ij})

        with s the product of sensitivity and uncertainty ("full"), the sensitivity alone, or
        :math:`|\lambda_i|` instead of the sum ("magnitude").
        """
        if self.scorer is not None:
            return list(self.scorer(self))
        if self.method.score == "magnitude":
            return [layer.E.detach()[:, 0].abs() for layer in self.layers]
        entries = self.sensitivity
        if self.method.score == "full":
            entries = torch._foreach_mul(self.sensitivity, self.uncertainty)
        return [
            entries[i + 1][:, 0] + entries[i].mean(0) + entries[i + 2].mean(1)
            for i in range(0, len(entries), 3)
        ]

    @torch.no_grad()
    def prune(self, budget: int) -> None:
        """Zero lambda wherever the score is at most the (b0 - budget)-th smallest.

        Triplets tied at the threshold all go, as in the official code.
        """
        if self.initial == budget:
            return
        scores = self.scores()
        together = torch.cat(scores)
        threshold = together.kthvalue(self.initial - budget).values
        lambdas = self.tensors[1::3]
        pairs = zip(lambdas, scores, strict=True)
        kept = [E.masked_fill((score <= threshold)[:, None], 0.0) for E, score in pairs]
        torch._foreach_copy_(lambdas, kept)  # all at once, or none if an interrupt comes
        last = self.total_steps - self.method.final
        if (self.step % self.every == 0 and self.step <= last) or self.step in (last - 1, last + 1):
            self.history.add(self.step, budget, self.counts(), together, threshold)

    def counts(self) -> Tensor:
        """(N,) triplets of each layer that count now."""
        alive = torch.cat([layer.E.detach()[:, 0] for layer in self.layers]) != 0
        return self.owner.new_zeros(len(self.layers)).index_add(0, self.owner, alive.long())

    def ranks(self) -> dict[str, int]:
        """Layer name -> triplets that count now."""
        return dict(zip(self.names, self.counts().tolist(), strict=True))

    def state(self) -> dict[str, Tensor]:
        state = super().state() | {"budget": torch.tensor(self.budget)}
        for i, (s, u) in enumerate(zip(self.sensitivity, self.uncertainty, strict=True)):
            state[f"sensitivity.{i}"], state[f"uncertainty.{i}"] = s, u
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        super().load(state)
        self.budget = int(state["budget"])
        for i, (s, u) in enumerate(zip(self.sensitivity, self.uncertainty, strict=True)):
            s.copy_(state[f"sensitivity.{i}"])
            u.copy_(state[f"uncertainty.{i}"])
