r"""The three regimes of pruning: which dense network prunes best, and how to tell beforehand.

A dense network is pruned to a density d and retrained twice or more, with nothing but the order of
the data differing. What lies between two such copies tells how the dense training should change:

.. math:: \text{I: } \mathrm{LMC} < -\epsilon \qquad
    \text{II-A: } \mathrm{LMC} \ge -\epsilon,\ \mathrm{CKA} < c \qquad
    \text{II-B: } \mathrm{LMC} \ge -\epsilon,\ \mathrm{CKA} \ge c

Source: Zhou et al., *A Three-regime Model of Network Pruning*, arXiv 2305.18383; official code
``YefanZhou/ThreeRegimePruning``. The thresholds are inferred: the paper draws the boundaries by
hand and the code has none. Connectivity, similarity and pruning follow the code; so does training
error (not loss) along the path, with batch-norm statistics estimated anew at every point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd

from toolkit.core.declare.catalogue import Info, hyper, validate
from toolkit.diagnose.three_regime.connectivity import (
    barrier,
    curved,
    lmc,
    lmc_place,
    path_errors,
)
from toolkit.diagnose.three_regime.curvature import hessian_top, hessian_trace
from toolkit.diagnose.three_regime.diagram import PhaseDiagram
from toolkit.diagnose.three_regime.evaluation import errors, losses
from toolkit.diagnose.three_regime.pruning import magnitude_masks, prunable
from toolkit.diagnose.three_regime.rule import normalised, regimes
from toolkit.diagnose.three_regime.similarity import linear_cka

__all__ = [
    "PhaseDiagram",
    "RegimeRule",
    "barrier",
    "curved",
    "errors",
    "hessian_top",
    "hessian_trace",
    "linear_cka",
    "lmc",
    "lmc_place",
    "losses",
    "magnitude_masks",
    "normalised",
    "path_errors",
    "prunable",
]


@dataclass(frozen=True)
class RegimeRule:
    """Where one regime ends and the next begins.

    Raises:
        TypeError, ValueError: a threshold of the wrong type or outside its range.
    """

    epsilon: float = hyper(
        0.05,
        low=0.0,
        high=100.0,
        help="LMC below -epsilon is Regime I; a share of training examples, or seed noise units",
        source="inferred; the official code has no threshold",
    )
    in_noise_units: bool = hyper(
        False,
        help="epsilon counts standard deviations of LMC between seeds",
        source="inferred; the alternative is 5 of them",
    )
    cka: float | None = hyper(
        None,
        type=float,
        low=0.0,
        high=1.0,
        help="CKA from which a connected cell is II-B; None takes each density's midpoint",
        source="inferred",
    )

    info: ClassVar[Info] = Info(
        slug="three_regime",
        part="diagnose",
        title="Three regimes of pruning",
        arxiv="2305.18383",
        year=2023,
        code="YefanZhou/ThreeRegimePruning",
        equation=r"\mathrm{LMC} = \bar e - e(t^\star)",
        acts_on="nothing: it tells how to train the network that will be pruned",
        count="0",
        inference="none",
        colour="#882255",
        zero_init=True,
        mergeable=False,
    )

    def __post_init__(self) -> None:
        validate(self)

    def regimes(self, cells: pd.DataFrame) -> pd.Series:
        """``I``, ``II-A`` or ``II-B`` for every cell, from its means over the dense seeds.

        Args:
            cells: one row per seed, temperature and density, with ``lmc`` and ``cka``.

        Returns:
            A Series over (temperature, density).

        Raises:
            ValueError: the grid has a hole or a number that is not finite, or ``epsilon`` is below
                1 in noise units, where noise alone would decide.
        """
        return regimes(cells, self.epsilon, self.in_noise_units, self.cka)
