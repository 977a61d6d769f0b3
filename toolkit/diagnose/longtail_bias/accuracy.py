"""Accuracy by class, by group of classes and by cell of two cuts.

The unit of repetition is the class: intervals say what other classes of the same kind would do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from toolkit.core.evidence.intervals import interval
from toolkit.diagnose.longtail_bias.inputs import check_groups, numbers
from toolkit.diagnose.longtail_bias.tails import GROUPS


def class_accuracy(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Share of right answers of each class (K,), float64; NaN for a class without examples.

    Args:
        predictions: (N,) predicted classes.
        labels: (N,) true classes.
        classes: K.

    Raises:
        ValueError: lengths that differ, no example, or a class outside 0 to K - 1.
    """
    found = {
        "predictions": numbers(predictions, "predictions"),
        "labels": numbers(labels, "labels"),
    }
    for name, made in found.items():
        if made.dim() != 1 or made.is_floating_point() or made.shape != found["labels"].shape:
            raise ValueError(
                f"{name} has shape {tuple(made.shape)} and dtype {made.dtype}: give one whole "
                "number for each example, (N,), for predictions and labels alike."
            )
        if not len(made) or made.min() < 0 or made.max() >= classes:
            raise ValueError(f"{name} must hold classes from 0 to {classes - 1}, at least one.")
    predictions, labels = found.values()
    right = torch.bincount(labels[predictions == labels], minlength=classes).double()
    return right / torch.bincount(labels, minlength=classes)  # 0 / 0 is the NaN


def group_table(accuracy: Tensor, groups: Tensor, level: float | None = 0.95) -> pd.DataFrame:
    """Mean class accuracy of Many, Medium and Few, with an interval over the classes.

    Args:
        accuracy: (K,) shares; classes with NaN are left out and not counted.
        groups: (K,) 0 Many, 1 Medium, 2 Few.
        level: confidence level; None for no intervals, which is much quicker.

    Returns:
        Rows Many, Medium, Few; columns classes, accuracy, low, high (shares). NaN where there is
        no class, or for the interval fewer than two.

    Raises:
        ValueError: vectors that do not fit, a group that is not 0, 1 or 2, or a wrong level.
    """
    accuracy, groups = _checked(accuracy, groups, "groups", level)
    rows = [_summary(accuracy[groups == g], level) for g in range(3)]
    return pd.DataFrame(rows, index=pd.Index(GROUPS, name="group"))


def cell_table(
    accuracy: Tensor, d_groups: Tensor, p_groups: Tensor, level: float | None = 0.95
) -> pd.DataFrame:
    """The same for the nine cells of two cuts, in long form.

    Args:
        accuracy: (K,) shares; NaN is left out.
        d_groups: (K,) groups by training count.
        p_groups: (K,) groups by the foundation model's prior.
        level: confidence level, or None.

    Returns:
        Columns data and parameter (Many, Medium or Few), classes, accuracy, low, high.

    Raises:
        ValueError: as :func:`group_table`.
    """
    _, d_groups = _checked(accuracy, d_groups, "d_groups", level)
    accuracy, p_groups = _checked(accuracy, p_groups, "p_groups", level)
    rows = []
    for d, p in np.ndindex(3, 3):
        cell = _summary(accuracy[(d_groups == d) & (p_groups == p)], level)
        rows.append({"data": GROUPS[d], "parameter": GROUPS[p], **cell})
    return pd.DataFrame(rows)


def _summary(accuracy: Tensor, level: float | None) -> dict[str, Any]:
    tested = accuracy[~accuracy.isnan()].numpy()
    row = {"classes": len(tested), "accuracy": np.nan, "low": np.nan, "high": np.nan}
    if len(tested):
        row["accuracy"] = float(tested.mean())
    if len(tested) > 1 and level is not None:
        found = interval(tested, level)
        row["low"], row["high"] = found.low, found.high
    return row


def _checked(
    accuracy: Tensor, groups: Tensor, name: str, level: float | None
) -> tuple[Tensor, Tensor]:
    accuracy, groups = numbers(accuracy, "accuracy").double(), numbers(groups, name)
    if accuracy.dim() != 1 or ((accuracy < 0) | (accuracy > 1)).any():
        raise ValueError("accuracy: give one share from 0 to 1 (or NaN) for each class.")
    return accuracy, check_groups(groups, len(accuracy), name, level)


def gap(
    accuracy: Tensor, groups: Tensor, level: float | None
) -> tuple[float, tuple[float, float] | None]:
    """Many minus Few, and Welch's t interval of it over the classes.

    None in place of the interval with fewer than two classes in a group, or without any spread: two
    groups in which all classes score alike look certain however few examples were tested.
    """
    from scipy.stats import t

    many, few = (accuracy[(groups == g) & ~accuracy.isnan()].numpy() for g in (0, 2))
    if not len(many) or not len(few):
        return np.nan, None
    difference = float(many.mean() - few.mean())
    if level is None or min(len(many), len(few)) < 2 or max(np.ptp(many), np.ptp(few)) < 1e-12:
        return difference, None
    # by hand: scipy's test warns where one of the groups has no spread, which is no fault here
    parts = [(values.var(ddof=1) / len(values), len(values) - 1) for values in (many, few)]
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / n for part, n in parts)
    half = float(t.ppf(0.5 + level / 2, freedom) * variance**0.5)
    return difference, (difference - half, difference + half)
