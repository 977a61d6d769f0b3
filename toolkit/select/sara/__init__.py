r"""SaRA: train the weights that are smallest now, and freeze all others.

With one threshold :math:`\theta` for a pretrained tensor :math:`P_0`:

.. math:: M = \mathbb 1[\,|P_0| < \theta\,],\qquad
    P \leftarrow P - \eta\,(\nabla_P \mathcal L \odot M),\qquad
    \mathcal L = \mathcal L_{task} + \lambda \sum_W \lVert W \odot M_W \rVert_*

Half way the choice is made again inside the first one: only what is still small goes on. The
learning rate follows from the threshold, :func:`learning_rate`.

Source: Hu et al., *High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank
Adaptation*, arXiv 2409.06633; official code ``sjtuplayer/SaRA``. Where they differ:

* which matrices the nuclear norm takes part in: ``like``;
* the code's memory-saving optimizer scatters absolute values, so small negative weights flip their
  sign before the first step, and its nuclear norm moves nothing. Neither is repeated here;
* at the second stage that optimizer starts its moments afresh and loses a step, the code's dense
  one keeps them; the paper is silent: ``moments``, and no step is lost.

The paper and the code mask every tensor by the one threshold, biases among them, of which many lie
near 0; only tensors of two axes take part in the nuclear norm. Here weights, and norms that are
named, are masked; :class:`~toolkit.select.sara.biases.SaRABiases` masks biases too, and ``Train()``
lets them train whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from toolkit.core.adapt import targets as names
from toolkit.core.adapt.rechosen import RechosenLayer
from toolkit.core.adapt.sites import KINDS, Site, site_of
from toolkit.core.declare.fields import Declared, Like, Range, Weight
from toolkit.core.declare.info import Info
from toolkit.select.sara.stages import StageController


@dataclass(frozen=True)
class SaRA(Declared):
    r"""SaRA's hyperparameters; builds the mask of one layer.

    Call ``adapted.attach(optimizer, total_steps=T)``; options:
    :class:`~toolkit.select.sara.stages.StageController`. The nuclear norm acts in the step, after
    gradient clipping. :func:`threshold_at` finds the threshold that takes a share of a whole model.

    Args:
        threshold: theta; a weight moves if its absolute value is below. Source: paper, 2e-4 to 2e-3
            for 5 to 50 million weights of Stable Diffusion 1.5.
        share: share of each tensor that moves, the smallest entries; overrides threshold. Source:
            none, absolute thresholds do not carry over to other networks.
        switch: step at which the second stage starts; below 1 it is a share of total_steps, None
            keeps one stage. Source: paper, half of all steps.
        rank_weight: weight lambda of the nuclear norm. Source: official script 5e-4; paper's
            appendix 5e-3; the code's default 0.
        like: nuclear norm of all matrices in each step (paper), or of one drawn anew in each step,
            among those with more than 64 rows and columns, if more than 100 of its entries move
            (code). Source: official code.
        moments: the optimizer's state of what goes on at the switch, begun afresh or kept. Source:
            official code, adamw.py and adamw2.py.

    Raises:
        TypeError, ValueError: a hyperparameter of the wrong type or outside its range.
    """

    threshold: Annotated[float, Range(0.0, 1e6)] = 2e-3
    share: Annotated[float, Range(0.0, 1.0, log=True, open_low=True, open_high=True)] | None = None
    switch: Annotated[float, Range(0.0, 1_000_000.0, open_low=True)] | None = 0.5
    rank_weight: Weight = 5e-4
    like: Like = "code"
    moments: Literal["fresh", "kept"] = "fresh"

    info: ClassVar[Info] = Info(
        slug="sara",
        part="select",
        title="SaRA",
        arxiv="2409.06633",
        year=2024,
        code="sjtuplayer/SaRA",
        equation=r"P \leftarrow P - \eta\,\nabla_P\mathcal L \odot \mathbb 1[\,|P_0|<\theta\,]",
        acts_on="the smallest entries of the weight",
        count=r"\lVert M \rVert_0",
        inference="none once merged",
        colour="#1B7837",
        kinds=(*KINDS, "norm"),
    )
    tiny: ClassVar[dict[str, Any]] = {"share": 0.5, "switch": 4, "rank_weight": 0.0}

    def threshold_of(self, site: Site) -> float:
        """The threshold in force at a site."""
        assert site.weight is not None
        if self.share is None:
            return self.threshold
        return _above_smallest(site.weight.abs().reshape(-1), math.ceil(self.share * _size(site)))

    def mask(self, site: Site) -> Tensor:
        """M, (m, n) booleans."""
        assert site.weight is not None
        if bool(site.weight.isnan().any()):
            raise ValueError(f"layer {site.name!r}: its weight holds NaN, so none is smallest")
        return site.to_matrix(site.weight).abs() < self.threshold_of(site)

    def build(self, site: Site, generator: torch.Generator | None = None) -> RechosenLayer:
        return RechosenLayer(site, self.mask(site))

    def count(self, site: Site) -> int:
        """The entries below the threshold; none is possible."""
        return int(self.mask(site).sum())

    def controller(
        self,
        adapted: Any,
        optimizer: torch.optim.Optimizer,
        total_steps: int | None,
        **options: Any,
    ) -> StageController:
        return StageController(self, adapted, optimizer, total_steps, **options)


def learning_rate(threshold: float) -> float:
    r"""The rate that the authors fitted to their thresholds, :math:`10^{-3} e^{-350\,\theta}`.

    It holds for Stable Diffusion's weights; tune the rate elsewhere.

    Raises:
        ValueError: a negative threshold.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold={threshold!r}: must be 0 or above")
    return 1e-3 * math.exp(-350 * threshold)


def threshold_at(model: nn.Module, share: float, targets: names.Targets = None) -> float:
    """The threshold below which a share of all target weights together lies.

    Args:
        model: the network, before it is adapted.
        share: strictly between 0 and 1.
        targets: as :func:`toolkit.adapt` takes them.

    Raises:
        ValueError: a share outside (0, 1), no target, or weights that hold NaN.
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share!r}: must lie strictly between 0 and 1")
    kinds = SaRA.info.kinds
    layers = names.select(model, targets, kinds)
    weights = [site_of(layer, name, kinds).weight for name, layer in layers.items()]
    sizes = torch.cat([w.abs().reshape(-1) for w in weights if w is not None])
    if bool(sizes.isnan().any()):
        raise ValueError("the weights hold NaN, so no share of them is smallest")
    return _above_smallest(sizes, math.ceil(share * len(sizes)))


def _above_smallest(sizes: Tensor, count: int) -> float:
    """A threshold with exactly ``count`` sizes below it, or fewer where sizes are equal."""
    if count >= len(sizes):
        return math.inf
    return float(sizes.kthvalue(count + 1).values)


def _size(site: Site) -> int:
    return site.rows * site.cols
