r"""SSF: a scale and a shift for every channel, after each linear operation of a frozen network.

.. math:: y' = \gamma\odot y + \beta, \qquad \gamma\text{ starts at }1,\ \beta\text{ at }0

``y`` is what an operation gives, with c channels; :math:`\gamma,\beta` have shape (c,) and act
along the channel axis: the last of tokens (batch, tokens, c), axis 1 of images (batch, c, height,
width). Trained with the head, all else frozen. The operation before is linear, so a pair is folded
into it:

.. math:: W' = \mathrm{diag}(\gamma)\,W,\qquad b' = \gamma\odot b + \beta

with W the rows of a linear layer, the kernels of a convolution or the weight of a norm. Two pairs
in a row are one: :meth:`Pair.after`. :func:`places` names the sites of a network.

Source: Lian, Zhou, Feng, Wang, *Scaling & Shifting Your Features: A New Baseline for Efficient
Model Tuning*, NeurIPS 2022, arXiv 2210.08823, and github.com/dongzelian/SSF, of which only the code
and the paper's abstract were read. The code holds no routine that merges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import nn

from toolkit.core.adapt.sites import Site
from toolkit.core.declare.fields import Declared, Range
from toolkit.core.declare.info import Info
from toolkit.insert.ssf.layer import PairLayer
from toolkit.insert.ssf.pair import Pair, groups, interpolated, pairs, put_pairs
from toolkit.insert.ssf.places import check, give_affine, places, vit_count

__all__ = [
    "SSF", "Pair", "give_affine", "groups", "interpolated", "pairs", "places", "put_pairs",
    "vit_count",
]  # fmt: skip

Spread = Annotated[float, Range(0.0, 1.0)]
"""Standard deviation of a start."""


@dataclass(frozen=True)
class SSF(Declared):
    r"""Scale and shift what leaves each layer that ``targets`` names; see :func:`places`.

    >>> import torch
    >>> from toolkit import SSF, adapt
    >>> from toolkit.insert.ssf import places
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.GELU(), torch.nn.Linear(6, 2))
    >>> adapted = adapt(model, SSF(), places(model, head="2"), train="2.*")
    >>> list(adapted.adapters)
    ['0']

    Args:
        noise: standard deviation of a normal law added to both starts, 0 for exactly the base.
            Source: official code, init_ssf_scale_shift, has 0.02.
        learn: which of the two trains; the other stays 1 or 0. Source: ours, for comparisons.

    Raises:
        TypeError: when put on a model: a target is no linear operation with a weight, such as a
            nonlinearity, or a norm that has no place for a shift.
    """

    noise: Spread = 0.0
    learn: Literal["both", "scale", "shift"] = "both"

    info: ClassVar[Info] = Info(
        slug="ssf",
        part="insert",
        title="SSF",
        arxiv="2210.08823",
        year=2022,
        code="dongzelian/SSF",
        equation=r"y' = \gamma\odot y + \beta",
        acts_on="the channels of what each layer gives",
        count="2m",
        inference="none once merged",
        colour="#0F7B6C",
        kinds=("linear", "hf_conv1d", "conv", "attention", "norm"),
    )

    def decided(
        self, model: nn.Module, targets: Any, batches: Any, loss: Any, trains: Callable[[str], bool]
    ) -> None:
        """Refuse targets that could never be merged, with the places that there are."""
        check(model, targets, self.info.kinds, self.learn != "scale")

    def build(self, site: Site, generator: torch.Generator | None = None) -> PairLayer:
        return PairLayer(site, self.learn, self.noise, generator)

    def count(self, site: Site) -> int:
        """Two numbers per channel, or one."""
        return site.rows * (2 if self.learn == "both" else 1)
