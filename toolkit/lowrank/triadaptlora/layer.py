"""The blocks of one layer, the square core they make up, and how they grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.lowrank import LowRankLayer
from toolkit.core.adapt.sites import Site, normal
from toolkit.core.adapt.steps.growth import block_generator, draw_seed, given


def positions(widths: Sequence[int]) -> Tensor:
    """Where each number of the blocks lies in the flattened core of shape (r, r).

    Args:
        widths: c_1, ..., c_q, with sum r.

    Returns:
        Indices, first of every L block (c_i, rho_i), then of every U block (rho_i, c_i), each in
        row order. A diagonal block appears twice: as part of L and as part of U.
    """
    r, ends = sum(widths), list(accumulate(widths))
    grid = torch.arange(r * r).view(r, r)
    lower = [grid[e - c : e, :e] for c, e in zip(widths, ends, strict=True)]
    upper = [grid[:e, e - c : e] for c, e in zip(widths, ends, strict=True)]
    return torch.cat([block.reshape(-1) for block in lower + upper])


def assemble(lower: Sequence[Tensor], upper: Sequence[Tensor], where: Tensor) -> Tensor:
    """C = L + U, shape (r, r), from rows (c_i, rho_i) of L and columns (rho_i, c_i) of U.

    One sum into place, because padding block by block costs two small operations for each.
    ``where`` are the :func:`positions` of the blocks' widths.
    """
    if len(lower) == 1:
        return lower[0] + upper[0]
    r = lower[-1].shape[1]
    flat = torch.cat([block.reshape(-1) for block in (*lower, *upper)])
    return flat.new_zeros(r * r).index_add(0, where, flat).view(r, r)


class TriAdaptLoRALayer(LowRankLayer):
    r"""The blocks of one layer, as parameters ``A0``, ``B0``, ``L0``, ``U0``, ``A1``, ...

    With widths c_1, ..., c_q, sums rho_i = c_1 + ... + c_i and r = rho_q:

    - ``A{i}`` (c_i, n) and ``B{i}`` (m, c_i), stacked to A (r, n) and B (m, r);
    - ``L{i}`` (c_i, rho_i): rows of the lower part, diagonal block included;
    - ``U{i}`` (rho_i, c_i): columns of the upper part, diagonal block included.

    So C can be any matrix. Its diagonal blocks are the sum of two trained tensors, and move at
    twice the rate of the others.
    """

    def __init__(self, method: Any, site: Site, generator: torch.Generator | None):
        super().__init__(method, site)
        self.method, self.limit = method, min(site.rows, site.cols)
        self.widths: list[int] = []
        self.register_buffer("seed", draw_seed(generator, site.device))
        self._append(method.init_rank, None)

    @property
    def rank(self) -> int:
        """r, the rank now."""
        return sum(self.widths)

    @property
    def scale(self) -> float:  # type: ignore[override]
        """s, the factor of B C A."""
        m = self.method
        if m.rescale == "constant":
            return 2.0
        return m.alpha / (m.target_rank if m.rescale == "fixed" else self.rank + 1e-5)

    def blocks(self, letter: str) -> list[nn.Parameter]:
        """The blocks of A, B, L or U, in order of birth."""
        return [getattr(self, f"{letter}{i}") for i in range(len(self.widths))]

    def core(self) -> Tensor:
        """C = L + U, shape (r, r)."""
        return assemble(self.blocks("L"), self.blocks("U"), self.where)

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (m, r) and C A (r, n)."""
        A, B = self.blocks("A"), self.blocks("B")
        A, B = (A[0], B[0]) if len(A) == 1 else (torch.cat(A), torch.cat(B, 1))
        return B, self.core() @ A

    def shapes(self, c: int, rho: int) -> dict[str, tuple[int, int]]:
        """Shapes of a block of width c that brings the rank to rho."""
        return {"A": (c, self.site.cols), "B": (self.site.rows, c), "L": (c, rho), "U": (rho, c)}

    @torch.no_grad()
    def grow(
        self, amount: int, draws: Mapping[str, Tensor] | None = None
    ) -> dict[str, nn.Parameter]:
        """Add one block of width ``amount``; with the default start B C A stays what it was.

        ``draws`` are taken instead of the start's own, by letter, of the shapes that :meth:`shapes`
        tells. Returns the four new tensors by name, such as A1, B1, L1, U1.

        Raises:
            ValueError: the rank would pass min(m, n), or a draw has another shape.
        """
        if amount < 1 or self.rank + amount > self.limit:
            raise ValueError(
                f"layer {self.site.name!r} cannot grow by {amount}: its matrix is {self.site.rows} "
                f"x {self.site.cols} and its rank {self.rank}; grow by 1 to "
                f"{self.limit - self.rank}"
            )
        return self._append(amount, draws)

    def _append(self, c: int, draws: Mapping[str, Tensor] | None) -> dict[str, nn.Parameter]:
        i, shapes = len(self.widths), self.shapes(c, self.rank + c)
        blocks = given(self.site.name, self._start(i, shapes), draws)
        like = self.A0 if i else torch.empty(0, dtype=self.site.dtype, device=self.site.device)
        new = {f"{k}{i}": nn.Parameter(blocks[k].to(like, copy=True)) for k in shapes}
        for name, parameter in new.items():
            self.register_parameter(name, parameter)
        self._set_widths([*self.widths, c])
        return new

    def _start(self, i: int, shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
        """Block i as its start says, from a stream of the layer's own seed and i."""
        blocks = {letter: torch.zeros(shape) for letter, shape in shapes.items()}
        if self.method.init == "identity":
            # ones from the block's first corner on, as in the file: off C's diagonal later
            blocks |= {letter: torch.eye(*shapes[letter]) for letter in "LU"}
        later, source = "ABLU" if i else "ALU", block_generator(self.seed, i)
        drawn = {"zero_core": "AB", "identity": "A", "gaussian": later}[self.method.init]
        return blocks | {k: normal(shapes[k], 0.02, self.site, source) for k in drawn}

    def _set_widths(self, widths: list[int]) -> None:
        self.widths = widths
        # no buffer: it follows from the widths, and a wrapped attention layer lists its buffers
        self.where = positions(widths).to(self.A0.device)

    def _apply(self, fn: Any, recurse: bool = True) -> TriAdaptLoRALayer:
        super()._apply(fn, recurse)
        self.where = self.where.to(self.A0.device)
        return self

    @torch.no_grad()
    def resize(self, state: Mapping[str, Tensor]) -> None:
        """Take on the blocks of saved tensors, which are more after growth."""
        widths: list[int] = []
        while (saved := state.get(f"A{len(widths)}")) is not None and saved.dim():
            widths.append(len(saved))
        if not widths or widths == self.widths:
            return
        for name in [name for name in self._parameters if int(name[1:]) >= len(widths)]:
            delattr(self, name)
        for i, (c, rho) in enumerate(zip(widths, accumulate(widths), strict=True)):
            for letter, shape in self.shapes(c, rho).items():
                old = self._parameters.get(f"{letter}{i}")
                if old is None or tuple(old.shape) != shape:
                    fresh = nn.Parameter(self.A0.new_zeros(shape))
                    self.register_parameter(f"{letter}{i}", fresh)
        self._set_widths(widths)

    def facts(self) -> dict[str, int]:
        return {"rank": self.rank, "blocks": len(self.widths)}
