r"""(IA)^3: a learned factor for each output feature of a few layers.

.. math:: y' = l \odot y, \qquad l \text{ starts at } 1

In the paper on keys, values and the hidden units of the feed-forward network. Source: Liu et al.,
*Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning*, arXiv
2205.05638.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from toolkit.core.adapt.beside import ScaleShift
from toolkit.core.adapt.sites import Site
from toolkit.core.declare.fields import Declared
from toolkit.core.declare.info import Info


@dataclass(frozen=True)
class IA3(Declared):
    """(IA)^3 on the layers that ``targets`` names, such as ``["*.key", "*.value", "*.up"]``.

    Args:
        shift: learn an offset as well, which makes it the scale and shift of a norm. Source: ours;
            the paper has none.
    """

    shift: bool = False

    info: ClassVar[Info] = Info(
        slug="ia3",
        part="core",
        title="(IA)³",
        arxiv="2205.05638",
        year=2022,
        code="r-three/t-few",
        equation=r"y' = l \odot W_0 x",
        acts_on="the output features of a layer",
        count="m",
        inference="none once merged",
        colour="#B08BB0",
        kinds=("linear", "hf_conv1d", "conv", "norm"),
    )

    def build(self, site: Site, generator: torch.Generator | None = None) -> ScaleShift:
        return ScaleShift(site, self.shift)

    def count(self, site: Site) -> int:
        """One number per output, two with the shift."""
        return site.rows * (2 if self.shift else 1)
