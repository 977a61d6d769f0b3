"""What every bed does with an arm: which part of a network trains, by which method, how long."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.train.fit import fit
from toolkit.lowrank.lora import LoRA

NAMES = ("nothing", "head", "lora", "full", "full_twice")
"""The reference arms, in the order of the numbers they train."""
TITLES = {
    "nothing": "do nothing",
    "head": "head alone",
    "lora": "LoRA, rank 8",
    "full": "full training",
    "full_twice": "full training, twice the steps",
}


@dataclass(frozen=True)
class Arm:
    """One way to adapt a network.

    Args:
        part: what trains: "nothing", "head", "all", or "method" (a toolkit method on the bed's
            layers, with the head beside it where the bed says so).
        method: the toolkit method, with ``part="method"`` only.
        longer: steps as a multiple of the bed's.
        targets: layers for the method; None takes the bed's.
        options: passed to ``adapted.attach``, as pairs of name and value.

    Raises:
        ValueError: an unknown part, a method missing or out of place, no step left.
    """

    part: str
    method: Any = None
    longer: float = 1.0
    targets: Any = None
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.part not in ("nothing", "head", "all", "method"):
            raise ValueError(
                f'part: choose "nothing", "head", "all" or "method", got {self.part!r}'
            )
        if (self.part == "method") != (self.method is not None):
            raise ValueError('method: give one with part="method", and with no other part')
        if not self.longer > 0:
            raise ValueError(f"longer: must be above 0, got {self.longer}")


def named(arm: str | Arm, rank: int = 8) -> Arm:
    """A reference arm by name; an :class:`Arm` stays as it is.

    Args:
        arm: one of :data:`NAMES`, or an arm of one's own.
        rank: of LoRA, whose scale is 2 (alpha = 2 * rank).

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(arm, Arm):
        return arm
    if arm not in NAMES:
        raise ValueError(f"arm: choose one of {', '.join(NAMES)}, or pass an Arm; got {arm!r}")
    if arm == "lora":
        return Arm("method", LoRA(rank=rank, alpha=2.0 * rank))
    if arm.startswith("full"):
        return Arm("all", longer=2.0 if arm == "full_twice" else 1.0)
    return Arm(arm)


def sizes_of(scale: str) -> str:
    """The scale whose sizes are taken: ``gpu`` takes those of ``cpu``.

    Raises:
        ValueError: an unknown scale.
    """
    if scale not in ("ci", "cpu", "gpu"):
        raise ValueError(f'scale: choose "ci", "cpu" or "gpu", got {scale!r}')
    return "ci" if scale == "ci" else "cpu"


def learn(
    model: nn.Module,
    arm: Arm,
    rate: float,
    seed: int,
    draw: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    decay: Callable[[int, int], float],
    targets: Any,
    beside: Sequence[str] = ("head",),
) -> tuple[Any, int]:
    """Train a network in place as the arm says: Adam without weight decay, warm-up, then decay.

    Args:
        model: its last layer is ``head``.
        arm: what trains.
        rate: learning rate at its highest; unused by "nothing".
        seed: of the method's start.
        draw: number of steps -> that many batches.
        loss: of outputs and targets.
        steps: of the bed; the arm's ``longer`` multiplies them.
        decay: share of the rate at a step; the first 5 % of the steps are a warm-up on top.
        targets: the bed's layers for a method.
        beside: parameters that train beside a method.

    Returns:
        The method's handle or None, and how many numbers are trained at the end.
    """
    if arm.part == "nothing":
        model.eval()
        return None, 0
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"rate: must be positive and finite, got {rate}")
    steps = max(1, round(steps * arm.longer))
    adapted, _ = fit(
        model, arm.method, rate, seed, draw(steps), loss,
        steps=steps, decay=lambda step, of: warm(step, of) * decay(step, of),
        targets=targets if arm.targets is None else arm.targets,
        train={"head": ("head",), "all": ()}.get(arm.part, tuple(beside)),
        # the head alone must not move the statistics of the layers below it
        training=arm.part != "head",
        options=dict(arm.options),
    )  # fmt: skip
    parameters = model.parameters() if adapted is None else adapted.parameters()
    return adapted, sum(p.numel() for p in parameters if p.requires_grad)


def warm(step: int, steps: int) -> float:
    """Share of the rate during the first 5 % of the steps, rising to 1."""
    return min(1.0, (step + 1) / max(1, round(0.05 * steps)))


@torch.no_grad()
def scores(model: nn.Module, inputs: Tensor, batch: int = 250) -> Tensor:
    """Outputs for all inputs, in batches and in evaluation mode."""
    model.eval()
    return torch.cat([model(part) for part in inputs.split(batch)])


def judged(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean log-loss in nats and accuracy in percent of scores (n, classes)."""
    loss = nn.functional.cross_entropy(outputs, labels).item()
    return {"loss": loss, "accuracy": 100 * (outputs.argmax(1) == labels).double().mean().item()}


def fresh(model: nn.Module) -> Any:
    """A copy of a cached base that may be changed."""
    return copy.deepcopy(model).requires_grad_(True)
