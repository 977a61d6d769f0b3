"""Adapters round one block: where they read, where they add, with or without a way of their own."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.sites import Site
from toolkit.insert.petl_ast import inner
from toolkit.insert.petl_ast.places import (
    Plan,
    Sublayer,
    acting,
    asked,
    check_places,
    chosen,
    refuse_recomputing,
    sublayers,
)


class AroundBlock(nn.Module):
    """One small network for each place of a block, which acts inside the block's own call.

    Args:
        method: its ``place`` says where.
        site: the block.
        generator: source of the draws.
    """

    def __init__(self, method: Any, site: Site, generator: torch.Generator | None):
        super().__init__()
        self.site, self.method = site, method
        self.at = nn.ModuleDict({p: self.made(method, site, generator) for p in asked(method)})
        self._known: dict[str, Sublayer] = {}

    def made(self, method: Any, site: Site, generator: torch.Generator | None) -> nn.Module:
        """The network of one place."""
        return inner.build(method, site, generator)

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        refuse_recomputing(base, self.site.name)
        if not self._known:
            self._known = sublayers(base)
        with contextlib.ExitStack() as stack:
            for place in self.at:
                self.enter(base, place, stack)
            return base(*args, **kwargs)

    def enter(self, base: nn.Module, place: str, stack: contextlib.ExitStack) -> None:
        """Let one network act during the call that follows."""
        seen: dict[str, Tensor] = {}
        network, order, own = self.at[place], self.method.order, self.method.own

        def read(n: Tensor) -> Tensor | None:
            if order == "sequential_before":
                if "a" not in seen:  # query, key and value read the same
                    seen["a"] = network(n)
                return seen["a"]
            seen["n"] = n
            return None

        def write(y: Tensor) -> Tensor:
            if order == "parallel":
                n = seen.pop("n")
                return y + network(n) + n if own else y + network(n)
            if order == "sequential_before":
                return y + seen.pop("a")
            return y + network(y) if own else network(y)

        stack.enter_context(acting(base, self._known[place], self.site.name, read, write))

    @property
    def changed(self) -> int:
        """Numbers of the base that differ once merged: none, as this cannot be merged."""
        return 0

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        raise TypeError(f"the adapter in block {self.site.name!r} is no change of a weight")


class InBlocks:
    """What adapters and mixtures share: they act on the blocks of a model, all by default."""

    def decided(self, model: nn.Module, targets: Any, batches: Any, loss: Any, train: Any) -> Plan:
        """Where :func:`toolkit.adapt` puts this.

        Raises:
            ValueError: the model has no blocks, targets name none, or one lacks the place.
        """
        blocks = chosen(self, model, targets)
        check_places(self, blocks)
        return Plan({self: [block.name for block in blocks]})
