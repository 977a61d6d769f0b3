"""What all losses share: vectors over classes that fit the logits, labels, and a mean over them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from toolkit.core.train.labels import IGNORED, class_numbers, refuse_outside


def read(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (b,) as int64, and which of them count (b,).

    Raises:
        ValueError: logits that are no (b, K) of floating point, or labels that do not fit them; see
            :mod:`toolkit.diagnose.longtail_bias.losses`.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and dtype {logits.dtype}: give (examples, "
            "classes) of floating point."
        )
    labels = class_numbers(labels, len(logits)).to(logits.device)
    refuse_outside(labels, logits.shape[1])
    return labels, labels != IGNORED


def fitted(logits: Tensor, each: Tensor) -> Tensor:
    """A vector over classes where the logits (b, K) are.

    Raises:
        ValueError: logits of another number of classes than the loss was made for.
    """
    if logits.shape[-1:] != each.shape:
        raise ValueError(
            f"logits have {logits.shape[-1]} classes, this loss was made for {len(each)}: give it "
            "the counts or the prior of these classes."
        )
    return each.to(logits.device)


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """log p of each label (b,), of class 0 where the label does not count; unlike F.cross_entropy
    it can be batched by vmap with weights."""
    return F.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]


def mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of the values (b,) that count; NaN if none does, as of F.cross_entropy."""
    return values.where(counted, 0).sum() / counted.sum()
