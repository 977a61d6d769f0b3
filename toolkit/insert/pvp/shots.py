"""Few-shot draws: exactly k examples of each class, from a generator."""

from __future__ import annotations

import torch
from torch import Tensor


def few_shot(labels: Tensor, k: int, generator: torch.Generator | None = None) -> Tensor:
    """Row numbers (C k,) of k examples of each of C classes, class by class.

    The order within a class does not depend on k, so with generators in the same state a draw of
    few shots is part of a draw of more.

    Args:
        labels: classes (n,), whole numbers; every class that occurs is drawn from.
        k: examples of each class, at least 1.
        generator: source of the draw, of the labels' device or the CPU's.

    Raises:
        TypeError: labels that are no whole numbers.
        ValueError: labels of another shape, k below 1, or a class with fewer than k examples.
    """
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels: whole numbers are needed, got {labels.dtype}; use labels.long()")
    if labels.dim() != 1 or not len(labels):
        raise ValueError(f"labels: one class for each example, got shape {tuple(labels.shape)}")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k={k!r}: take 1 or more examples of each class")
    classes, sizes = labels.unique(return_counts=True)
    if int(sizes.min()) < k:
        short = int(sizes.argmin())
        raise ValueError(
            f"k={k}, but class {int(classes[short])} has {int(sizes[short])} examples; choose k up "
            f"to {int(sizes[short])}, or leave that class out of labels"
        )
    where = generator.device if generator is not None else "cpu"
    rows = []
    for each in classes:
        own = (labels == each).nonzero()[:, 0]
        order = torch.randperm(len(own), generator=generator, device=where).to(own.device)
        rows.append(own[order[:k]])
    return torch.cat(rows)


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise ValueError unless the labels are exactly the classes 0, ..., C - 1 of a head.

    Args:
        labels: of a task's training set.
        classes: C, the outputs of its head.
    """
    found = sorted(set(labels.flatten().tolist()))
    if found != list(range(classes)):
        shown = f"{found[:8]}" + ("..." if len(found) > 8 else "")
        raise ValueError(
            f"labels: {len(found)} classes {shown}, but the head has {classes} outputs, for 0 to "
            f"{classes - 1}; number the task's classes from 0, and give the head as many outputs"
        )
