"""Networks whose blocks write to a residual stream, built so that lanes of them train as one."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit.core.nets.models import initialise
from toolkit.core.nets.transformer import Attention, Block, DigitsTransformer, Position


class ResidualBlock(nn.Module):
    """``x + ReLU(linear(norm(x)))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape."""
        return x + F.relu(self.linear(self.norm(x)))


class ResidualMLP(nn.Module):
    """A linear `stem`, residual `blocks`, a `norm` and a linear `head`."""

    def __init__(self, inputs: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (batch, inputs), or images of so many pixels, to scores (batch, classes)."""
        x = self.stem(x.flatten(1))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def residual_mlp(
    inputs: int, width: int, depth: int, classes: int, generator: torch.Generator | None = None
) -> ResidualMLP:
    """A stem, `depth` residual blocks with layer normalisation, and a linear head.

    Args:
        inputs: numbers per example; width: of the stream; depth: blocks; classes: scores.
        generator: draws the weights, as `nets.initialise` does.

    Raises:
        ValueError: a size below 1.
    """
    sizes = (inputs, width, depth, classes)
    if min(sizes) < 1:
        raise ValueError(f"inputs, width, depth, classes: must be at least 1, got {sizes}")
    with torch.device("meta"):  # PyTorch's own draw would move the global generator
        network = ResidualMLP(*sizes)
    return initialise(network.to_empty(device="cpu"), generator)


class PlainAttention(Attention):
    """Attention in two matrix products, which `torch.func.vmap` can batch; it runs the fused kernel
    lane by lane."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same shape."""
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).softmax(-1)
        return self.output((weights @ value).transpose(1, 2).flatten(-2))


class StreamBlock(Block):
    """The block of `toolkit.core.nets.transformer` in its two halves."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__(width, heads, hidden)
        self.attention = PlainAttention(width, heads)

    def attend(self, x: Tensor) -> Tensor:
        """The first half: attention on its residual path."""
        return x + self.attention(self.norm1(x))

    def feed(self, x: Tensor) -> Tensor:
        """The second half: the MLP on its residual path."""
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same shape."""
        return self.feed(self.attend(x))


class StreamTransformer(DigitsTransformer):
    """A transformer for grey images that need not be square; the last layer is `head`."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        classes: int,
        patch: int,
        size: tuple[int, int],
    ) -> None:
        super().__init__(width, 0, heads, classes, patch, patch)
        self.position = Position((size[0] // patch) * (size[1] // patch), width)
        self.blocks = nn.ModuleList(StreamBlock(width, heads, 4 * width) for _ in range(depth))


def stream_transformer(
    width: int = 64,
    depth: int = 4,
    heads: int = 4,
    classes: int = 10,
    patch: int = 7,
    size: tuple[int, int] = (28, 56),
    generator: torch.Generator | None = None,
) -> StreamTransformer:
    """A small pre-LN transformer for grey images (batch, height, width) of any shape.

    Args:
        width: numbers per token; depth: blocks; heads: attention heads.
        classes: number of scores.
        patch: side of a patch; size: height and width of the image, both in pixels.
        generator: draws the weights, as `nets.initialise` does.

    Raises:
        ValueError: a size below 1, heads that do not divide the width, or patches that do not
            tile the image.
    """
    if min(width, depth, heads, classes, patch, *size) < 1 or width % heads:
        raise ValueError(
            f"width={width}, depth={depth}, heads={heads}, patch={patch}: out of range"
        )
    if any(side % patch for side in size):
        raise ValueError(f"patch: patches of {patch} do not tile an image of {size} pixels")
    with torch.device("meta"):
        network = StreamTransformer(width, depth, heads, classes, patch, (size[0], size[1]))
    return initialise(network.to_empty(device="cpu"), generator)
