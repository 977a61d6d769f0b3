"""AdaLoRA's importance scores, budget schedule and pruning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.steps.controller import Controller

Scorer = Callable[["BudgetController"], Sequence[Tensor]]


def budget(step: int, initial: int, target: int, warmup: int, final: int, total_steps: int) -> int:
    r"""Triplets allowed after a step.

    .. math:: b(t) = \Big\lfloor b_T + (b_0 - b_T)
        \Big(1 - \frac{t - t_i}{T - t_i - t_f}\Big)^3 \Big\rfloor

    between ``warmup`` = :math:`t_i` and T - ``final`` = :math:`T - t_f`; the initial budget before,
    the target after. Steps count from 0 (paper, equation 11; official ``schedule_threshold``).
    """
    if step <= warmup:
        return initial
    if step > total_steps - final:
        return target
    left = 1 - (step - warmup) / (total_steps - final - warmup)
    return int(target + (initial - target) * left**3)


def orthogonality(pairs: Sequence[tuple[Tensor, Tensor]], squared: bool = False) -> Tensor:
    r"""How far each P and Q is from orthonormal, as the training penalty R.

    .. math:: R = \frac1{2N}\sum_k \|P_k^\top P_k - I\|_F + \|Q_k Q_k^\top - I\|_F

    Args:
        pairs: N pairs of P (m, r) and Q (r, n).
        squared: the paper's form instead, squared norms summed over the pairs.
    """
    terms = []
    for P, Q in pairs:
        for gram in (P.T @ P, Q @ Q.T):
            gap = gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            terms.append(gap.square().sum() if squared else torch.linalg.norm(gap))
    total = torch.stack(terms).sum()
    return total if squared else total / len(terms)


@torch.no_grad()
def orthogonality_gradients(
    pairs: Sequence[tuple[Tensor, Tensor]], squared: bool = False
) -> list[Tensor]:
    r"""Gradient of :func:`orthogonality` for every P and Q, in order P1, Q1, P2, ...

    With :math:`G = P^\top P - I` it is :math:`4PG` (squared) or :math:`2PG / \|G\|_F / 2N`.
    Matrices of one shape are handled together, because one by one their cost is all overhead.
    """
    tall = [t for P, Q in pairs for t in (P, Q.T)]
    groups: dict[torch.Size, list[int]] = {}
    for i, t in enumerate(tall):
        groups.setdefault(t.shape, []).append(i)
    result: list[Tensor] = [None] * len(tall)
    for indices in groups.values():
        stack = torch.stack([tall[i] for i in indices])
        gap = stack.mT @ stack
        gap.diagonal(dim1=-2, dim2=-1).sub_(1)
        if squared:
            gap.mul_(4)
        else:
            norm = torch.linalg.norm(gap, dim=(-2, -1), keepdim=True)
            # the norm has no gradient at 0; 0 is the one that keeps an orthonormal matrix still
            gap.div_(norm.clamp_min(torch.finfo(norm.dtype).tiny)).mul_(2 / len(tall))
        for i, g in zip(indices, (stack @ gap).unbind(), strict=True):
            result[i] = g if i % 2 == 0 else g.T
    return result


class BudgetController(Controller):
    """Around each step: penalty before; scores, schedule and pruning after.

    Attributes: ``step`` (steps done), ``budget`` (triplets allowed now), ``sensitivity`` and
    ``uncertainty`` (smoothed, one tensor per P, E, Q of each layer), ``total_steps``.

    Args:
        method: the hyperparameters.
        layers: layer name -> its triplets.
        total_steps: optimizer steps of the run.
        scorer: replaces the score: called with the controller, returns one (r,) tensor per layer.
            For controls such as random or planted allocations.

    Raises:
        ValueError: ``total_steps`` missing or too short for the schedule, or a target above b0.
    """

    def __init__(
        self,
        method: Any,
        layers: Mapping[str, nn.Module],
        total_steps: int | None,
        scorer: Scorer | None = None,
    ):
        if total_steps is None:
            raise ValueError("AdaLoRA shrinks its budget over the run: attach(..., total_steps=T)")
        if method.warmup + method.final >= total_steps:
            raise ValueError(
                f"warmup={method.warmup} and final={method.final} leave no step to shrink the "
                f"budget in total_steps={total_steps}; lower them or train longer"
            )
        self.method, self.names = method, list(layers)
        self.layers = list(layers.values())
        self.total_steps, self.scorer = total_steps, scorer
        self.initial = sum(layer.E.shape[0] for layer in self.layers)
        self.target = method.total_rank
        if self.target is None:
            self.target = method.target_rank * len(self.layers)
        if self.target > self.initial:
            raise ValueError(
                f"total_rank={self.target} is above the initial budget of {self.initial} triplets "
                f"({len(self.layers)} layers of rank {method.rank}); aim lower or start higher"
            )
        self.tensors = [t for layer in self.layers for t in (layer.P, layer.E, layer.Q)]
        self.sensitivity = [torch.zeros_like(t) for t in self.tensors]
        self.uncertainty = [torch.zeros_like(t) for t in self.tensors]
        self.step, self.budget = 0, self.initial

    @property
    def allocating(self) -> bool:
        """Whether the coming step ends with an allocation."""
        t, m = self.step, self.method
        if t <= m.warmup:
            return False
        return t > self.total_steps - m.final or t % m.interval == 0

    @torch.no_grad()
    def before_step(self) -> None:
        """Add the gradient of the penalty, after making sure that there are gradients to read."""
        grads = [t.grad for t in self.tensors if t.grad is not None]
        if not grads:
            raise RuntimeError(
                "optimizer.step() was called before any backward pass: AdaLoRA reads gradients to "
                "score its triplets. Call loss.backward() first, and zero_grad() only after step()"
            )
        if self.allocating:
            self._check_finite()
        if self.method.orthogonality == 0:
            return
        pairs = [(layer.P.detach(), layer.Q.detach()) for layer in self.layers]
        extra = orthogonality_gradients(pairs, self.method.squared)
        both = [t for layer in self.layers for t in (layer.P, layer.Q)]
        for t, g in zip(both, extra, strict=True):
            if t.grad is None:
                t.grad = torch.zeros_like(t)
            t.grad.add_(g, alpha=self.method.orthogonality)

    def _check_finite(self) -> None:
        norms = [t.grad.norm() if t.grad is not None else t.new_zeros(()) for t in self.tensors]
        finite = torch.isfinite(torch.stack(norms))
        if not bool(finite.all()):
            where = self.names[int((~finite).nonzero()[0]) // 3]
            raise FloatingPointError(
                f"the gradient of layer {where!r} is not finite at the allocation of step "
                f"{self.step}; no weight was changed. Lower the learning rate, clip gradients, or "
                "skip the step"
            )

    @torch.no_grad()
    def after_step(self) -> None:
        """Score the updated triplets, then prune if this step is one for it."""
        prune = self.allocating
        # official order: scores are frozen in the final phase, so the same triplets stay pruned
        if self.step < self.total_steps - self.method.final:
            self._update_scores()
        m = self.method
        self.budget = budget(
            self.step, self.initial, self.target, m.warmup, m.final, self.total_steps
        )
        if prune:
            self.prune(self.budget)
        self.step += 1

    def _update_scores(self) -> None:
        b1, b2 = self.method.beta1, self.method.beta2
        grads = [t.grad if t.grad is not None else torch.zeros_like(t) for t in self.tensors]
        now = torch._foreach_mul([t.detach() for t in self.tensors], grads)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(self.sensitivity, now, 1 - b1)
        torch._foreach_sub_(now, self.sensitivity)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(self.uncertainty, now, 1 - b2)

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
        threshold = torch.cat(scores).kthvalue(self.initial - budget).values
        for layer, score in zip(self.layers, scores, strict=True):
            layer.E.masked_fill_((score <= threshold)[:, None], 0.0)

    def ranks(self) -> dict[str, int]:
        """Layer name -> triplets that count now."""
        alive = torch.stack([layer.alive().sum() for layer in self.layers]).tolist()
        return dict(zip(self.names, alive, strict=True))

    def state(self) -> dict[str, Tensor]:
        state = {"step": torch.tensor(self.step), "budget": torch.tensor(self.budget)}
        for i, (s, u) in enumerate(zip(self.sensitivity, self.uncertainty, strict=True)):
            state[f"sensitivity.{i}"], state[f"uncertainty.{i}"] = s, u
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        self.step, self.budget = int(state["step"]), int(state["budget"])
        for i, (s, u) in enumerate(zip(self.sensitivity, self.uncertainty, strict=True)):
            s.copy_(state[f"sensitivity.{i}"])
            u.copy_(state[f"uncertainty.{i}"])
