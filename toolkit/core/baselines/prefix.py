r"""Deep prompts: k learned tokens before those of each transformer block.

.. math:: x_{l+1} = B_l([P_l; x_l])_{k+1:}

Each block l has tokens :math:`P_l` (k, m) of its own and drops what it makes of them. Source: Jia
et al., *Visual Prompt Tuning*, arXiv 2203.12119 (deep form); for text Li and Liang,
*Prefix-Tuning*, arXiv 2101.00190, which learns keys and values instead of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from toolkit.core.adapt.sites import Site
from toolkit.core.adapt.tokens import TokenLayer
from toolkit.core.declare.fields import Declared, Rank
from toolkit.core.declare.info import Info


@dataclass(frozen=True)
class Prompts(Declared):
    """Tokens before the blocks that ``targets`` names, such as ``"blocks.*"``.

    Args:
        tokens: tokens k per block. Source: paper, 1 to 200.
    """

    tokens: Rank = 4

    info: ClassVar[Info] = Info(
        slug="prefix",
        part="core",
        title="Deep prompts",
        arxiv="2203.12119",
        year=2022,
        code="KMnP/vpt",
        equation=r"x_{l+1} = B_l([P_l; x_l])_{k+1:}",
        acts_on="the tokens that a block reads",
        count="km",
        inference="k more tokens in every block",
        colour="#5C7FA3",
        zero_init=False,
        mergeable=False,
        kinds=("module",),
    )

    def build(self, site: Site, generator: torch.Generator | None = None) -> TokenLayer:
        return TokenLayer(site, self.tokens, generator=generator)

    def count(self, site: Site) -> int:
        """k m numbers for a block of width m."""
        return self.tokens * site.rows
