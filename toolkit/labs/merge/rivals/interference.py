"""How much experts stand in each other's way: angles, signs, and what is lost where they meet."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.labs.beds.experts import Experts
from toolkit.labs.merge.rivals.search import averaged

LARGE = 0.1
"""The share of coordinates that counts as large."""


class Pair(NamedTuple):
    """Two task vectors: their cosine; the share of all coordinates that is large in both; and of
    these the share in which their signs oppose each other; shares in per cent."""

    cosine: float
    both: float
    opposed: float


def pair(one: Tensor, other: Tensor, share: float = LARGE) -> Pair:
    """Compare two task vectors (D,).

    Args:
        one, other: what two experts changed.
        share: a coordinate is large where it is among this share of the largest of its vector.

    Raises:
        ValueError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: above 0 and at most 1, got {share}")
    cosine = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
    keep = max(1, round(share * len(one)))
    large = [
        v.abs() >= v.abs().kthvalue(len(v) - keep + 1).values for v in (one, other)
    ]  # fmt: skip
    both = large[0] & large[1]
    opposed = ((one * other)[both] < 0).double().mean() if both.any() else torch.tensor(0.0)
    return Pair(cosine, 100 * both.double().mean().item(), 100 * opposed.item())


def pairs(found: Experts) -> list[Pair]:
    """All pairs of a seed's experts, in the order of :func:`itertools.combinations`."""
    vectors = [model - found.base for model in found.models]
    return [pair(one, other) for one, other in itertools.combinations(vectors, 2)]


def lost(found: Experts, own: list[float]) -> list[float]:
    """By pair: how much worse the average of the two is on their two tasks than each expert on its
    own, the mean over both, on test data.

    Args:
        found: the experts.
        own: what each scores on its own task.
    """
    losses = []
    for both in itertools.combinations(range(len(found.models)), 2):
        scores = found.scores(averaged(found, both), "test", both)
        gaps = [score - own[task] for score, task in zip(scores, both, strict=True)]
        losses.append(sum(gaps) / 2)
    return losses
