"""A small ViT that has learned handwriting without a label: it fills in hidden patches.

Images of all ten digits are cut into 16 patches; some are hidden, and the network says their
pixels from the rest. The last layer, a head of zeros, has learned nothing. So what a method does
for it with the labels of some digits can be measured on the others.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core import nets
from toolkit.core.train import rates
from toolkit.core.train.fit import fit
from toolkit.labs.beds import arms, bases, images

PATCH = 7
HIDDEN = 0.6
"""Share of the patches that are hidden, rounded."""
PRETRAINING = {"ci": 60, "cpu": 3000}
"""Steps of 128 images; 64 at ``ci``."""


class Filler(nn.Module):
    """A ViT that sees a learned vector in the place of hidden patches and says all pixels."""

    def __init__(self, network: Any, draws: torch.Generator) -> None:
        super().__init__()
        width = network.head.in_features
        self.network, self.draws = network, draws
        self.unseen = nn.Parameter(torch.zeros(width))
        self.pixels = nn.Linear(width, PATCH**2)
        nets.initialise(self.pixels, draws)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 28, 28) to squared errors of the hidden patches (batch,)."""
        net = self.network
        patches = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)
        count, length = patches.shape[:2]
        order = torch.rand(count, length, generator=self.draws).argsort(1)
        gone = (order < round(HIDDEN * length))[..., None]
        x = net.position(torch.where(gone, self.unseen, net.embed(patches)))
        for block in net.blocks:
            x = block(x)
        error = (self.pixels(net.norm(x)) - patches).square().mean(-1)
        return (error * gone[..., 0]).sum(1) / gone[..., 0].sum(1)


def empty(scale: str, draws: torch.Generator | None = None) -> Any:
    """A network without its training, whose head of five outputs is 0.

    Raises:
        ValueError: an unknown scale.
    """
    this = images.size(scale)
    model = nets.digits_transformer(this.width, this.depth, 4, 5, PATCH, 28, generator=draws)
    for parameter in model.head.parameters():
        nn.init.zeros_(parameter)
    return model


def pretrain(scale: str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The base: Adam on all digits without labels, moved by up to 2 pixels, the rate falling along
    half a cosine from 2e-3."""
    this, parts, draws = arms.sizes_of(scale), images.load(scale), bases.seeded()
    model, steps = empty(scale, draws), PRETRAINING[this]
    filler, x = Filler(model, draws), parts.pool[0]

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(steps):
            rows = torch.randint(len(x), (64 if this == "ci" else 128,), generator=draws)
            yield images.moved(x[rows], 2, draws), rows

    fit(
        filler, None, 5e-3 if this == "ci" else 2e-3, 0, stream(), lambda error, _: error.mean(),
        steps=steps, decay=lambda step, of: arms.warm(step, of) * rates.cosine(step, of),
        train=("network.embed", "network.position", "network.blocks", "network.norm", "unseen",
               "pixels"),
    )  # fmt: skip
    filler.network = bases.restored(model)
    filler.draws = bases.seeded()
    with torch.no_grad():
        reached = torch.cat([filler(part) for part in parts.test[0].split(250)]).mean().item()
    return model, {
        "quantity": "mean square error of hidden patches of test images",
        "reached": reached,
    }


@functools.lru_cache(maxsize=2)
def base(scale: str = "cpu") -> nn.Module:
    """The network that has filled in patches; at ``ci`` trained on the spot."""
    if scale == "ci":
        return pretrain("ci")[0].eval()
    return bases.fill(empty(scale), "images_vit_masked")


def network(scale: str = "cpu") -> Any:
    """A fresh copy of the base."""
    return arms.fresh(base(scale))
