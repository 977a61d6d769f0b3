"""Sets of pairs of digits with counts of our choice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Set = tuple[Tensor, Tensor]


class DigitPairs:
    """Pairs of glyphs from three pools that share no glyph: ``train``, ``valid``, ``test``.

    Args:
        glyphs: (N, h, w) images.
        labels: (N,) digits.
        digits: only the digits below this one; K is its square.
        noise: standard deviation of the Gaussian noise added to every pixel.
        valid, test: shares of the glyphs in those pools.
        draw: which glyph goes where.

    Raises:
        ValueError: a pool that lacks a digit.
    """

    def __init__(
        self,
        glyphs: Tensor,
        labels: Tensor,
        draw: torch.Generator,
        digits: int = 10,
        noise: float = 0.35,
        valid: float = 0.17,
        test: float = 0.33,
    ):
        keep = torch.randperm(len(labels), generator=draw)
        ends = [round(test * len(keep)), round((test + valid) * len(keep))]
        parts = dict(zip(("test", "valid", "train"), keep.tensor_split(ends), strict=True))
        self.glyphs, self.digits, self.noise = glyphs.float(), digits, noise
        self.classes = digits**2
        self.pools = {
            name: [part[labels[part] == d] for d in range(digits)] for name, part in parts.items()
        }
        for name, pool in self.pools.items():
            if any(len(p) == 0 for p in pool):
                raise ValueError(f"the pool {name} lacks a digit: give more glyphs.")

    def pairs(self, counts: Tensor, pool: str, draw: torch.Generator) -> Set:
        """Inputs (n, h, 2 w) and classes (n,), in the classes' order.

        Args:
            counts: (K,) whole numbers, the pairs of each class; or one number for all.
            pool: ``train``, ``valid`` or ``test``.
            draw: which glyphs, and the noise.
        """
        counts = counts.expand(self.classes)
        y = torch.arange(self.classes).repeat_interleave(counts)
        halves = []
        for digit in (y // self.digits, y % self.digits):
            place = torch.empty_like(y)
            for d, glyphs in enumerate(self.pools[pool]):
                here = (digit == d).nonzero().flatten()
                place[here] = glyphs[torch.randint(len(glyphs), (len(here),), generator=draw)]
            halves.append(self.glyphs[place])
        x = torch.cat(halves, -1)
        return x + self.noise * torch.randn(x.shape, generator=draw), y


def pooled(sets: Sequence[Set]) -> tuple[Tensor, Tensor, Tensor]:
    """Sets of equal size as one: inputs, labels, and the rows (M, n) of each.

    Raises:
        ValueError: sets of different sizes, which lanes cannot walk through in step.
    """
    sizes = {len(y) for _, y in sets}
    if len(sizes) != 1:
        raise ValueError(f"sets have {sorted(sizes)} examples: lanes need sets of equal size.")
    (size,) = sizes
    x, y = (torch.cat([s[i] for s in sets]) for i in (0, 1))
    return x, y, torch.arange(len(y)).view(len(sets), size)
