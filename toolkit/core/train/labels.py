"""Labels as data sets give them, read as class numbers or refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The label of an example that does not count, as in ``torch.nn.functional.cross_entropy``."""


def class_numbers(labels: Any, rows: int, name: str = "labels") -> Tensor:
    """Class numbers (rows,) as int64, from whole numbers of any width.

    Args:
        labels: tensor, array or list (rows,).
        rows: how many examples there are.
        name: what the labels are called in messages.

    Raises:
        ValueError: soft, multi-label or one-hot labels, bools, or another shape.
    """
    made = torch.as_tensor(labels)
    if made.is_floating_point() or made.is_complex():
        raise ValueError(
            f"{name} hold {made.dtype} of shape {tuple(made.shape)}: give one class number per "
            "example, whole numbers such as int64. Soft and multi-label targets are not supported."
        )
    if made.dtype == torch.bool:
        raise ValueError(f"{name} hold bools: if these are classes 0 and 1, give {name}.long().")
    if made.shape != (rows,):
        remedy = "give one class number per example"
        if made.shape == (rows, 1):
            remedy += f", as {name}.squeeze(1) does"
        elif made.dim() == 2 and len(made) == rows:
            remedy += f"; of one-hot rows {name}.argmax(1) is it"
        raise ValueError(f"{name} have shape {tuple(made.shape)}, not ({rows},): {remedy}.")
    return made.long()


def refuse_outside(labels: Tensor, classes: int, name: str = "labels") -> None:
    """Raise ValueError for a class number outside 0 to ``classes`` - 1 that is not ``IGNORED``.

    On a GPU, where looking would wait for the device, the kernels look; so they do in transforms.
    """
    hidden = torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()
    if hidden or labels.device.type != "cpu" or not labels.numel():
        return
    low, high = (int(end) for end in labels.aminmax())
    if low >= 0 and high < classes:
        return
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != IGNORED)]
    if wrong.numel():
        raise ValueError(
            f"{name} hold {int(wrong[0])}: classes are 0 to {classes - 1}, and {IGNORED} is an "
            "example that does not count."
        )
