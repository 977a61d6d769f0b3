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
from typing import Annotated, ClassVar

import pandas as pd

from toolkit.core.declare.fields import Declared, Range, Share
from toolkit.core.declare.info import Info
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
class RegimeRule(Declared):
    """Where one regime ends and the next begins.

    Args:
        epsilon: LMC below -epsilon is Regime I; a share of training examples, or seed noise units.
            Source: inferred; the official code has no threshold.
        in_noise_units: epsilon counts standard deviations of LMC between seeds. Source: inferred;
            the alternative is 5 of them.
        cka: CKA from which a connected cell is II-B; None takes each density's midpoint. Source:
            inferred.

    Raises:
        TypeError, ValueError: a threshold of the wrong type or outside its range.
    """

    epsilon: Annotated[float, Range(0.0, 100.0)] = 0.05
    in_noise_units: bool = False
    cka: Share | None = None

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
