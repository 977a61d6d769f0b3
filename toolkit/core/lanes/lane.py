"""How one network of many is trained, and its wrong labels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.core.seeds import generator

SCHEDULES = ("step", "cosine", "linear", "constant")


@dataclass(frozen=True)
class Lane:
    """How one network is trained.

    Args:
        seed: of the initial weights.
        order: seed of the data order: one random permutation per epoch.
        steps: optimiser steps.
        batch: examples per step. An epoch has N // batch steps; what is left over is dropped.
        lr: learning rate at the start.
        schedule: ``step``, ``cosine``, ``linear`` (both to 0) or ``constant``.
        drops: for ``step``: shares of the horizon at which the rate is multiplied by ``factor``.
        factor: of each drop.
        horizon: steps that the schedule is laid out for; ``steps`` when left out.
        momentum: of SGD; for AdamW the first beta.
        weight_decay: L2 (SGD) or decoupled (AdamW).
        rho: radius of sharpness-aware minimisation (arXiv 2010.01412); 0 is plain training.
        noise: share of training labels replaced by another class.
        noise_seed: which labels those are, and what they become.
        width: share of the units of each hidden layer that the lane has.

    Raises:
        ValueError: a value outside its range, naming it.
    """

    seed: int = 0
    order: int = 0
    steps: int = 1000
    batch: int = 32
    lr: float = 0.1
    schedule: str = "step"
    drops: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1
    horizon: int | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    rho: float = 0.0
    noise: float = 0.0
    noise_seed: int = 0
    width: float = 1.0

    def __post_init__(self) -> None:
        rules = {
            "seed": self.seed >= 0,
            "order": self.order >= 0,
            "steps": self.steps >= 1,
            "batch": self.batch >= 1,
            "lr": self.lr > 0 and math.isfinite(self.lr),
            "schedule": self.schedule in SCHEDULES,
            "drops": all(0 < d <= 1 for d in self.drops),
            "factor": self.factor > 0,
            "horizon": self.horizon is None or self.horizon >= 1,
            "momentum": 0 <= self.momentum < 1,
            "weight_decay": self.weight_decay >= 0,
            "rho": self.rho >= 0,
            "noise": 0 <= self.noise < 1,
            "width": 0 < self.width <= 1,
        }
        wrong = [name for name, fine in rules.items() if not fine]
        if wrong:
            name = wrong[0]
            raise ValueError(f"Lane({name}={getattr(self, name)!r}): outside its range; see Lane.")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        share = step / (self.horizon or self.steps)
        if self.schedule == "step":
            return self.lr * self.factor ** sum(share >= d for d in self.drops)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        return self.lr * (max(0.0, 1 - share) if self.schedule == "linear" else 1.0)


def labels_with_noise(y: Tensor, classes: int, noise: float, seed: int) -> Tensor:
    """Labels (N,) of which exactly round(noise N) are replaced by another class, drawn evenly."""
    wrong = y.clone()
    draw = generator(seed, "label noise")
    chosen = torch.randperm(len(y), generator=draw)[: round(noise * len(y))]
    shift = torch.randint(1, classes, (len(chosen),), generator=draw).to(y.device)
    chosen = chosen.to(y.device)
    wrong[chosen] = (y[chosen] + shift) % classes
    return wrong
