"""Pre-LN transformer blocks, and a small transformer that classifies images of a few pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head self-attention with separate `query`, `key`, `value` and `output` layers;
    with `causal`, a token sees itself and the tokens before it only."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same shape."""
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.output(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """A pre-LN transformer block: attention, then `up`, GELU, `down`, each on a residual path."""

    def __init__(self, width: int, heads: int, hidden: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class DigitsTransformer(nn.Module):
    """A classifier that reads an image as a row of square patches; the last layer is `head`."""

    def __init__(
        self, width: int, depth: int, heads: int, classes: int, patch: int, size: int
    ) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch**2, width)
        self.position = Position((size // patch) ** 2, width)
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, size, size) or (batch, 1, size, size) to scores (batch, classes)."""
        images = images.flatten(0, -3) if images.dim() == 4 else images
        patches = images.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch)
        x = self.position(self.embed(patches.flatten(3).flatten(1, 2)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Position(nn.Module):
    """Adds a learned vector to each token."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, width))

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw the vectors from a normal distribution of standard deviation 0.02."""
        nn.init.normal_(self.weight, std=0.02, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same shape."""
        return x + self.weight
