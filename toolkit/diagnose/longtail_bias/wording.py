"""What the words and the figures of a diagnosis share: its numbers, and how they are written."""

from __future__ import annotations

import math
from typing import Protocol

import pandas as pd
from torch import Tensor


class Diagnosed(Protocol):
    """What words and figures are made of; :class:`Diagnosis` says what each is."""

    accuracy: float
    micro: float
    cut: str
    level: float | None
    left: float | None
    rank_correlation: float | None
    counts: Tensor
    prior: Tensor | None
    d_groups: Tensor
    p_groups: Tensor | None
    data: pd.DataFrame
    parameter: pd.DataFrame | None
    cells: pd.DataFrame | None
    per_class: pd.DataFrame


def percent(share: float) -> str:
    """A share in words: 0.5 is 50.0 %, NaN is none."""
    return "none" if math.isnan(share) else f"{100 * share:.1f} %"


def classes_of(n: int) -> str:
    """A number of classes in words."""
    return f"{n} class" if n == 1 else f"{n} classes"
