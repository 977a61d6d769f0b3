"""Importance smoothed over steps, and how much it varies: what AdaLoRA and IncreLoRA rank by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def smooth(
    now: Sequence[Tensor],
    importance: Sequence[Tensor],
    uncertainty: Sequence[Tensor],
    beta1: float,
    beta2: float,
) -> None:
    r"""Take one step's importance S into the averages, in place.

    .. math:: I \leftarrow \beta_1 I + (1-\beta_1)\,S, \qquad
        U \leftarrow \beta_2 U + (1-\beta_2)\,|S - I|

    The new I stands in U, and nothing corrects for the start at 0 (AdaLoRA's paper, equations 7
    and 8). What ranks is the product I U.

    Args:
        now: S, one tensor per entry of the averages, any shape; overwritten.
        importance, uncertainty: I and U, of the same shapes.
        beta1, beta2: how much the averages keep.
    """
    torch._foreach_lerp_(importance, now, 1 - beta1)
    torch._foreach_sub_(now, importance)
    torch._foreach_abs_(now)
    torch._foreach_lerp_(uncertainty, now, 1 - beta2)
