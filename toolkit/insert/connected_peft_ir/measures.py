"""How good a ranking is: nDCG, reciprocal rank, average precision, recall, by query.

Ties go to the document that comes first. A query without a relevant document scores 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ranked(scores: Tensor) -> Tensor:
    """Places of documents from the best to the worst, (n, documents)."""
    _check(scores, scores)
    return scores.argsort(dim=1, descending=True, stable=True)


def measured(scores: Tensor, grades: Tensor, most: int = 10) -> dict[str, Tensor]:
    """Measures of every query, each (n,) in [0, 1].

    Args:
        scores: (n, documents), more is better.
        grades: (n, documents), 0 or less is not relevant; nDCG takes the grade as gain.
        most: how far down the list nDCG, reciprocal rank and recall look.

    Returns:
        ``ndcg``, ``mrr``, ``recall`` at ``most``, and ``map`` over the whole list.

    Raises:
        ValueError: no query or no candidate document, shapes that differ, or ``most`` below 1.
    """
    _check(scores, grades)
    if most < 1:
        raise ValueError(f"most={most}: look at one place or more")
    gain = grades.clamp(min=0).to(torch.float64)
    own = gain.gather(1, ranked(scores))
    hit, places = (own > 0).to(own.dtype), torch.arange(1, own.shape[1] + 1)
    worth = 1 / torch.log2(places[:most] + 1.0)
    ideal = (gain.sort(dim=1, descending=True).values[:, :most] * worth).sum(1)
    count = hit.sum(1)
    near = hit[:, :most]
    precision = hit.cumsum(1) / places
    found = {
        "ndcg": (own[:, :most] * worth).sum(1) / ideal.clamp(min=1e-300),
        "mrr": (near / places[:most]).max(1).values,
        "recall": near.sum(1) / count.clamp(min=1),
        "map": (hit * precision).sum(1) / count.clamp(min=1),
    }
    return {name: torch.where(count > 0, value, 0.0) for name, value in found.items()}


def _check(scores: Tensor, grades: Tensor) -> None:
    if scores.dim() != 2 or 0 in scores.shape:
        raise ValueError(
            f"scores: {tuple(scores.shape)}; give (n, documents), one query and one candidate "
            "document or more"
        )
    if grades.shape != scores.shape:
        raise ValueError(f"grades: {tuple(grades.shape)}, scores {tuple(scores.shape)}")
