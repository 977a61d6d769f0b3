r"""Single entries of a layer's weight and bias that move, each by a difference from its start.

.. math:: w_{i_k} = w_{0,i_k} + \delta_k, \qquad \delta = 0 \text{ at the start}

Weight decay on :math:`\delta` draws towards the pre-trained value, not towards 0. The gradient of
:math:`\delta` is that of the whole weight, gathered: one product of the matrix's size, which is
kept by nobody. Summing :math:`G_{t,i_k}X_{t,j_k}` over tokens t instead holds tokens times entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from toolkit.core.adapt.forwards import call_with, frozen
from toolkit.core.adapt.sites import Site
from toolkit.core.declare.fields import Declared
from toolkit.core.declare.info import Info
from toolkit.core.states.deltas import fingerprint

PARAMETERS = ("weight", "bias")


class Entries(nn.Module):
    """Differences of chosen entries: ``weight_delta`` (k,) at ``weight_index`` (k,), and of a bias.

    Args:
        site: the layer.
        chosen: "weight" or "bias" -> entries that move, as places in memory.
    """

    def __init__(self, site: Site, chosen: Mapping[str, Tensor]):
        super().__init__()
        self.site = site
        for name in PARAMETERS:
            index = chosen.get(name, torch.empty(0, dtype=torch.long))
            self.register_buffer(f"{name}_index", index.to(site.device))
            self.register_parameter(f"{name}_delta", self._zeros(len(index)))

    def _zeros(self, count: int) -> nn.Parameter | None:
        new = {"dtype": self.site.dtype, "device": self.site.device}
        return nn.Parameter(torch.zeros(count, **new)) if count else None

    def moving(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Parameter, places and differences, where any entry moves."""
        for name in PARAMETERS:
            delta = getattr(self, f"{name}_delta")
            if delta is not None and len(delta):
                yield name, getattr(self, f"{name}_index"), delta

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        """New values of the parameters in which an entry moves."""
        new = {}
        for name, index, delta in self.moving():
            old = frozen(base, name, self.site.name)
            flat = old.reshape(-1)
            values = (flat[index].to(delta.dtype) + delta).to(old.dtype)
            new[name] = flat.index_put((index,), values).view(old.shape)
        return new

    @torch.no_grad()
    def origin(self, base: nn.Module) -> str:
        """Hash of the numbers of the base that move; "" where none does."""
        found = [
            frozen(base, name, self.site.name).reshape(-1)[index.sort().values]
            for name, index, _ in self.moving()
        ]
        return fingerprint(torch.cat(found)) if found else ""

    @property
    def count(self) -> int:
        """Entries that move."""
        return sum(len(delta) for _, _, delta in self.moving())

    @torch.no_grad()
    def resize(self, state: Mapping[str, Tensor]) -> None:
        """Take on as many entries as saved tensors have.

        Raises:
            IndexError: an entry lies outside its parameter or is there twice, or there are not as
                many differences as entries.
        """
        rows, cols = self.site.rows, self.site.cols
        for name, size in (("weight", rows * cols), ("bias", rows)):
            index = state.get(f"{name}_index", getattr(self, f"{name}_index"))
            if len(index) and not (int(index.min()) >= 0 and int(index.max()) < size):
                raise IndexError(f"{name}_index names entries outside the {size} of the {name}")
            if len(index.unique()) != len(index):
                raise IndexError(f"{name}_index names an entry twice")
            delta = state.get(f"{name}_delta")
            if (0 if delta is None else len(delta)) != len(index):
                raise IndexError(f"{name}_delta does not have one number per entry")
            own = getattr(self, f"{name}_delta")
            if (0 if own is None else len(own)) != len(index) or (own is not None and not len(own)):
                setattr(self, f"{name}_delta", self._zeros(len(index)))
                setattr(self, f"{name}_index", index.new_zeros(len(index)).to(self.site.device))


def own_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of an adapter's saved tensors belongs to its ``entries``."""
    start = "entries."
    return {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}


@dataclass(frozen=True)
class SPTEntries(Declared):
    """The entries that a plan of SPT chose; without a plan, or a file, none moves."""

    info: ClassVar[Info] = Info(
        slug="spt",
        part="select",
        title="SPT entries",
        arxiv="2303.08566",
        year=2023,
        code="ziplab/SPT",
        equation=r"W = W_0 + M\odot\Delta",
        acts_on="the most sensitive entries",
        count="n_W",
        inference="none once merged",
        colour="#B5446E",
        kinds=("linear", "hf_conv1d", "norm"),
    )
    moving: ClassVar[Mapping[str, Mapping[str, Tensor]]] = {}
    """Layer -> parameter -> entries that move; a plan fills it in."""

    def build(self, site: Site, generator: torch.Generator | None = None) -> EntriesLayer:
        return EntriesLayer(site, self.moving.get(site.name, {}))

    def count(self, site: Site) -> int:
        return sum(len(index) for index in self.moving.get(site.name, {}).values())


class EntriesLayer(nn.Module):
    """One layer in which single entries of weight and bias move: ``entries``."""

    def __init__(self, site: Site, chosen: Mapping[str, Tensor]):
        super().__init__()
        self.site = site
        self.entries = Entries(site, chosen)
        if not self.entries.count:  # what a file is compared with before it says which entries
            empty = torch.zeros(0, dtype=site.dtype, device=site.device)
            self.entries.weight_delta = nn.Parameter(empty)

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        return self.entries.merged(base)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        new = self.merged(base)
        return call_with(base, new, self.site.name, args, kwargs) if new else base(*args, **kwargs)

    def resize(self, state: Mapping[str, Tensor]) -> None:
        """Take on as many entries as saved tensors have; see :meth:`Entries.resize`."""
        self.entries.resize(own_part(state))

    def origin(self, base: nn.Module) -> str:
        """Hash of the numbers of the base that move."""
        return self.entries.origin(base)

    @property
    def changed(self) -> int:
        """Numbers of the layer that may differ from the base."""
        return self.entries.count

    def facts(self) -> dict[str, Any]:
        """What the report says of this layer."""
        return {"form": "entries", "moving": self.entries.count}
