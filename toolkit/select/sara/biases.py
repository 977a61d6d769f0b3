"""SaRA on biases too: the one threshold for every tensor, as the paper and its code have it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from toolkit.core.adapt.rechosen import BiasedLayer, RechosenLayer
from toolkit.core.adapt.sites import KINDS, Site
from toolkit.core.declare.info import Info
from toolkit.select.sara import SaRA, _above_smallest


@dataclass(frozen=True)
class SaRABiases(SaRA):
    """SaRA that masks the bias beside each weight as well; its hyperparameters are those of SaRA.

    A share is one of weight and bias together. Biases take no part in the nuclear norm.
    """

    info: ClassVar[Info] = Info(
        slug="sara",
        part="select",
        title="SaRA on biases too",
        arxiv="2409.06633",
        year=2024,
        code="sjtuplayer/SaRA",
        equation=r"P \leftarrow P - \eta\,\nabla_P\mathcal L \odot \mathbb 1[\,|P_0|<\theta\,]",
        acts_on="the smallest entries of the weight and its bias",
        count=r"\lVert M \rVert_0",
        inference="none once merged",
        colour="#1B7837",
        kinds=(*KINDS, "norm"),
    )

    def threshold_of(self, site: Site) -> float:
        if self.share is None or site.weight is None or site.bias is None:
            return super().threshold_of(site)
        sizes = torch.cat([site.weight.reshape(-1), site.bias]).abs()
        return _above_smallest(sizes, math.ceil(self.share * len(sizes)))

    def bias_mask(self, site: Site) -> Tensor | None:
        """M of the bias, (m,) booleans, or None where there is no bias."""
        if site.bias is None:
            return None
        if bool(site.bias.isnan().any()):
            raise ValueError(f"layer {site.name!r}: its bias holds NaN, so none is smallest")
        return site.bias.abs() < self.threshold_of(site)

    def build(self, site: Site, generator: torch.Generator | None = None) -> RechosenLayer:
        mask, beside = self.mask(site), self.bias_mask(site)
        return RechosenLayer(site, mask) if beside is None else BiasedLayer(site, mask, beside)

    def count(self, site: Site) -> int:
        """The entries below the threshold; none is possible."""
        beside = self.bias_mask(site)
        return super().count(site) + (0 if beside is None else int(beside.sum()))
