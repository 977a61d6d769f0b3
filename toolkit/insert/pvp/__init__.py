r"""PVP: start the small modules of a few-shot task from modules that were trained before.

The backbone :math:`\Theta` stays frozen throughout. Stage 1 trains modules :math:`\phi`, prompts or
low-rank factors, once on a large labelled source; stage 2 starts every task from them, with a head
:math:`\psi` of its own:

.. math:: \phi_{pre},\psi_s = \arg\min_{\phi,\psi}
    E_{(x,y)\sim D_s} L(h_\psi(f_{\Theta,\phi}(x)), y), \qquad \phi_0 = \phi_{pre}

The class below is the prompts alone; the two stages work for the modules of any method::

    found = pretrain(model, PVP(), "blocks.*", classes=5, loop=train)
    found.save("modules.safetensors")
    adapted = downstream(model, PVP(), "blocks.*", "modules.safetensors", classes=7)

Source: Song, Yang, Guan, Zhu, Qiao, Hu, *PVP: Pre-trained Visual Parameter-Efficient Tuning*, arXiv
2304.13639. Only its abstract was read and no official code was found, so source, loss and settings
of stage 1 are inferred. The prompts are those of Jia et al., *Visual Prompt Tuning*, arXiv
2203.12119, whose code ``KMnP/vpt`` gives the uniform start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch

from toolkit.core.adapt.sites import Site
from toolkit.core.adapt.tokens import TokenLayer
from toolkit.core.declare.fields import Declared, Range, Rank
from toolkit.core.declare.info import Info
from toolkit.insert.pvp.modules import Modules, start_from
from toolkit.insert.pvp.places import Plan, decide
from toolkit.insert.pvp.shots import check_labels, few_shot
from toolkit.insert.pvp.stages import downstream, fresh_head, pretrain

__all__ = [
    "PVP",
    "Modules",
    "check_labels",
    "downstream",
    "few_shot",
    "fresh_head",
    "pretrain",
    "start_from",
]


@dataclass(frozen=True)
class PVP(Declared):
    r"""Visual prompts: learned tokens in a transformer that reads an image as patches.

    Deep: every block that ``targets`` names has p tokens of its own, and what it makes of them is
    dropped, :math:`[c_i; \cdot\,; E_i] = B_i([c_{i-1}; P_i; E_{i-1}])`. Shallow: p tokens enter
    before the one block that is named, and stay. Without ``targets`` all blocks are taken, or the
    first. They get no positions, so their order does not matter.

    Args:
        tokens: tokens p of one block. Source: VPT, official code 5, paper 1 to 200.
        form: tokens for every block, or for one that the others then read. Source: VPT.
        start: law of the random start. Source: VPT, official code.
        patch: side s of a patch, for the bound of the uniform start. Source: ViT-B/16.
        channels: of the images, for the same. Source: VPT, official code.
        std: of the normal start. Source: Prefix-Tuning's and the toolkit's own.
        after: tokens of the network's own that stay before the prompts, such as a class token.
            Source: VPT; of no effect on deep prompts.

    Raises:
        TypeError, ValueError: a hyperparameter of the wrong type or outside its range.
    """

    tokens: Rank = 5
    form: Literal["deep", "shallow"] = "deep"
    start: Literal["uniform", "normal"] = "uniform"
    patch: Annotated[int, Range(1, 4096, log=True)] = 16
    channels: Annotated[int, Range(1, 4096)] = 3
    std: Annotated[float, Range(0.0, 10.0, open_low=True)] = 0.02
    after: Annotated[int, Range(0, 1024)] = 1

    info: ClassVar[Info] = Info(
        slug="pvp",
        part="insert",
        title="PVP",
        arxiv="2304.13639",
        year=2023,
        equation=r"\phi_0 = \phi_{pre}",
        acts_on="the start of prompts or other small modules",
        count="p\\,d",
        inference="p more tokens in every block",
        colour="#0B7A75",
        zero_init=False,
        mergeable=False,
        kinds=("module",),
    )
    beginning: ClassVar[frozenset[str]] = frozenset({"start", "patch", "channels", "std"})
    """Fields that only say how the random start is drawn; trained modules do not depend on them."""

    def bound(self, width: int) -> float:
        r"""v of the uniform start on [-v, v]: :math:`\sqrt{6 / (c s^2 + d)}`, with d the width."""
        return math.sqrt(6 / (self.channels * self.patch**2 + width))

    def decided(self, model: Any, targets: Any, batches: Any, loss: Any, train: Any) -> Plan | None:
        """The blocks, where ``targets`` is left out; and the refusal of what reads no tokens."""
        return decide(self, model, targets)

    def build(self, site: Site, generator: torch.Generator | None = None) -> TokenLayer:
        """Tokens (p, d) of one block of width d."""
        return TokenLayer(
            site,
            self.tokens,
            std=self.std,
            generator=generator,
            bound=self.bound(site.rows) if self.start == "uniform" else None,
            after=self.after,
            kept=self.form == "shallow",
        )

    def count(self, site: Site) -> int:
        """p d numbers for a block of width d."""
        return self.tokens * site.rows
