r"""Inside and aside: small modules beside the frozen blocks join those inside into one path.

Adapters inside a block are apart from each other: frozen layers lie between them. An *aside*, a
bottleneck that reads what a frozen part reads and is added to what it gives, leads around it:

.. math:: B(x) = U\,\sigma(D x + d) + u, \qquad h_l = F_l(h_{l-1}) + B_l(h_{l-1})

Source: Ma, Guo, Zhang, Fan, Cheng, *Scattered or Connected? An Optimized Parameter-efficient Tuning
Approach for Information Retrieval*, arXiv 2208.09847, of which the abstract, the opening and short
notes by others were read. No official code was found. **How the asides attach is inferred**, so the
variants bear names that say what they do, not the paper's letters:

* ``layer``: around each block, as above;
* ``sublayer``: around attention and feed-forward apart, :math:`\mathrm{LN}(x + S(x) + B(x))`;
* ``stream``: :math:`s_l = s_{l-1} + B_l(h_{l-1} + s_{l-1})`, :math:`s_0 = 0`, a stream of its own
  that blocks read, :math:`h_l = F_l(h_{l-1} + s_{l-1})`, or that is added at the top alone; in both
  cases the last block gives :math:`h_L + s_L`.

Nothing of it can be merged. What search needs beside it stands in :mod:`.scoring` (losses,
encoders), :mod:`.measures` (rankings) and :mod:`.direction` (how far a step is from linear).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import nn

from toolkit.core.adapt.sites import Site
from toolkit.core.declare.fields import Declared, Range, Rank
from toolkit.core.declare.info import Info
from toolkit.insert.connected_peft_ir.places import Plan, planned


@dataclass(frozen=True)
class Connected(Declared):
    r"""Adapters inside the blocks of a transformer, and asides that join them into one path.

    ``adapt(model, Connected())`` finds the blocks by form (:mod:`toolkit.core.nets.anatomy`), puts
    bottleneck adapters after attention and feed-forward and asides beside; ``targets`` narrows the
    blocks, by name, or is an ``Anatomy`` that says by hand where the parts are. Other inside
    modules go into a mapping: ``{"*.query": LoRA(), "*layer.?": Connected(inside="none")}``.

    Args:
        variant: what an aside leads around; "none" leaves plain adapters. Source: inferred.
        rank: hidden units r of an aside. Source: ours; the paper's are not known.
        inside: adapters in the block, or none of ours. Source: paper, its inside modules.
        inside_rank: hidden units of an adapter; None takes ``rank``. Source: ours.
        act: nonlinearity of both. Source: inferred.
        inject: whether blocks read the stream or it is added at the top alone. Source: inferred.
        std: of the normal start of the way down; the way up starts at 0. Source: inferred.

    Raises:
        TypeError, ValueError: a hyperparameter of the wrong type or outside its range; no module
            at all.
    """

    variant: Literal["layer", "sublayer", "stream", "none"] = "layer"
    rank: Rank = 8
    inside: Literal["adapters", "none"] = "adapters"
    inside_rank: Rank | None = None
    act: Literal["gelu", "relu"] = "gelu"
    inject: Literal["every", "top"] = "every"
    std: Annotated[float, Range(0.0, 1.0, open_low=True)] = 0.02

    info: ClassVar[Info] = Info(
        slug="connected_peft_ir",
        part="insert",
        title="Inside and aside",
        arxiv="2208.09847",
        year=2022,
        equation=r"h_l = F_l(h_{l-1}) + U_l\,\sigma(D_l h_{l-1})",
        acts_on="what passes beside frozen blocks, and inside them",
        count=r"2rm + r + m \text{ a module}",
        inference="one or two small products per block and module",
        colour="#7A5195",
        mergeable=False,
        kinds=("module",),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant == "none" and self.inside == "none":
            raise ValueError(
                'Connected(variant="none", inside="none") puts nothing anywhere; choose a variant '
                'or inside="adapters"'
            )

    @property
    def narrow(self) -> int:
        """Hidden units of an inside adapter."""
        return self.rank if self.inside_rank is None else self.inside_rank

    def decided(self, model: nn.Module, targets: Any, batches: Any, loss: Any, train: Any) -> Plan:
        """Which module goes where in this model, as :func:`toolkit.adapt` asks for it.

        Raises:
            ValueError: no block is recognised, or targets name none; the blocks are listed. Or a
                block has no place for a module; the message says which and what to do.
        """
        return planned(self, model, targets)

    def build(self, site: Site, generator: torch.Generator | None = None) -> nn.Module:
        raise TypeError(
            f"layer {site.name!r}: asides are placed over all blocks at once; call "
            "adapt(model, Connected(...)) on the whole model"
        )

    def count(self, site: Site) -> int:
        """Numbers trained in a block of width m: 2rm + r + m a module."""
        m, asides = site.rows, {"none": 0, "sublayer": 2}.get(self.variant, 1)
        inside = 2 if self.inside == "adapters" else 0
        return asides * numbers(m, self.rank) + inside * numbers(m, self.narrow)


def numbers(width: int, rank: int) -> int:
    """Numbers of one bottleneck: 2 · rank · width + rank + width."""
    return 2 * rank * width + rank + width
