"""A small U-Net that removes noise from images, told how much noise there is and of which class."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit.core.nets.models import _build, initialise

GROUPS = 8
"""Groups of channels that are normalised together."""


class Norm(nn.GroupNorm):
    """Group normalisation that starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels)

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Scale 1 and shift 0."""
        self.reset_parameters()


class Waves(nn.Module):
    """Cosines and sines of a number, at frequencies that grow geometrically."""

    frequencies: Tensor

    def __init__(self, features: int, low: float = 0.125, high: float = 8.0) -> None:
        super().__init__()
        steps = torch.linspace(math.log(low), math.log(high), features // 2).exp()
        self.register_buffer("frequencies", 2 * math.pi * steps, persistent=False)

    def forward(self, numbers: Tensor) -> Tensor:
        """(batch,) to (batch, features)."""
        angles = numbers[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], 1)


class ConditionedBlock(nn.Module):
    """Two 3 x 3 convolutions beside a skip; a code scales and shifts what lies between them."""

    def __init__(self, inside: int, outside: int, code: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(inside), Norm(outside)
        self.first = nn.Conv2d(inside, outside, 3, padding=1)
        self.second = nn.Conv2d(outside, outside, 3, padding=1)
        self.code = nn.Linear(code, 2 * outside)
        self.skip = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """Images (batch, inside, h, w) and codes (batch, code) to (batch, outside, h, w)."""
        scale, shift = self.code(code)[:, :, None, None].chunk(2, 1)
        h = self.norm2(self.first(F.silu(self.norm1(x))))
        return self.skip(x) + self.second(F.silu(h * (1 + scale) + shift))


class PixelAttention(nn.Module):
    """Every pixel looks at every other, beside a skip."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = Norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.output = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) to the same shape."""
        rows = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3 * self.heads, -1)).mT
        query, key, value = rows.chunk(3, 1)
        mixed = F.scaled_dot_product_attention(query, key, value).mT
        return x + self.output(mixed.flatten(1, 2).view_as(x))


class UNet(nn.Module):
    """Blocks of 2 x 2 pixels become channels; two resolutions; the way back sees the way there.

    It takes images of any size whose sides are multiples of 4, such as 28 x 28 and 8 x 8.
    """

    def __init__(
        self, channels: int, widths: Sequence[int], classes: int, code: int, heads: int
    ) -> None:
        super().__init__()
        wide, deep = widths
        self.channels, self.classes = channels, classes
        self.noise = nn.Sequential(Waves(32), nn.Linear(32, code), nn.SiLU(), nn.Linear(code, code))
        self.label = Labels(classes + 1, code) if classes else None
        self.fold, self.unfold = nn.PixelUnshuffle(2), nn.PixelShuffle(2)
        self.stem = nn.Conv2d(4 * channels, wide, 3, padding=1)
        self.down = nn.ModuleList(ConditionedBlock(wide, wide, code) for _ in range(2))
        self.shrink = nn.Conv2d(wide, deep, 2, stride=2)
        self.middle = nn.ModuleList(ConditionedBlock(deep, deep, code) for _ in range(3))
        self.attention = PixelAttention(deep, heads) if heads else nn.Identity()
        self.grow = nn.Conv2d(deep, 4 * wide, 1)
        self.up = nn.ModuleList(ConditionedBlock(2 * wide, wide, code) for _ in range(2))
        self.norm = Norm(wide)
        self.head = nn.Conv2d(wide, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (batch, channels, h, w), noise levels (batch,) and labels (batch,) to such images.

        The label ``classes`` means that the class is not told; so does no labels at all.
        """
        code = self.noise(noise)
        if self.label is not None:
            if labels is None:
                labels = torch.full((len(x),), self.classes, device=x.device)
            code = code + self.label(labels)
        code = F.silu(code)
        h = self.stem(self.fold(x))
        there = []
        for block in self.down:
            h = block(h, code)
            there.append(h)
        h = self.shrink(h)
        for number, block in enumerate(self.middle):
            h = block(h, code)
            if number == 0:
                h = self.attention(h)
        h = self.unfold(self.grow(h))
        for block in self.up:
            h = block(torch.cat([h, there.pop()], 1), code)
        return self.unfold(self.head(F.silu(self.norm(h))))


class Labels(nn.Embedding):
    """One learned vector per class, and one for no class."""

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw the vectors from a standard normal distribution."""
        nn.init.normal_(self.weight, generator=generator)


def unet(
    channels: int = 1,
    widths: Sequence[int] = (48, 96),
    classes: int = 0,
    code: int = 128,
    heads: int = 4,
    generator: torch.Generator | None = None,
) -> UNet:
    """A small U-Net for images whose sides are multiples of 4.

    What blocks add to their skips, and the output, are zero at the start.

    Args:
        channels: of the images.
        widths: channels at half and at a quarter of the side, multiples of 8.
        classes: how many; 0 for images without labels.
        code: width of what tells noise and class to the blocks.
        heads: of the attention at the lower resolution; 0 leaves it out, and the network then
            sees pixels near each other only.
        generator: draws the weights, as `nets.initialise` does.

    Raises:
        ValueError: a size below 1, or widths that are not two multiples of 8, or that the heads
            do not divide.
    """
    if min(channels, code) < 1 or min(classes, heads) < 0:
        sizes = f"{channels}, {code}, {classes}, {heads}"
        raise ValueError(f"channels, code, classes, heads: no such sizes as {sizes}")
    if len(widths) != 2 or any(w < 1 or w % GROUPS for w in widths):
        raise ValueError(f"widths: two multiples of {GROUPS}, got {tuple(widths)}")
    if heads and widths[1] % heads:
        raise ValueError(f"heads: {heads} does not divide the width {widths[1]}")
    return _build(
        lambda: UNet(channels, widths, classes, code, heads), generator, None, None, _draw
    )


def _draw(network: nn.Module, generator: torch.Generator | None) -> nn.Module:
    initialise(network, generator)
    for part in network.modules():
        for last in ("second", "output", "head"):
            if hasattr(part, last):
                nn.init.zeros_(getattr(part, last).weight)
                nn.init.zeros_(getattr(part, last).bias)
    return network
