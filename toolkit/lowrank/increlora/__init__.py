r"""IncreLoRA: start every layer at rank 1 and add ranks where the loss asks for them.

Differences have the form of a singular value decomposition, and each layer keeps a few *reserve*
components whose :math:`\lambda` is frozen near 0, so that their vectors train before they count:

.. math:: W_k = W_k^{(0)} + s\Big(\sum_{i\le r_k} \lambda_{k,i}\, b_{k,i} a_{k,i}
    + \sum_{\text{reserve}} \lambda_s\, b_{k,j} a_{k,j}\Big)

Source: Zhang et al., *IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient
Fine-tuning*, arXiv 2308.12043; official code ``FeiyuZhang98/IncreLoRA``. Where they differ, the
code is followed: the score is a sum over :math:`\sqrt{mn}` (``normalise="mean"`` gives the paper's
mean) and the penalty is the mean of unsquared norms (``squared=True``), taken over the concatenated
factors as in its trainer (``block_orthogonality=True`` gives its library helper, block by block).

Different from the code by default, each with an option or a reason:

* :math:`s` is :math:`\alpha / (\bar r + 10^{-5})` with the *target* average rank :math:`\bar r`, so
  that growing keeps the function. The code divides by :math:`r_k`, which shrinks the whole
  difference of a layer at the moment it grows (``rescale=True``).
* the budget is met exactly; the code may pass it and then never stops scoring
  (``overshoot=True``, which stops all the same).
* under gradient accumulation the scores of the micro-batches add up; the code keeps the last.
* reserves exist from the start and not from the first optimizer step on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from toolkit.core.adapt import lowrank as factored
from toolkit.core.adapt.lowrank import warn_above
from toolkit.core.adapt.model import Adapted
from toolkit.core.adapt.sites import KINDS, Site, normal
from toolkit.core.adapt.steps.growth import block_generator, draw_seed
from toolkit.core.declare.fields import (
    Alpha,
    BelowOne,
    Declared,
    Interval,
    Range,
    Rank,
    Share,
    Smoothing,
    Steps,
    TotalRank,
    Weight,
)
from toolkit.core.declare.info import Info
from toolkit.lowrank.increlora.increment import IncrementController, increment_score, size_factor


@dataclass(frozen=True)
class IncreLoRA(Declared):
    r"""IncreLoRA's hyperparameters; builds the components of one layer.

    In a run of T steps every step t > ``warmup`` divisible by ``interval`` lets the ``top``
    highest-scoring layers grow by ``growth``, until the total is ``target_rank`` times the number
    of layers, or ``total_rank``. Call ``adapted.attach(optimizer, total_steps=T)`` before a
    scheduler is built: attach reserves the parameter groups that growth will fill. With ``restart``
    their learning rate warms up anew and then falls linearly to 0 at T, which suits a schedule that
    also falls linearly; with another one use ``restart=False``.

    The score needs the model in training mode. It is exact, also for layers that a step calls more
    than once in the sense that the scores of the calls add up; with ``dropout`` it is taken at the
    input without dropout.

    Args:
        rank: initial rank of every layer. Source: paper and official scripts: 1.
        target_rank: average rank per layer at the end; also the divisor of the fixed scale. Source:
            paper and official scripts 2 or 8.
        total_rank: final rank of all layers together; overrides target_rank as the budget. Source:
            official code, target_total_rank.
        top: layers h that grow at a time. Source: official scripts 2 to 22 by task.
        growth: ranks c a layer gets at a time, and width of its reserve. Source: official code 1,
            2, 3, 4 for an average target of 2, 4, 6, 8.
        interval: steps nu between two growths. Source: official scripts 100 for small tasks, 500 to
            1000 for large ones.
        warmup: steps before the first growth. Source: paper: as many as interval.
        window: score only in so many steps up to a growth; None scores every step while growing.
            Source: ours: a score costs a third of a step, and the averages forget within 30 steps.
        beta1: smoothing of the importance. Source: paper and official scripts.
        beta2: smoothing of its uncertainty. Source: paper and official scripts.
        orthogonality: weight gamma of the orthogonality penalty. Source: official scripts 0.1, for
            two tasks 0.3.
        squared: penalty as in the paper: squared norms, summed. Source: paper; the code does not
            square.
        block_orthogonality: penalty on each block alone, which never makes blocks orthogonal to
            each other. Source: official library helper; its trainer concatenates.
        advance: advance learning: reserves train before they count. Source: paper; official
            advance_learn.
        reserve: frozen lambda of the reserves under advance learning, else 0. Source: paper and
            official code.
        alpha: numerator of the scale. Source: official scripts 16 or 32.
        rescale: divide by the layer's own rank, which rescales it at each growth. Source: official
            code; the default divides by target_rank.
        dropout: dropout on the input of the branch. Source: official code.
        normalise: what a layer's summed score is divided by: sqrt(mn) or mn. Source: official code
            sqrt, paper mean.
        restart: new tensors warm up anew; else they have the learning rate of the others. Source:
            paper; official multi_lr.
        restart_warmup: steps of that warm-up. Source: official code: as many as the run's own warm-
            up.
        overshoot: let ties and growth > 1 pass the budget. Source: official code; the default meets
            it exactly.

    Raises:
        TypeError, ValueError: a hyperparameter of the wrong type or outside its range.
    """

    rank: Rank = 1
    target_rank: Annotated[int, Range(1, 256)] = 2
    total_rank: TotalRank | None = None
    top: Annotated[int, Range(1, 10000)] = 4
    growth: Annotated[int, Range(1, 64)] = 1
    interval: Interval = 100
    warmup: Steps = 100
    window: Annotated[int, Range(1, 1000000)] | None = None
    beta1: Smoothing = 0.85
    beta2: Smoothing = 0.85
    orthogonality: Weight = 0.1
    squared: bool = False
    block_orthogonality: bool = False
    advance: bool = True
    reserve: Share = 1e-05
    alpha: Alpha = 16.0
    rescale: bool = False
    dropout: BelowOne = 0.0
    normalise: Literal["sqrt", "mean"] = "sqrt"
    restart: bool = True
    restart_warmup: Steps = 100
    overshoot: bool = False

    info: ClassVar[Info] = Info(
        slug="increlora",
        part="lowrank",
        title="IncreLoRA",
        arxiv="2308.12043",
        year=2023,
        code="FeiyuZhang98/IncreLoRA",
        equation=r"W = W_0 + \frac{\alpha}{\bar r}\,B\,\mathrm{diag}(\lambda)\,A,"
        r"\quad r_k(t)\ \text{grows}",
        acts_on="a low-rank difference whose rank grows where it is needed",
        count=r"r_0\,(m+n+1) + c\,(m+n)\ \text{at the start}",
        inference="none once merged",
        colour="#009E73",
        kinds=KINDS,
        init_tolerance=1e-6,
        init_reason="the reserve components act with lambda 1e-5, so that their vectors can train",
    )
    tiny: ClassVar[dict[str, Any]] = {
        "rank": 1,
        "target_rank": 2,
        "top": 1,
        "interval": 2,
        "warmup": 0,
        "restart_warmup": 2,
    }

    def scale(self, rank: int) -> float:
        """s of a layer of that rank."""
        return self.alpha / ((rank if self.rescale else self.target_rank) + 1e-5)

    def build(self, site: Site, generator: torch.Generator | None = None) -> IncreLoRALayer:
        warn_above(self.rank, site)
        return IncreLoRALayer(self, site, generator)

    def count(self, site: Site) -> int:
        """r0 (m + n + 1) + c (m + n) numbers at the start, for a layer of shape (m, n).

        The reserve counts only under advance learning, and is narrower where r0 + c would pass
        min(m, n).
        """
        spare = min(self.growth, min(site.rows, site.cols) - self.rank) if self.advance else 0
        return (self.rank + spare) * (site.rows + site.cols) + self.rank

    def controller(
        self, adapted: Adapted, optimizer: torch.optim.Optimizer, total_steps: int | None, **options
    ) -> IncrementController:
        return IncrementController(self, adapted.adapters, optimizer, total_steps, **options)


class IncreLoRALayer(nn.Module):
    """The components of one layer, in blocks: ``A0`` (r0, n), ``B0`` (m, r0), ``E0`` (r0, 1), ...

    ``A1``, ``B1``, ... are the blocks that growth added, the last of them in reserve; ``E1``, ...
    the lambdas it released. ``reserve`` (c, 1) holds the frozen lambdas, ``seed`` (1,) the source
    of later draws.

    Attributes: ``rank`` (components that count), ``limit`` (the largest rank), ``listening``
    (whether a backward pass adds to ``score``), ``score`` (a scalar, or None when nothing was
    scored since the last step).
    """

    def __init__(self, method: IncreLoRA, site: Site, generator: torch.Generator | None):
        super().__init__()
        self.method, self.site, self.dropout = method, site, method.dropout
        self.limit = min(site.rows, site.cols)
        self.frozen = method.reserve if method.advance else 0.0
        self.width = self.released = 0
        self.listening, self.score = False, None
        r = method.rank
        A, B = (
            normal((r, site.cols), 0.02, site, generator),
            normal((site.rows, r), 0.02, site, generator),
        )
        self._add_block(A, B, True)
        self.rank = 0
        self._release(torch.zeros(r, 1, dtype=site.dtype, device=site.device))
        self.register_buffer("reserve", A.new_zeros(0, 1))
        self.register_buffer("seed", draw_seed(generator, site.device))
        self._refill(None)

    # -- blocks -----------------------------------------------------------------------------------

    def _add_block(self, A: Tensor, B: Tensor, trains: bool) -> None:
        for key, value in ((f"A{self.width}", A), (f"B{self.width}", B)):
            if trains:
                self.register_parameter(key, nn.Parameter(value))
            else:
                self.register_buffer(key, value)
        self.width += 1

    def _release(self, values: Tensor) -> nn.Parameter:
        E = nn.Parameter(values)
        self.register_parameter(f"E{self.released}", E)
        self.released += 1
        self.rank += len(values)
        return E

    def _refill(self, draws: tuple[Tensor, Tensor] | None) -> dict[str, nn.Parameter]:
        """Bring the reserve to its width again; returns the tensors that train from now on."""
        site, method = self.site, self.method
        wide = min(method.growth, self.limit - self.rank) - len(self.reserve)
        if wide < 1:
            return {}
        if draws is None:
            source = block_generator(self.seed, self.width)
            A = normal((wide, site.cols), 0.02, site, source)
            B = normal((site.rows, wide), 0.02, site, source)
        else:
            A, B = (t.clone() for t in draws)
        A, B = A.to(self.A0), B.to(self.A0)  # the model may have moved since it was adapted
        if A.shape != (wide, site.cols) or B.shape != (site.rows, wide):
            raise ValueError(
                f"draws of layer {site.name!r} have shapes {tuple(A.shape)} and {tuple(B.shape)}, "
                f"the new block needs {(wide, site.cols)} and {(site.rows, wide)}"
            )
        i = self.width
        self._add_block(A, B, method.advance)
        self.reserve = torch.cat([self.reserve, self.reserve.new_full((wide, 1), self.frozen)])
        return {k: self._parameters[k] for k in (f"A{i}", f"B{i}") if k in self._parameters}

    @torch.no_grad()
    def grow(
        self, amount: int, draws: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, nn.Parameter]:
        """Release the lambdas of ``amount`` reserves and append new ones.

        Args:
            amount: at most the width of the reserve.
            draws: A (c, n) and B (m, c) of the new reserve, instead of its own draw.

        Returns:
            The tensors that train from now on.
        """
        born: dict[str, nn.Parameter] = {}
        starts = self.reserve[:amount].clone()
        # without advance learning the vectors of the reserve begin to train only now
        for i in range(self.width):
            for key in (f"A{i}", f"B{i}"):
                if key in self._buffers:
                    value = self._buffers.pop(key)
                    self.register_parameter(key, nn.Parameter(value))
                    born[key] = self._parameters[key]
        name = f"E{self.released}"
        born[name] = self._release(starts)
        self.reserve = self.reserve[amount:].clone()
        return born | self._refill(draws)

    def retire(self) -> None:
        """The target is reached: reserves no longer act on the output."""
        self.reserve = torch.zeros_like(self.reserve)

    def blocks(self) -> tuple[list[Tensor], list[Tensor]]:
        """All B (m, w) and all A (w, n), the reserve's included."""
        Bs = [getattr(self, f"B{i}") for i in range(self.width)]
        return Bs, [getattr(self, f"A{i}") for i in range(self.width)]

    def lambdas(self) -> Tensor:
        """(r + c, 1) lambdas, the frozen ones last."""
        return torch.cat([*(getattr(self, f"E{i}") for i in range(self.released)), self.reserve])

    @property
    def scale(self) -> float:
        return self.method.scale(self.rank)

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (m, r + c) and diag(lambda) A (r + c, n)."""
        Bs, As = self.blocks()
        return torch.cat(Bs, 1), self.lambdas() * torch.cat(As)

    def delta(self) -> Tensor:
        """s B diag(lambda) A, shape (m, n)."""
        B, A = self.factors()
        return self.scale * (B @ A)

    # -- the two routes ---------------------------------------------------------------------------

    def merged(self, base: nn.Module) -> dict[str, Tensor]:
        delta = self.delta()
        if self._listens(delta):
            self._hear_delta(delta)
        weight = getattr(base, self.site.parameter)
        change = self.site.to_weight(delta)
        return {self.site.parameter: (weight.to(change.dtype) + change).to(weight.dtype)}

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.site.kind == "attention" and not (self.dropout and self.training):
            return functional_call(base, self.merged(base), args, kwargs)
        B, A = self.factors()
        y = factored.apply(
            base, self.site, A, B, self.scale, self.dropout, self.training, args, kwargs
        )
        if self._listens(y):
            self._hear_output(y, args[0], base, A, B)
        return y

    def _listens(self, y: Tensor) -> bool:
        return (
            self.listening
            and self.training
            and y.requires_grad
            and torch.is_grad_enabled()
            and not torch._C._are_functorch_transforms_active()
        )

    # Hooks write to this module, which a compiled graph cannot do: it breaks here instead.
    @torch.compiler.disable
    def _hear_output(self, y: Tensor, x: Tensor, base: nn.Module, A: Tensor, B: Tensor) -> None:
        x, left, right = x.detach(), self.scale * B.detach(), A.detach()

        def hook(g: Tensor | None) -> None:
            if g is not None:
                self._hear(increment_score(base, self.site, left, right, x, g.detach()))

        y.register_hook(hook)

    @torch.compiler.disable
    def _hear_delta(self, delta: Tensor) -> None:
        value = delta.detach()

        def hook(g: Tensor | None) -> None:
            if g is not None:
                self._hear((value * g.detach()).abs_().sum())

        delta.register_hook(hook)

    def _hear(self, summed: Tensor) -> None:
        now = summed / size_factor(self.site, self.method.normalise)
        self.score = now if self.score is None else self.score + now

    # -- life on disk and in copies ---------------------------------------------------------------

    @torch.no_grad()
    def compact(self) -> None:
        """Keep one block of the components that count and drop the reserve; for after training."""
        Bs, As = self.blocks()
        r = self.rank
        E = self.lambdas()[:r]
        self._rebuild([(torch.cat(As)[:r], torch.cat(Bs, 1)[:, :r].contiguous())], [E], E[:0])

    @torch.no_grad()
    def resize(self, state: dict[str, Tensor]) -> None:
        """Take on the blocks of saved tensors; what makes no sense is left to the loader."""
        m, n = self.site.rows, self.site.cols
        wide = _numbered(state, "A"), _numbered(state, "B"), _numbered(state, "E")
        widths = [len(t) for t in wide[0]]
        ranks, kept = [len(t) for t in wide[2]], state.get("reserve")
        right = (
            kept is not None
            and ranks
            and all(t.shape == (w, n) for t, w in zip(wide[0], widths, strict=True))
            and [t.shape for t in wide[1]] == [(m, w) for w in widths]
            and all(t.shape == (r, 1) for t, r in zip(wide[2], ranks, strict=True))
            and kept.shape == (sum(widths) - sum(ranks), 1)
        )
        if not right:
            return
        where = {"device": self.site.device, "dtype": self.site.dtype}
        blocks = [(t.to(**where), u.to(**where)) for t, u in zip(wide[0], wide[1], strict=True)]
        self._rebuild(blocks, [t.to(**where) for t in wide[2]], kept.to(**where))

    def _rebuild(
        self, blocks: list[tuple[Tensor, Tensor]], lambdas: list[Tensor], reserve: Tensor
    ) -> None:
        for key in [k for k in self._parameters | self._buffers if k not in ("reserve", "seed")]:
            delattr(self, key)
        self.width = self.released = self.rank = 0
        self.reserve = reserve.clone()
        count = sum(len(E) for E in lambdas)
        start = 0
        for i in range(max(len(blocks), len(lambdas))):
            if i < len(blocks):
                A, B = blocks[i]
                self._add_block(A.clone(), B.clone(), self.method.advance or start < count)
                start += len(A)
            if i < len(lambdas):
                self._release(lambdas[i].clone())

    def __getstate__(self) -> dict[str, Any]:
        # copies start without a controller, so nothing would read their scores
        return self.__dict__ | {"listening": False, "score": None}

    def facts(self) -> dict[str, int]:
        return {"rank": self.rank}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, reserve={len(self.reserve)}, scale={self.scale:g}"


def _numbered(state: dict[str, Tensor], letter: str) -> list[Tensor]:
    """The tensors A0, A1, ... of a state, in order."""
    return [state[f"{letter}{i}"] for i in range(len(state)) if f"{letter}{i}" in state]
