"""Accuracy by class, by group of classes and by cell, and what goes into them, checked.

The unit of repetition is the class: intervals say what other classes of the same kind would do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from toolkit.core.evidence.intervals import interval
from toolkit.diagnose.longtail_bias.losses import are_probabilities, check_logits
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


def check_groups(groups: Tensor, classes: int, name: str, level: float | None) -> Tensor:
    if level is not None and not 0 < level < 1:
        raise ValueError(f"level={level}: choose a number between 0 and 1, such as 0.95.")
    fits = groups.shape == (classes,) and not groups.is_floating_point()
    if not fits or groups.min() < 0 or groups.max() > 2:
        raise ValueError(
            f"{name}: give 0 (Many), 1 (Medium) or 2 (Few) for each of the {classes} classes."
        )
    return groups


def numbers(values: Any, name: str) -> Tensor:
    """Tensor, array, list or Series as a float64 or int64 tensor on the CPU."""
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        if array.dtype.kind not in "iuf":
            raise ValueError(
                f"{name} holds {array.dtype}, not numbers: use Diagnosis.from_frame for names."
            )
        kind = np.float64 if array.dtype.kind == "f" else np.int64
        values = torch.from_numpy(np.array(array, dtype=kind, order="C"))
    if values.dtype == torch.bool or values.is_complex():
        raise ValueError(f"{name} holds {values.dtype}: give whole numbers or logits.")
    values = values.detach().cpu()
    return values.double() if values.is_floating_point() else values.long()


def vector(values: Any, name: str) -> Tensor:
    """The same for a vector over classes, where a Series may hide another order of the classes."""
    keys = values.index.tolist() if isinstance(values, pd.Series) else []
    if keys != list(range(len(keys))):
        raise ValueError(
            f"{name} is a Series with an order of its own (it starts with {keys[0]!r}): "
            "sort it by class with .sort_index(), or use Diagnosis.from_frame, which goes by names."
        )
    return numbers(values, name)


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


def uneven(values: Tensor) -> bool:
    """Whether the values are not all the same."""
    return bool(values.max() > values.min())


def answers(given: Any, labels: Any, classes: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """Logits (None if classes were given), predicted classes and labels, checked. Of probabilities
    the logarithm is taken.

    Raises:
        ValueError: logits with NaN, of another number of classes, or with a row of only -inf.
    """
    name = "predictions_or_logits"
    given, labels = numbers(given, name), numbers(labels, "labels")
    if given.dim() == 1:
        return None, given, labels
    if not given.is_floating_point():
        raise ValueError(f"{name} is a table of whole numbers: give logits, or classes (N,).")
    if given.shape[1:] != (classes,):
        raise ValueError(
            f"{name} has shape {tuple(given.shape)}, but counts hold {classes} classes: give one "
            "column of logits per class, (N, K), or predicted classes, (N,)."
        )
    if are_probabilities(given):
        given = given.log()
    check_logits(given, labels, name)
    empty = (given == -torch.inf).all(1)
    if empty.any():
        row = int(empty.nonzero()[0])
        raise ValueError(f"{name}[{row}] is -inf for every class: leave the example out.")
    return given, given.argmax(1), labels


def in_order(values: Any, names: Sequence[Hashable], what: str) -> np.ndarray:
    """Values of a mapping or Series (class name to number) in the order of ``names``.

    Raises:
        ValueError: a name twice, missing, or without a class.
    """
    keys, known = list(values.keys()), set(names)
    twice = [key for key, times in Counter(keys).items() if times > 1]
    odd = twice + [key for key in keys if key not in known] + sorted(known - set(keys), key=str)
    if odd:
        raise ValueError(f"{what} must name every class of counts once; see {odd[0]!r}.")
    return np.asarray([values[name] for name in names])


def places(column: pd.Series, names: Sequence[Hashable]) -> np.ndarray:
    """A column of class names as class numbers.

    Raises:
        ValueError: a name that ``names`` does not hold.
    """
    place = {name: k for k, name in enumerate(names)}
    found = np.array([place.get(value, -1) for value in column.tolist()], dtype=np.int64)
    if (found < 0).any():
        row = int(np.argmax(found < 0))
        raise ValueError(
            f"frame[{column.name!r}] holds {column.iloc[row]!r} (row {row}), and counts do not: "
            "give counts as a mapping from every class name to its training examples (or 0)."
        )
    return found


def scores_of(frame: pd.DataFrame, scores: Sequence[Hashable], names: Sequence[Hashable]) -> Any:
    """Columns of scores as an array (N, K).

    Raises:
        ValueError: another number of columns than classes, columns named like the classes in
            another order, or text in them.
    """
    if len(scores) != len(names) or len(set(scores)) != len(scores):
        raise ValueError(
            f"scores has {len(scores)} columns: give one for each of {len(names)} classes."
        )
    words, wanted = [str(s) for s in scores], [str(n) for n in names]
    if words != wanted and sorted(words) == sorted(wanted):
        raise ValueError(
            f"scores are named like the classes, but in another order (first {words[0]!r}, counts "
            f"{wanted[0]!r}): use the order of counts, scores=list(counts.keys())."
        )
    try:
        return frame[scores].to_numpy(dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"scores: a column is not of numbers ({error}).") from error
