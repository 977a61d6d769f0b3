r"""The bottleneck adapter: a small network after (or beside) a frozen module.

.. math:: y' = y + U\,\sigma(D y + d) + u, \qquad D \in \mathbb{R}^{h \times m},\ U = 0
    \text{ at the start}

Serial after each sub-layer in Houlsby et al., *Parameter-Efficient Transfer Learning for NLP*,
arXiv 1902.00751; in parallel with a factor s in He et al., arXiv 2110.04366.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from toolkit.core.adapt.beside import Bottleneck
from toolkit.core.adapt.sites import Site
from toolkit.core.declare.fields import Alpha, Declared, Rank
from toolkit.core.declare.info import Info

ACTS = {"gelu": nn.GELU, "relu": nn.ReLU}


@dataclass(frozen=True)
class Houlsby(Declared):
    """A bottleneck after the layers that ``targets`` names, such as the output projections.

    Args:
        width: hidden units h. Source: paper, 8 to 256.
        act: nonlinearity. Source: paper, GELU in its code.
        parallel: read the layer's input instead of its output; not beside convolutions. Source:
            arXiv 2110.04366.
        scale: factor of what is added. Source: arXiv 2110.04366, 1 to 4.
    """

    width: Rank = 8
    act: Literal["gelu", "relu"] = "gelu"
    parallel: bool = False
    scale: Alpha = 1.0

    info: ClassVar[Info] = Info(
        slug="houlsby",
        part="core",
        title="Bottleneck adapter",
        arxiv="1902.00751",
        year=2019,
        code="google-research/adapter-bert",
        equation=r"y' = y + U\,\sigma(D y)",
        acts_on="what leaves a layer",
        count=r"2hm + h + m",
        inference="two small products per layer",
        colour="#6F9E6F",
        mergeable=False,
        kinds=("linear", "hf_conv1d", "conv", "module"),
    )

    def build(self, site: Site, generator: torch.Generator | None = None) -> Bottleneck:
        return Bottleneck(
            site, self.width, ACTS[self.act](), self.parallel, self.scale, generator=generator
        )

    def count(self, site: Site) -> int:
        """h (n + m) + h + m numbers, n the width that is read."""
        read = (site.cols or site.rows) if self.parallel else site.rows
        return self.width * (read + site.rows + 1) + site.rows
