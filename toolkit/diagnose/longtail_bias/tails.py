r"""Long tails made to measure: counts, samples, class orders, groups.

**Counts.** With K classes sorted from the most to the least frequent, :math:`u_k = k/(K-1)` and the
imbalance ratio :math:`\rho = n_0/n_{K-1} \ge 1`:

.. math:: \text{exponential: } n_k = \lfloor n_{\max}\,\rho^{-u_k} \rfloor \qquad
    \text{Pareto: } n_k = \lfloor n_{\max}\,(1 + (\rho^{1/\alpha} - 1)\,u_k)^{-\alpha} \rfloor

The first is the convention of CIFAR-100-LT (there :math:`n_{\max} = 500`). The second is ours:
ImageNet-LT is said to follow a Pareto law with :math:`\alpha = 6`, without a formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.diagnose.longtail_bias.checks import check_counts

PROFILES = ("exponential", "pareto")
GROUPS = ("Many", "Medium", "Few")


def longtail_counts(
    classes: int,
    largest: int,
    ratio: float,
    profile: str = "exponential",
    alpha: float = 6.0,
    order: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """Examples per class (K,), int64.

    Args:
        classes: K.
        largest: examples of the most frequent class.
        ratio: that of the most to the least frequent class, 1 or more; 100 is the card's IR-100.
        profile: ``exponential`` or ``pareto``.
        alpha: exponent of the Pareto profile; the larger, the closer to the exponential one.
        order: a permutation (K,), the classes from most to least frequent; 0, 1, 2, ... by default.

    Raises:
        ValueError: an argument outside its range, an order that is no permutation, or a class
            left without an example.
    """
    if classes < 2 or largest < 1 or not ratio >= 1 or not alpha > 0 or math.isinf(ratio):
        raise ValueError(
            f"classes={classes}, largest={largest}, ratio={ratio}, alpha={alpha}: need at least "
            "two classes, one example, a finite ratio of 1 or more and a positive alpha."
        )
    if profile not in PROFILES:
        raise ValueError(f'profile={profile!r}: choose "exponential" or "pareto".')
    counts = []
    for k in range(classes):
        u = k / (classes - 1)
        if profile == "exponential":
            share = (1 / ratio) ** u
        else:
            # the logarithm of the base, because ratio ** (1 / alpha) overflows for a small alpha
            top = math.log(ratio) / alpha
            grown = top + math.log(u + (1 - u) * math.exp(-top)) if u else 0.0
            share = math.exp(-alpha * grown)
        # 1/49 times 49 is a little below 1; a whole number must not lose one to that
        counts.append(math.floor(largest * share + 1e-9))
    if counts[-1] < 1:
        raise ValueError(
            f"ratio={ratio} leaves the rarest class without an example of largest={largest}: "
            f"choose a ratio of at most {largest}."
        )
    made = torch.tensor(counts)
    if order is None:
        return made
    place = _permutation(order, classes)
    return torch.empty_like(made).index_copy_(0, place, made)


def _permutation(order: Tensor | Sequence[int], classes: int) -> Tensor:
    place = torch.as_tensor(order, dtype=torch.int64).cpu()
    if place.shape != (classes,) or place.sort().values.tolist() != list(range(classes)):
        raise ValueError(f"order must hold each of the {classes} classes 0 to {classes - 1} once.")
    return place


def longtail_sample(labels: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """Places in ``labels`` of exactly ``counts[k]`` examples of each class k, without replacement.

    Args:
        labels: (N,) classes.
        counts: (K,) examples wanted of each.
        generator: draws which.

    Returns:
        (sum of counts,) int64, class by class.

    Raises:
        ValueError: negative or fractional counts, or a class with too few examples.
    """
    wanted = check_counts(counts, zero=True).tolist()
    chosen = []
    for k, n in enumerate(wanted):
        there = (labels == k).nonzero().flatten().cpu()
        if len(there) < n:
            raise ValueError(
                f"counts[{k}] = {n:g}, but labels hold {len(there)} examples of class {k}: lower "
                "counts, or sample from more data."
            )
        chosen.append(there[torch.randperm(len(there), generator=generator)[: int(n)]])
    return torch.cat(chosen)


def correlated_order(
    order: Tensor | Sequence[int], correlation: float, generator: torch.Generator
) -> Tensor:
    r"""A class order whose rank correlation (Spearman) with another is as wanted.

    Each class is scored :math:`\cos\theta\,r + \sin\theta\,\varepsilon`, its old rank mixed with
    a random one, and sorted. The angle is found by bisection, so that the correlation is met up to
    the step that one exchange of neighbours makes; 1 gives the order itself, -1 its reverse.

    Args:
        order: (K,) classes from most to least frequent.
        correlation: from -1 to 1.
        generator: draws the random ranks.

    Raises:
        ValueError: a correlation outside [-1, 1], or an order that is no permutation.
    """
    if not -1 <= correlation <= 1:
        raise ValueError(f"correlation={correlation}: must lie in [-1, 1].")
    place = _permutation(order, len(order))
    size = len(place)
    rank = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    noise = torch.zeros_like(rank)
    # a short order is often drawn as it was or reversed; two classes have no other
    while size > 2 and noise.norm() < 1e-6:
        noise = torch.randperm(size, generator=generator).double() - (size - 1) / 2
        # independent of the ranks up to chance; what is left of chance would bias the middle
        noise = noise - rank * (noise @ rank) / (rank @ rank)
    noise *= rank.norm() / noise.norm().clamp(min=1e-6)

    def mixed(theta: float) -> tuple[float, Tensor]:
        by = (math.cos(theta) * rank + math.sin(theta) * noise).argsort(stable=True)
        new = torch.empty(size, dtype=torch.float64)
        new[by] = rank
        return float(new @ rank / (rank @ rank)), by

    low, high = 0.0, math.pi
    best = min((mixed(low), mixed(high)), key=lambda m: abs(m[0] - correlation))
    for _ in range(60):
        middle = (low + high) / 2
        now = mixed(middle)
        best = min((best, now), key=lambda m: abs(m[0] - correlation))
        low, high = (middle, high) if now[0] > correlation else (low, middle)
    return place[best[1]]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of two vectors (K,), ties at their mean rank."""
    from scipy.stats import spearmanr

    return float(spearmanr(a.detach().cpu().numpy(), b.detach().cpu().numpy()).statistic)


def groups_by_count(counts: Tensor, many: int = 100, few: int = 20) -> Tensor:
    """D groups (K,): 0 Many (more than ``many``), 1 Medium, 2 Few (less than ``few``).

    The convention of OLTR and LIFT. All variants of CIFAR-100-LT take the counts of the one with
    ratio 100.

    Raises:
        ValueError: negative counts, or few > many + 1, so that a class would be in both.
    """
    counts = check_counts(counts, zero=True)
    if few > many + 1:
        raise ValueError(f"few={few} and many={many}: a class could be in both groups.")
    return torch.where(counts > many, 0, torch.where(counts < few, 2, 1))


def groups_by_rank(values: Tensor) -> Tensor:
    """Thirds (K,) by descending value: the first K // 3 classes are 0 Many, the next K // 3 are
    1 Medium, the rest 2 Few. Of equal values the class with the smaller number comes first.

    The cut of GLA's code for the estimated prior. That the paper cuts in the same way is inferred.

    Raises:
        ValueError: fewer than three classes, or a value that is not finite.
    """
    values = torch.as_tensor(values)
    if values.dim() != 1 or len(values) < 3 or not values.isfinite().all():
        raise ValueError("values: give one finite number for each of at least three classes.")
    third = len(values) // 3
    groups = torch.empty(len(values), dtype=torch.int64)
    order = values.argsort(descending=True, stable=True).cpu()
    groups[order] = torch.tensor([0] * third + [1] * third + [2] * (len(values) - 2 * third))
    return groups
