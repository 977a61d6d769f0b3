"""What all losses share: vectors over classes that fit the logits, and the labels' likelihood."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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
    """log p of each label (b,); unlike F.cross_entropy it can be batched by vmap with weights."""
    return F.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]
