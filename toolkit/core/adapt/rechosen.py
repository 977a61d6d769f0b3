r"""A mask whose choice is made again during training.

Entries that leave the choice keep the value they have and stay still; entries that come back, or
come for the first time, go on from the value that the weight has:

.. math:: W_{ij} = v_k \text{ if chosen now}, \quad h_l \text{ if it was chosen before}, \quad
    W_{0,ij} \text{ else}
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from toolkit.core.adapt.forwards import frozen
from toolkit.core.adapt.mask import MaskLayer
from toolkit.core.adapt.sites import Site


class RechosenLayer(MaskLayer):
    """Entries of one weight that move now, and those that moved before.

    ``values`` (k,) train and lie at ``index`` (k,), ascending; ``held`` (h,) stay still and lie at
    ``left`` (h,). Places count through the weight in the layer's own layout, in 32 bits where that
    is enough. Both may be empty.

    Args:
        site: where; it holds the frozen weight.
        mask: True where an entry of the (m, n) matrix may move at the start.
    """

    left: Tensor
    held: Tensor
    may_be_empty: ClassVar[bool] = True

    def __init__(self, site: Site, mask: Tensor):
        super().__init__(site, mask)
        narrow = site.rows * site.cols < 2**31
        self.index = self.index.to(torch.int32 if narrow else torch.int64)
        self.register_buffer("left", self.index[:0].clone())
        self.register_buffer("held", self.values.detach()[:0].clone())

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        old, index, values = self.numbers(base), self.index.long(), self.values
        if len(self.left):
            index = torch.cat([self.left.long(), index])
            values = torch.cat([self.held, values])
        return self.laid_out(base, old.scatter(0, index, values.to(old.dtype)))

    def in_weight(self) -> int:
        """How many of the entries that move lie in the weight; they come first."""
        return len(self.index)

    def places(self) -> Tensor:
        return torch.cat([self.index.long(), self.left.long()]).sort().values

    @torch.no_grad()
    def choose(self, index: Tensor, base: nn.Module) -> Tensor:
        """Let other entries move from now on; ``values`` becomes a new parameter.

        Args:
            index: (k',) places, each once.
            base: the frozen layer, for entries that never moved.

        Returns:
            (k',) for each entry its place among those that moved until now, or -1, in ascending
            order of ``index``.

        Raises:
            ValueError: places outside the weight, or one named twice.
        """
        index = index.to(self.index.device, torch.int64).sort().values
        self._refuse(index)
        moving, still = self.index.long(), self.left.long()
        old = self.numbers(base)
        known = torch.cat([moving, still])
        worth = torch.cat([self.values.detach(), self.held])
        order = known.argsort()
        at = place(known[order], index)
        values = old[index].to(worth.dtype)
        values[at >= 0] = worth[order][at[at >= 0]]
        gone = place(index, known) < 0
        left, rows = known[gone].sort()
        self.left, self.held = left.to(self.index.dtype), worth[gone][rows]
        came = place(moving, index)
        self.index = index.to(self.index.dtype)
        self.values = nn.Parameter(values)
        return came

    def _refuse(self, index: Tensor) -> None:
        if index.numel() and not (int(index[0]) >= 0 and int(index[-1]) < self.size):
            raise ValueError(f"{self.site.name!r}: a choice outside its {self.size} entries")
        if bool((index[1:] == index[:-1]).any()):
            raise ValueError(f"{self.site.name!r}: a choice names an entry twice")

    @torch.no_grad()
    def resize(self, state: dict[str, Tensor]) -> None:
        super().resize(state)
        left = state.get("left", self.left)
        both = torch.cat([state.get("index", self.index).to(left.device), left])
        if left.numel() and not (int(left.min()) >= 0 and int(left.max()) < self.size):
            raise IndexError(f"left names entries outside the {self.size} of the weight")
        if len(both.unique()) != both.numel():
            raise IndexError("index and left name an entry twice")
        if left.shape != self.left.shape:
            self.left = self.left.new_zeros(left.shape)
            self.held = self.held.new_zeros(left.shape)

    @property
    def changed(self) -> int:
        """Numbers of the weight that may differ from the base: those that move or ever moved."""
        return len(self.index) + len(self.left)

    def facts(self) -> dict[str, Any]:
        return {"moving": len(self.index), "held": len(self.left)}


class BiasedLayer(RechosenLayer):
    """Entries of one weight and of the bias beside it, whose places follow the weight's.

    Args:
        site: where; it holds the frozen weight and its bias.
        mask: True where an entry of the (m, n) matrix may move at the start.
        bias: the same of the (m,) bias.
    """

    def __init__(self, site: Site, mask: Tensor, bias: Tensor):
        super().__init__(site, mask)
        assert site.bias is not None
        beside = bias.nonzero()[:, 0]
        index = torch.cat([self.index.long(), beside + site.rows * site.cols])
        self.index = index.to(torch.int32 if self.size < 2**31 else torch.int64)
        self.left = self.index[:0].clone()
        moving = site.bias[beside].to(site.dtype)
        self.values = nn.Parameter(torch.cat([self.values.detach(), moving]))

    @property
    def size(self) -> int:
        return self.site.rows * self.site.cols + self.site.rows

    @property
    def covers(self) -> tuple[str, ...]:
        return self.site.parameter, self.site.bias_parameter

    def numbers(self, base: nn.Module) -> Tensor:
        bias = frozen(base, self.site.bias_parameter, self.site.name)
        return torch.cat([super().numbers(base), bias])

    def laid_out(self, base: nn.Module, numbers: Tensor) -> dict[str, Tensor]:
        weight, bias = numbers.split([self.size - self.site.rows, self.site.rows])
        return {**super().laid_out(base, weight), self.site.bias_parameter: bias}

    def in_weight(self) -> int:
        return int((self.index < self.site.rows * self.site.cols).sum())

    def seen_whole(self) -> bool:
        return True


def place(known: Tensor, wanted: Tensor) -> Tensor:
    """Where each wanted number stands in an ascending list, or -1 where it does not."""
    if not len(known):
        return torch.full_like(wanted, -1)
    at = torch.searchsorted(known, wanted).clamp_(max=len(known) - 1)
    return torch.where(known[at] == wanted, at, -1)
