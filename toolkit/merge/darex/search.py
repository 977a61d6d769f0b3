"""The search for q (or for eta): a coarse sweep, then a fine one around its best.

The score is on labels (the pruned model's, on validation data) or on outputs without labels (minus
:func:`output_change` or :func:`top_change`), in both cases the mean over several masks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from toolkit.core.declare.fields import Like
from toolkit.core.states.merging import Source
from toolkit.merge.darex import DAREx, prune


@dataclass(frozen=True)
class Found:
    """The best value and every score, in the order in which they were asked for."""

    best: float
    scores: Mapping[float, float] = field(default_factory=dict)


def coarse_to_fine(
    score: Callable[[float], float],
    low: float,
    high: float,
    *,
    step: float = 0.05,
    decay: float = 0.1,
    patience: int = 3,
    like: Like = "code",
) -> Found:
    """Maximise a score of one number.

    A sweep upwards from ``low`` ends after more than ``patience`` values in a row without a new
    best; equal to the best counts as new. A second sweep, in steps of ``step * decay``, goes from
    ``step * (1 - decay)`` below the first best to ``step`` above it, and not below
    ``low + step * decay``. The first of equal values is returned.

    Args:
        score: more is better.
        low, high: ends of the first sweep; for q the paper has 1 - p and 1.
        step: of the first sweep.
        decay: of the step.
        patience: values in a row.
        like: "code" lets both sweeps end above ``high``, by less than a step; "paper" does not.

    Raises:
        ValueError: ends or steps that make no sweep, or a score that is not a number.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"low={low}, high={high}: give two finite ends in order")
    if not step > 0 or not 0 < decay <= 1 or patience < 0:
        raise ValueError(f"step={step}, decay={decay}, patience={patience}: no sweep")
    scores: dict[float, float] = {}

    def sweep(values: np.ndarray) -> None:
        best, idle = -math.inf, 0
        for value in values.tolist():
            if like == "paper" and value > high + 1e-9:
                return
            found = float(score(value))
            if math.isnan(found):
                raise ValueError(f"the score of {value:g} is not a number")
            scores[value] = found
            best, idle = (found, 0) if found >= best else (best, idle + 1)
            if idle > patience:
                return

    sweep(np.arange(low, high + step, step))
    middle = max(scores, key=scores.__getitem__)
    sweep(np.arange(max(low + step * decay, middle - step * (1 - decay)), middle + step,
                    step * decay))  # fmt: skip
    return Found(max(scores, key=scores.__getitem__), scores)


def over_masks(
    base: Source,
    tuned: Source,
    rule: Callable[[float], DAREx],
    judge: Callable[[Any], float],
    *,
    seeds: Sequence[int] = (0, 1, 2, 3),
    trim: bool = False,
) -> Callable[[float], float]:
    """A score for :func:`coarse_to_fine`: the mean over masks of a pruned model's.

    Args:
        base, tuned: the models.
        rule: value -> rule, such as ``DAREx(drop=0.99).with_q``, or for eta
            ``lambda eta: rule.with_layers(layer_q(deltas, means, 0.99, eta))``.
        judge: state dict -> score, more is better.
        seeds: of the masks.
        trim: leave out the score farthest from the mean, as the official code does on outputs.
    """

    def score(value: float) -> float:
        made = rule(value)
        each = [float(judge(prune(base, tuned, made, seed=seed))) for seed in seeds]
        return statistics.fmean(without_outlier(each) if trim else each)

    return score


def without_outlier(values: Sequence[float]) -> list[float]:
    """Three values or more without the one that lies farthest from their mean."""
    kept = list(values)
    if len(kept) > 2:
        middle = statistics.fmean(kept)
        kept.remove(max(kept, key=lambda value: abs(value - middle)))
    return kept


def output_change(before: Tensor, after: Tensor) -> Tensor:
    """Mean absolute change of a representation, a number."""
    return (before - after).abs().mean()


def top_change(before: Tensor, after: Tensor, top: int = 5) -> Tensor:
    """Mean squared change of the fine-tuned model's largest logits, for decoders.

    Args:
        before: logits (..., words) of the fine-tuned model.
        after: of the pruned one.
        top: how many of the largest.
    """
    places = before.topk(top, dim=-1).indices
    return F.mse_loss(after.gather(-1, places), before.gather(-1, places))
