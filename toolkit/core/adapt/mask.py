r"""Which entries of an existing weight may move; all others stay, bit for bit.

The chosen entries are a parameter of their own, so no decay, momentum or clipping reaches the
others, and a file holds (index, value) pairs:

.. math:: W_{ij} = v_k \text{ if } (i, j) \text{ is the k-th chosen entry, else } W_{0,ij}
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from toolkit.core.adapt import sampled
from toolkit.core.adapt.forwards import call_with, frozen
from toolkit.core.adapt.sites import Site, with_padding
from toolkit.core.states.deltas import fingerprint


class MaskLayer(nn.Module):
    """The chosen entries of one weight: ``values`` (k,) that train, ``index`` (k,) where they lie.

    Args:
        site: where; it holds the frozen weight.
        mask: True where an entry of the (m, n) matrix may move.

    Raises:
        ValueError: a mask of another shape, or one that lets nothing move.
    """

    index: Tensor
    may_be_empty: ClassVar[bool] = False

    def __init__(self, site: Site, mask: Tensor):
        super().__init__()
        if site.weight is None or mask.shape != (site.rows, site.cols):
            raise ValueError(
                f"mask of {site.name!r} has shape {tuple(mask.shape)}, the matrix is "
                f"{site.rows} x {site.cols}"
            )
        laid_out = site.to_weight(mask.to(site.device, torch.bool)).reshape(-1)
        index = laid_out.nonzero()[:, 0]
        if not len(index) and not self.may_be_empty:
            raise ValueError(f"mask of {site.name!r} lets no entry move; leave the site out")
        self.site = site
        self.register_buffer("index", index)
        self.values = nn.Parameter(site.weight.reshape(-1)[index].to(site.dtype, copy=True))

    @property
    def size(self) -> int:
        """How many numbers are chosen from."""
        return self.site.rows * self.site.cols

    @property
    def covers(self) -> tuple[str, ...]:
        """Names of the layer's parameters that are chosen from."""
        return (self.site.parameter,)

    def numbers(self, base: nn.Module) -> Tensor:
        """The frozen numbers that are chosen from, (size,)."""
        return frozen(base, self.site.parameter, self.site.name).reshape(-1)

    def laid_out(self, base: nn.Module, numbers: Tensor) -> dict[str, Tensor]:
        """New values of the layer's parameters, from all numbers that are chosen from."""
        name = self.site.parameter
        new = numbers.view(base._parameters[name].shape)
        return {name: with_padding(base, self.site, new)}

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        old = self.numbers(base)
        return self.laid_out(base, old.scatter(0, self.index, self.values.to(old.dtype)))

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if (
            not kwargs
            and not self.seen_whole()
            and sampled.pays(base, self.site, self.values, args)
        ):
            with torch.no_grad():
                new = self.merged(base)[self.site.parameter]
            bias = base._parameters.get("bias")
            return sampled.linear(self.site, args[0], new, bias, self.values, self.index)
        return call_with(base, self.merged(base), self.site.name, args, kwargs)

    def seen_whole(self) -> bool:
        """Whether a backward pass must reach more of the weight than the entries that move."""
        return False

    @torch.no_grad()
    def origin(self, base: nn.Module) -> str:
        """Hash of the numbers of the base in whose place those of this layer stand."""
        return fingerprint(self.numbers(base)[self.places()])

    def places(self) -> Tensor:
        """Where numbers may differ from the base, ascending."""
        return self.index.long().sort().values

    @torch.no_grad()
    def resize(self, state: dict[str, Tensor]) -> None:
        """Take on as many entries as saved tensors have.

        Raises:
            IndexError: an entry lies outside the weight, or is there twice.
        """
        index, size = state.get("index", self.index), self.size
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < size):
            raise IndexError(f"index names entries outside the {size} of the weight")
        if len(index.unique()) != index.numel():
            raise IndexError("index names an entry twice")
        if "values" in state and state["values"].shape != self.values.shape:
            self.values = nn.Parameter(self.values.new_zeros(state["values"].shape))
            self.index = self.index.new_zeros(state["values"].shape)

    @property
    def changed(self) -> int:
        """Numbers of the weight that may differ from the base."""
        return len(self.index)

    def facts(self) -> dict[str, int]:
        """What the report says of this layer."""
        return {"moving": len(self.index)}
