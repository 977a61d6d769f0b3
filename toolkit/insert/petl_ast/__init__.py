r"""Adapters of a spectrogram transformer, and what they are compared with.

In a pre-norm block a sub-layer S (attention, or feed-forward) reads the normalised N and adds to
the stream R. A small network A of width :math:`b=\mathrm{round}(d/RR)` stands at S:

.. math::
    \text{parallel } R+S(N)+A(N), \qquad \text{sequential } R+S(N)+A(S(N))

Source: Cappellazzo, Falavigna, Brutti, Ravanelli, *Parameter-Efficient Transfer Learning of Audio
Spectrogram Transformers*, arXiv 2312.03694, of which the abstracts of three versions were read;
formulas and defaults are those of the official code ``umbertocappellazzo/PETL_AST`` (the revision
of MLSP 2024). In the same package: key and value prefixes and prompts, which the paper compares,
and the mixtures of adapters of arXiv 2402.00828. LoRA, BitFit and full training are the toolkit's
own. Where formulas and code differ, ``like="code"`` follows the code:

* its two matrices start both at zero, where no gradient would ever reach them, but its loader draws
  them anew, so that the adapted model starts *near* its base; here ``up`` starts at 0;
* the Conformer's norm is computed and not used; ConvPass's convolution likewise;
* a mixture at the attention is added a second time after the feed-forward, and slots are
  normalised over the adapters instead of the features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch

from toolkit.core.adapt.model import Adapted
from toolkit.core.adapt.sites import Site
from toolkit.core.declare.fields import BelowOne, Declared, Like, Range
from toolkit.core.declare.info import Info
from toolkit.insert.petl_ast import inner as inners
from toolkit.insert.petl_ast.around import AroundBlock, InBlocks
from toolkit.insert.petl_ast.places import asked, beside, sublayers

__all__ = ["ASTAdapter", "beside", "learning", "sublayers"]


@dataclass(frozen=True)
class ASTAdapter(InBlocks, Declared):
    """An adapter in each block that ``targets`` names, by default in all.

    ``adapt(model, method, train=beside(model, method))`` trains the final norm, the norm that feeds
    the adapter and the head with it, as the official code does.

    Args:
        inner: what it computes. Source: official code; the paper's own is the Conformer's.
        reduction: rate RR, so that b = round(d / RR). Source: official code.
        place: at the feed-forward or the attention (Pfeiffer), or at both (Houlsby). Source:
            official code.
        order: whether it reads what the sub-layer reads, or what it writes. Source: official code;
            parallel_after and sequential_before are its ablations, R + S(N) + A(S(N)) and
            R + S(A(N)) + A(N).
        residual: a way around the adapter: + N if parallel, + S(N) if sequential; None takes what
            leaves the base as it is at the start. Source: paper, abstract and README.
        kernel: tokens that the Conformer's depthwise convolution sees. Source: official code.
        dropout: on what leaves a Conformer, or inside ConvPass. Source: official code, 0.1 in
            ConvPass, where it never acts.
        like: follow the formulas or the released code. Source: ours.
        start: ``up`` at 0 (identity), all at 0, or drawn as the code's loader does; None follows
            ``like``. Source: ours.

    Raises:
        TypeError, ValueError: a hyperparameter of the wrong type or outside its range, or a
            residual that an ablation has not.
    """

    inner: Literal["conformer", "bottleneck", "convpass"] = "conformer"
    reduction: Annotated[int, Range(1, 4096, log=True)] = 96
    place: Literal["ffn", "mhsa", "both"] = "ffn"
    order: Literal["parallel", "sequential", "parallel_after", "sequential_before"] = "parallel"
    residual: bool | None = None
    kernel: Annotated[int, Range(1, 255)] = 31
    dropout: BelowOne = 0.0
    like: Like = "paper"
    start: Literal["identity", "zero", "redrawn"] | None = None

    info: ClassVar[Info] = Info(
        slug="petl_ast",
        part="insert",
        title="Adapters for AST",
        arxiv="2312.03694",
        year=2023,
        code="umbertocappellazzo/PETL_AST",
        equation=r"y = R + S(N) + A(N),\quad A(N) = U\,\sigma(D N)",
        acts_on="what leaves attention or feed-forward, in each block",
        count=r"2bm + b + m",
        inference="a small network in each block",
        colour="#882255",
        mergeable=False,
        kinds=("module",),
    )
    tiny: ClassVar[dict[str, Any]] = {"reduction": 4, "kernel": 3}

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = {"parallel_after": True, "sequential_before": False}
        if self.order in allowed and self.residual not in (None, allowed[self.order]):
            raise ValueError(
                f"{type(self).__name__}(residual={self.residual!r}): order={self.order!r} is an "
                "ablation of one form; leave residual out"
            )

    @property
    def own(self) -> bool:
        """Whether there is a way around the adapter."""
        if self.residual is None:
            return self.order in ("sequential", "parallel_after")
        return self.residual

    def build(self, site: Site, generator: torch.Generator | None = None) -> AroundBlock:
        return AroundBlock(self, site, generator)

    def count(self, site: Site) -> int:
        """2 d b + b + d numbers for a bottleneck in a block of width d, and so on; twice for both
        places."""
        return len(asked(self)) * inners.count(self, site)


def learning(adapted: Adapted) -> Adapted:
    """Put the trunk into evaluation mode and the adapters into training mode, and return both.

    A frozen trunk has no use for its dropout, but the batch norm of a Conformer adapter must
    measure. ``adapted.model.eval()`` ends it.
    """
    adapted.model.eval()
    for adapter in adapted.adapters.values():
        adapter.train()
    return adapted
