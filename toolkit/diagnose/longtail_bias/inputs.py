"""What goes into a diagnosis, from any framework: tensors, arrays, lists, checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from toolkit.diagnose.longtail_bias.checks import are_probabilities, check_logits, check_prior
from toolkit.diagnose.longtail_bias.prior import estimate_prior


def numbers(values: Any, name: str) -> Tensor:
    """Tensor, array, list or column of any library as a float64 or int64 tensor on the CPU."""
    if isinstance(values, list | tuple) and values and all(isinstance(v, Tensor) for v in values):
        values = torch.stack([v.detach() for v in values])
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        if array.dtype == object:  # pandas' whole numbers that may be missing
            array = np.array(array.tolist())
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


def check_groups(groups: Tensor, classes: int, name: str, level: float | None) -> Tensor:
    """Groups (K,) of 0 Many, 1 Medium or 2 Few, and a confidence level.

    Raises:
        ValueError: another group, a vector of another length, or a level outside (0, 1).
    """
    if level is not None and not 0 < level < 1:
        raise ValueError(f"level={level}: choose a number between 0 and 1, such as 0.95.")
    fits = groups.shape == (classes,) and not groups.is_floating_point()
    if not fits or groups.min() < 0 or groups.max() > 2:
        raise ValueError(
            f"{name}: give 0 (Many), 1 (Medium) or 2 (Few) for each of the {classes} classes."
        )
    return groups


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


def model_prior(prior: Any, zero_shot: tuple[Any, Any] | None, classes: int) -> Tensor | None:
    """The foundation model's prior (K,): as given, estimated from its zero-shot answers, or None.

    Raises:
        ValueError: both are given, they do not fit the classes, or no temperature calibrates the
            zero-shot answers.
    """
    if prior is not None and zero_shot is not None:
        raise ValueError("prior and zero_shot are both given: the prior comes from one; choose.")
    if prior is not None:
        return check_prior(vector(prior, "prior"), classes)
    if zero_shot is None:
        return None
    if not isinstance(zero_shot, tuple | list) or len(zero_shot) != 2:
        raise ValueError("zero_shot: give a pair (logits, labels) of held-out examples.")
    logits, labels = (numbers(values, "zero_shot") for values in zero_shot)
    if logits.shape[1:] != (classes,):
        raise ValueError(f"zero_shot: logits {tuple(logits.shape)}, but {classes} classes.")
    try:
        return estimate_prior(logits, labels, "calibrate", reweight=True).prior
    except ValueError as error:
        raise ValueError(
            f"zero_shot: {error} Or estimate it yourself (estimate_prior) and pass prior=."
        ) from error
