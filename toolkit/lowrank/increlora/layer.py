"""The components of one layer, those in reserve included, and how they grow."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.lowrank import LowRankLayer
from toolkit.core.adapt.sites import Site, normal
from toolkit.core.adapt.steps.growth import block_generator, draw_seed, given
from toolkit.lowrank.increlora.score import Scratch, increment_score, size


class IncreLoRALayer(LowRankLayer):
    """The components of one layer, in blocks: ``A0`` (r0, n), ``B0`` (m, r0), ``E0`` (r0, 1), ...

    ``A1``, ``B1``, ... are the blocks that growth added, the last of them in reserve; ``E1``, ...
    the lambdas it released. ``reserve`` (c, 1) holds the frozen lambdas, ``seed`` (1,) the source
    of later draws. While ``listening`` each backward pass adds to ``score``, a scalar, or None when
    nothing was scored since the last step. ``limit`` is the largest rank growth may reach.
    """

    reserve: Tensor
    seed: Tensor

    def __init__(self, method: Any, site: Site, generator: torch.Generator | None):
        super().__init__(method, site)
        self.method, self.limit = method, min(site.rows, site.cols)
        self.listening, self.score, self.score_dtype = False, None, None
        self.scratch = Scratch()
        self.width = self.released = self.counted = 0
        A = normal((method.rank, site.cols), 0.02, site, generator)
        self._add(A, normal((site.rows, method.rank), 0.02, site, generator), trains=True)
        self._release(A.new_zeros(method.rank, 1))
        self.register_buffer("reserve", A.new_zeros(0, 1))
        self.register_buffer("seed", draw_seed(generator, site.device))
        self._refill(self._next(0, None))

    @property
    def rank(self) -> int:
        return self.counted

    @property
    def scale(self) -> float:  # type: ignore[override]
        return self.method.scale(self.counted)

    def blocks(self) -> tuple[list[Tensor], list[Tensor]]:
        """All B (m, w) and all A (w, n), the reserve's included."""
        Bs = [getattr(self, f"B{i}") for i in range(self.width)]
        return Bs, [getattr(self, f"A{i}") for i in range(self.width)]

    def lambdas(self) -> Tensor:
        """(r + c, 1) lambdas, the frozen ones last."""
        return torch.cat([*(getattr(self, f"E{i}") for i in range(self.released)), self.reserve])

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (m, r + c) and diag(lambda) A (r + c, n)."""
        Bs, As = self.blocks()
        return torch.cat(Bs, 1), self.lambdas() * torch.cat(As)

    def _add(self, A: Tensor, B: Tensor, trains: bool) -> dict[str, Any]:
        new = {f"A{self.width}": A, f"B{self.width}": B}
        for key, value in new.items():
            new[key] = nn.Parameter(value) if trains else value
            (self.register_parameter if trains else self.register_buffer)(key, new[key])
        self.width += 1
        return new if trains else {}

    def _release(self, values: Tensor) -> dict[str, nn.Parameter]:
        name, E = f"E{self.released}", nn.Parameter(values)
        self.register_parameter(name, E)
        self.released, self.counted = self.released + 1, self.counted + len(values)
        return {name: E}

    def _next(self, amount: int, draws: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """What brings the reserve to its width again once ``amount`` of it are released."""
        site, after = self.site, self.rank + amount
        wide = min(self.method.growth, self.limit - after) - (len(self.reserve) - amount)
        if wide < 1:
            return {}
        shapes = {"A": (wide, site.cols), "B": (site.rows, wide)}
        source = block_generator(self.seed, self.width)
        own = {k: normal(shape, 0.02, site, source) for k, shape in shapes.items()}
        return given(site.name, own, draws)

    def _refill(self, new: dict[str, Tensor]) -> dict[str, nn.Parameter]:
        """Append a block to the reserve; returns the tensors that train from now on."""
        if not new:
            return {}
        # copied where it is: the model may have moved since it was adapted
        A, B = (new[key].to(self.A0, copy=True) for key in "AB")
        frozen = self.method.reserve if self.method.advance else 0.0
        self.reserve = torch.cat([self.reserve, self.reserve.new_full((len(A), 1), frozen)])
        return self._add(A, B, self.method.advance)

    @torch.no_grad()
    def grow(
        self, amount: int, draws: Mapping[str, Tensor] | None = None
    ) -> dict[str, nn.Parameter]:
        """Release the lambdas of ``amount`` reserves and append new ones.

        ``draws``: ``A`` (c, n) and ``B`` (m, c) of the new reserve, instead of its own draw.
        Returns the tensors that train from now on.
        """
        new, born = self._next(amount, draws), {}
        # without advance learning the vectors of the reserve begin to train only now
        for key in [key for key in self._buffers if key[0] in "AB"]:
            born[key] = nn.Parameter(self._buffers.pop(key))
            self.register_parameter(key, born[key])
        born |= self._release(self.reserve[:amount].clone())
        self.reserve = self.reserve[amount:].clone()
        return born | self._refill(new)

    def retire(self) -> None:
        """The target is reached: reserves no longer act on the output."""
        self.reserve = torch.zeros_like(self.reserve)

    def passed(self, base: nn.Module, x: Tensor, y: Tensor) -> None:
        if self._listens(y):
            self._hear(y, x.detach(), base)

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        values = super().merged(base)
        (weight,) = values.values()
        if self._listens(weight):
            self._hear(weight, None, base)  # gradients of W and of its change are the same
        return values

    def _listens(self, y: Tensor) -> bool:
        wanted = self.listening and self.training and y.requires_grad and torch.is_grad_enabled()
        return wanted and not torch._C._are_functorch_transforms_active()

    # Hooks write to this module, which a compiled graph cannot do: it breaks here instead.
    @torch.compiler.disable
    def _hear(self, y: Tensor, x: Tensor | None, base: nn.Module) -> None:
        left, right = (t.detach() for t in self.factors())
        left, site, how = self.scale * left, self.site, (self.score_dtype, self.scratch)
        scale = size(site, self.method.like)

        def hook(g: Tensor | None) -> None:
            if g is not None:
                now = increment_score(base, site, left, right, x, g.detach(), *how) / scale
                self.score = now if self.score is None else self.score + now

        y.register_hook(hook)

    @torch.no_grad()
    def compact(self) -> None:
        """Keep one block of the components that count and drop the reserve; for after training."""
        (Bs, As), r = self.blocks(), self.rank
        block = torch.cat(As)[:r].clone(), torch.cat(Bs, 1)[:, :r].contiguous()
        self._rebuild([block], [self.lambdas()[:r].clone()], self.reserve[:0].clone())

    def resize(self, state: Mapping[str, Tensor]) -> None:
        """Take on the blocks of saved tensors; what makes no sense is left to the loader."""
        site, kept = self.site, state.get("reserve")
        As, Bs, Es = (
            [state[f"{letter}{i}"] for i in range(len(state)) if f"{letter}{i}" in state]
            for letter in "ABE"
        )
        widths, ranks = [len(A) for A in As], [len(E) for E in Es]
        fits = (
            [A.shape for A in As] == [(w, site.cols) for w in widths]
            and [B.shape for B in Bs] == [(site.rows, w) for w in widths]
            and [E.shape for E in Es] == [(r, 1) for r in ranks]
            and (kept is not None and kept.shape == (sum(widths) - sum(ranks), 1))
        )
        if fits and ranks:
            As, Bs, Es = ([t.to(self.A0, copy=True) for t in found] for found in (As, Bs, Es))
            self._rebuild([*zip(As, Bs, strict=True)], Es, kept.to(self.A0, copy=True))

    def _rebuild(self, blocks: list[tuple], lambdas: list[Tensor], reserve: Tensor) -> None:
        old = dict(self._parameters)
        for key in [k for k in self._parameters | self._buffers if k[0] in "ABE"]:
            delattr(self, key)
        self.width = self.released = self.counted = 0
        self.reserve = reserve
        count, start = sum(len(E) for E in lambdas), 0
        for block, E in zip_longest(blocks, lambdas):
            if block is not None:
                A, B = block
                self._add(A, B, self.method.advance or start < count)
                start += len(A)
            if E is not None:
                self._release(E)
        for key, tensor in self._parameters.items():  # an optimizer may hold those that stay
            if key in old and old[key].shape == tensor.shape:
                old[key].data.copy_(tensor.data)
                self._parameters[key] = old[key]

    def facts(self) -> dict[str, int]:
        return {"rank": self.rank}

    def __getstate__(self) -> dict[str, Any]:
        # copies start without a controller, so nothing would read their scores
        return self.__dict__ | {"listening": False, "score": None, "scratch": Scratch()}
