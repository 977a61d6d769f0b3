r"""M2N2's competition for examples: shared fitness, attraction, and who leaves the archive.

A table of scores (..., K, N) holds what K models reach on N examples, in [0, 1] or as truth
values; leading axes are independent archives. Fitness is relative: it belongs to a table and is
computed anew whenever the table changes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fitness(scores: Tensor, alpha: float = 1.0, capacity: Tensor | None = None) -> Tensor:
    r"""What each model earns when the models that solve an example share it.

    .. math:: f_k = \sum_{j=1}^N c_j \frac{s_{kj}}{z_j^\alpha}, \qquad z_j = \sum_k s_{kj}

    with :math:`z_j^\alpha = 1` where nobody solves j. At :math:`\alpha = 1` a table of 0 and 1 has
    :math:`\sum_k f_k` = how many examples somebody solves; at 0 :math:`f_k` counts k's own.

    Args:
        scores: table (..., K, N), in [0, 1] or truth values.
        alpha: how strongly models compete, 0 or more.
        capacity: c (..., N): how much an example can give; None takes the best score in the table.

    Returns:
        (..., K), in the scores' type, at least single precision.

    Raises:
        ValueError: scores outside [0, 1] or not finite, a negative alpha, another shape.
    """
    check_scores(scores)
    table, worth = _table(scores, alpha, capacity)
    return earned(table, worth).to(kind_of(scores))


def attraction(
    scores: Tensor, first: int | Tensor, alpha: float = 1.0, capacity: Tensor | None = None
) -> Tensor:
    r"""How much better each model is than the first parent, where that one is not good.

    .. math:: g_k = \sum_j c_j \frac{\max(s_{kj} - s_{Aj}, 0)}{z_j^\alpha}, \qquad g_A = 0

    Args:
        scores: table (..., K, N), in [0, 1] or truth values.
        first: which model A is the first parent: a number, or one for each archive (...,).
        alpha, capacity: as for :func:`fitness`.

    Returns:
        (..., K), in the scores' type, at least single precision; all 0 if A is nowhere beaten.

    Raises:
        ValueError: as for :func:`fitness`, or there is no model ``first``.
    """
    check_scores(scores)
    table, worth = _table(scores, alpha, capacity)
    place = torch.as_tensor(first, device=scores.device).expand(scores.shape[:-2])
    if not bool(((place >= 0) & (place < scores.shape[-2])).all()):
        raise ValueError(f"first = {first}: give the number of a model, below {scores.shape[-2]}.")
    return gained(table, worth, place).to(kind_of(scores))


def worst(
    scores: Tensor, row: Tensor, alpha: float = 1.0, capacity: Tensor | None = None
) -> Tensor:
    """Who has the least fitness when a child joins: (...,), K for the child; of equals the first.

    Args:
        scores: table (..., K, N) of the archive; row: the child's scores (..., N).
        alpha, capacity: as for :func:`fitness`.
    """
    table, worth = _table(torch.cat([scores, row[..., None, :]], -2), alpha, capacity)
    # single precision, so that sums that are equal but for rounding are equal
    return earned(table, worth).float().argmin(-1)


def update(
    archive: Tensor,
    scores: Tensor,
    child: Tensor,
    row: Tensor,
    alpha: float = 1.0,
    capacity: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Archive and table after a child has joined and the least fit of K + 1 has left.

    Args:
        archive: parameters (..., K, D); scores: their table (..., K, N).
        child: parameters (..., D); row: its scores (..., N).
        alpha, capacity: as for :func:`fitness`.

    Returns:
        Both as new tensors. If the child is the least fit, nothing differs.

    Raises:
        ValueError: shapes do not fit, or scores are outside [0, 1] or not finite.
    """
    if archive.shape[:-1] != scores.shape[:-1] or child.shape != archive[..., 0, :].shape:
        raise ValueError(
            f"archive {tuple(archive.shape)}, scores {tuple(scores.shape)} and child "
            f"{tuple(child.shape)} do not fit: give (..., K, D), (..., K, N) and (..., D)."
        )
    if row.shape != scores[..., 0, :].shape:
        raise ValueError(f"row has shape {tuple(row.shape)}: give a score for every example.")
    check_scores(scores)
    check_scores(row, "row")
    leaves = worst(scores, row, alpha, capacity)[..., None, None]
    here = torch.arange(scores.shape[-2], device=scores.device)[:, None] == leaves
    return (
        torch.where(here, child[..., None, :], archive),
        torch.where(here, row[..., None, :].to(scores.dtype), scores),
    )


def choose(weights: Tensor, draw: Tensor) -> Tensor:
    """One place (...,) for each row of weights (..., K), drawn in proportion to them.

    Args:
        weights: not negative, some positive in each row; those of 0 are never chosen.
        draw: uniform numbers (...,) in [0, 1).
    """
    edges = weights.cumsum(-1, dtype=torch.float64)
    target = draw.to(edges.dtype)[..., None] * edges[..., -1:]
    return torch.searchsorted(edges, target, right=True)[..., 0].clamp_max(weights.shape[-1] - 1)


def earned(table: Tensor, worth: Tensor) -> Tensor:
    """Fitness (..., K) of a table, given what a point is worth on each example."""
    return (table @ worth[..., None])[..., 0]


def gained(table: Tensor, worth: Tensor, first: Tensor) -> Tensor:
    """Attraction (..., K) to the models ``first`` (...,) of a table."""
    own = table.gather(-2, first[..., None, None].expand(*first.shape, 1, table.shape[-1]))
    return earned((table - own).clamp_(min=0), worth)


def worths(table: Tensor, alpha: float, capacity: Tensor) -> Tensor:
    """What a point on each example is worth, (..., N): capacity over crowd."""
    crowd = table.sum(-2)
    return capacity / torch.where(crowd > 0, crowd, 1.0) ** alpha


def _table(scores: Tensor, alpha: float, capacity: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores in double precision, and what a point on each example is worth."""
    if not alpha >= 0:
        raise ValueError(f"alpha = {alpha}: competition is 0 or more.")
    table = scores.double()
    best = table.amax(-2) if capacity is None else capacity.double()
    if best.shape[-1] != table.shape[-1]:
        raise ValueError(f"capacity has shape {tuple(best.shape)}: give one for every example.")
    return table, worths(table, alpha, best)


def kind_of(scores: Tensor) -> torch.dtype:
    """The type of what is computed from scores."""
    if not scores.is_floating_point():
        return torch.get_default_dtype()
    return torch.promote_types(scores.dtype, torch.float32)


def check_scores(scores: Tensor, name: str = "scores") -> None:
    """Raise ValueError unless all scores are finite and lie in [0, 1]."""
    if scores.dtype == torch.bool:
        return
    low, high = scores.aminmax()
    if not (bool(low >= 0) and bool(high <= 1)):  # also where one is NaN
        raise ValueError(
            f"{name}: scores from {float(low):g} to {float(high):g}: give finite numbers in "
            "[0, 1], such as 1 where a model is right and 0 where it is wrong."
        )
