"""The two networks of the beds that :mod:`toolkit.core.nets` has not: characters and sounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.nets import initialise
from toolkit.core.nets.transformer import Block, Position


class Table(nn.Embedding):
    """One learned vector per symbol."""

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw the vectors from a normal distribution of standard deviation 0.02."""
        nn.init.normal_(self.weight, std=0.02, generator=generator)


class Characters(nn.Module):
    """Scores of the next character at every place of a text; the last layer is `head`."""

    def __init__(self, symbols: int, width: int, depth: int, heads: int, context: int) -> None:
        super().__init__()
        self.table = Table(symbols, width)
        self.position = Position(context, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, 4 * width, causal=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols)

    def forward(self, text: Tensor) -> Tensor:
        """Symbol numbers (batch, context) to scores (batch, context, symbols)."""
        x = self.position(self.table(text))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Sounds(nn.Module):
    """Scores of classes for a sound given as frames; the last layer is `head`.

    ``join`` frames in a row make one token.
    """

    def __init__(
        self, bands: int, frames: int, join: int, width: int, depth: int, heads: int, classes: int
    ) -> None:
        super().__init__()
        self.join = join
        self.embed = nn.Linear(join * bands, width)
        self.position = Position(frames // join, width)
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, frames: Tensor) -> Tensor:
        """Frames (batch, frames, bands) to scores (batch, classes)."""
        x = self.position(self.embed(frames.unflatten(1, (-1, self.join)).flatten(2)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def build(make: Callable[[], nn.Module], generator: torch.Generator) -> Any:
    """A network with weights drawn from a generator alone, as in :mod:`toolkit.core.nets`."""
    with torch.device("meta"):
        model = make()
    return initialise(model.to_empty(device="cpu"), generator)
