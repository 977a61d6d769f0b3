"""Prompts whose trained numbers are one flat vector, and the universal frame, the simplest."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Flat(nn.Module):
    """A module that is read, written and computed as a vector phi (P,).

    A kind of prompt offers ``features`` (length of what it reads, 0 for nothing), ``size``,
    ``channels``, and :meth:`prompts`.
    """

    features: int
    size: int
    channels: int

    @property
    def count(self) -> int:
        """P, how many numbers train."""
        return sum(part.numel() for part in self.parameters())

    def vector(self) -> Tensor:
        """phi (P,): all parameters in order, copied."""
        return torch.cat([part.detach().flatten() for part in self.parameters()])

    @torch.no_grad()
    def put(self, phi: Tensor) -> None:
        """Write phi (P,) into the parameters.

        Raises:
            ValueError: it is of another length.
        """
        if phi.shape != (self.count,):
            raise ValueError(f"phi: {self.count} numbers, got shape {tuple(phi.shape)}")
        for part, piece in zip(self.parameters(), self.split(phi[None]), strict=True):
            part.copy_(piece[0])

    def split(self, rows: Tensor) -> Iterator[Tensor]:
        """The parameters of rows (R, P), each (R, ...), in order; views where it can be."""
        shapes = [part.shape for part in self.parameters()]
        pieces = rows.split([shape.numel() for shape in shapes], 1)
        yield from (p.unflatten(1, shape) for p, shape in zip(pieces, shapes, strict=True))

    def prompts(self, rows: Tensor, z: Tensor, own: Tensor | None = None) -> Tensor:
        """Prompts of rows (R, P) for features (N, features); broadcasts to (R, N, C, H, W)."""
        raise NotImplementedError


class Frame(Flat):
    """One frame of pixels for every image, as in visual prompting: nothing of the image is read.

    Args:
        size: pixels along a side.
        width: of the frame; 30 at 224 pixels and 3 channels is 69,840 numbers.
        channels: of the images.

    Raises:
        ValueError: the frame is wider than half the image.
    """

    def __init__(self, size: int = 224, width: int = 30, channels: int = 3) -> None:
        super().__init__()
        if not 1 <= width <= size // 2:
            raise ValueError(f"width: 1 to {size // 2} pixels of {size}, got {width}")
        self.features, self.size, self.channels = 0, size, channels
        inside = torch.zeros(size, size, dtype=torch.bool)
        inside[width : size - width, width : size - width] = True
        self.place = (~inside).flatten().nonzero()[:, 0]
        self.pixels = nn.Parameter(torch.zeros(channels, int((~inside).sum())))

    def forward(self, z: Tensor) -> Tensor:
        """The frame (1, channels, size, size), whatever the features."""
        return self.prompts(self.pixels.flatten()[None], z)[0]

    def prompts(self, rows: Tensor, z: Tensor, own: Tensor | None = None) -> Tensor:
        """Frames (R, 1, channels, size, size) of rows (R, P)."""
        whole = rows.new_zeros(len(rows), self.channels, self.size**2)
        place = self.place.to(rows.device)
        whole = whole.index_copy(2, place, rows.view(len(rows), self.channels, -1))
        return whole.view(len(rows), 1, self.channels, self.size, self.size)
