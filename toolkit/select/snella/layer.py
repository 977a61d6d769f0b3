"""The adapter of one layer: two factors, a kernel between them, and a share that is dropped."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from toolkit.core.adapt.forwards import call_with, has_own_forward, is_hooked, refuse_trace
from toolkit.core.adapt.sites import Site, uniform
from toolkit.core.adapt.weight import WeightLayer
from toolkit.select.snella.competition import sparsify
from toolkit.select.snella.kernels import KERNELS, SCALARS


def check_pieces(method: Any) -> None:
    """Raise ValueError unless the rank can be cut in that many pieces."""
    if method.rank % method.pieces:
        raise ValueError(
            f"{type(method).__name__}(rank={method.rank}, pieces={method.pieces}): rank must be a "
            "multiple of pieces, so that all have equally many columns"
        )


def count(method: Any, site: Site) -> int:
    """r (m + n) numbers, the kernel's scalars, and under ``like="paper"`` a weight per piece."""
    learned = method.pieces if weighs(method) else 0
    return method.rank * (site.rows + site.cols) + len(SCALARS[method.kernel]) + learned


def weighs(method: Any) -> bool:
    """Whether the weights of the pieces are learned."""
    return method.like == "paper" and method.kernel in ("piecewise", "mixed")


class KernelLayer(WeightLayer):
    """The factors of one layer: ``A`` (P, n, r / P), ``B`` (P, m, r / P), and the kernel's scalars.

    ``sparsity`` is the share of the change that is set to zero; it is saved with the factors, and
    :meth:`drop` sets it. ``c`` (P,) weighs the pieces.

    Args:
        method: the hyperparameters.
        site: where.
        generator: of the start: Kaiming's uniform law over (P, n, r / P), bound
            :math:`1/\\sqrt{n\\,r/P}`, as in the official code.
        sparsity: at the start.
        dense: leave the change as the kernel gives it: nothing is dropped, nothing squared.
    """

    sparsity: Tensor

    def __init__(
        self,
        method: Any,
        site: Site,
        generator: torch.Generator | None,
        sparsity: float,
        dense: bool = False,
    ):
        super().__init__(site)
        self.kernel, self.like, self.dense = method.kernel, method.like, dense
        self.recompute, self.dropout, self.drop_path = (
            method.recompute, method.dropout, method.drop_path,
        )  # fmt: skip
        r, P, m, n = method.rank, method.pieces, site.rows, site.cols
        if r > min(m, n):
            warnings.warn(
                f"rank {r} of layer {site.name!r} trains more numbers than its matrix of {m} x {n} "
                f"has; at most {min(m, n)} is sensible. It is taken as given",
                stacklevel=4,
            )
        k = r // P
        self.A = nn.Parameter(uniform((P, n, k), 1 / math.sqrt(n * k), site, generator))
        self.B = nn.Parameter(uniform((P, m, k), 1 / math.sqrt(m * k), site, generator))
        where = {"dtype": site.dtype, "device": site.device}
        for name, start in SCALARS[self.kernel].items():
            self.register_parameter(name, nn.Parameter(torch.full((1,), start, **where)))
        c = method.scale * torch.tensor([(-1.0) ** p for p in range(P)], **where)
        if weighs(method):
            self.c = nn.Parameter(c)
        else:
            self.register_buffer("c", c, persistent=False)
        self.register_buffer("sparsity", torch.tensor(sparsity, dtype=torch.float64))
        self._share = sparsity  # the same number where reading it stops no device

    @torch.no_grad()
    def drop(self, sparsity: float) -> None:
        """Set the share of entries that are dropped from now on."""
        self.sparsity.fill_(sparsity)
        self._share = sparsity

    def resize(self, state: dict[str, Tensor]) -> None:
        """Take on the share of saved tensors.

        Raises:
            IndexError: it is no share.
        """
        saved = state.get("sparsity")
        if saved is not None and saved.numel() == 1:
            if not 0 <= float(saved) <= 1:
                raise IndexError(f"sparsity {float(saved)} is no share")
            self._share = float(saved)

    def tensors(self) -> tuple[Tensor, ...]:
        """A, B, the pieces' weights and the kernel's scalars."""
        return self.A, self.B, self.c, *(getattr(self, name) for name in SCALARS[self.kernel])

    def change(self) -> Tensor:
        """The kernel's matrix (m, n), before anything is dropped."""
        return KERNELS[self.kernel](*self.tensors()).T

    def delta(self) -> Tensor:
        """What is added to the weight, (m, n)."""
        share = self._share
        return self._again(lambda *tensors: self.formed(share, tensors), *self.tensors())

    def formed(self, share: float, tensors: tuple[Tensor, ...]) -> Tensor:
        """:meth:`delta` of these tensors, with that share of it dropped."""
        change = KERNELS[self.kernel](*tensors).T
        return change if self.dense else sparsify(change, share, self.like)

    def new(self, weight: Tensor) -> Tensor:
        return weight + self.delta()

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        refuse_trace(self.site.name, (*args, *kwargs.values()))
        apart = self.site.kind in ("linear", "hf_conv1d") and not (
            has_own_forward(base) or is_hooked(base) or kwargs or len(args) != 1
        )
        drops = self.training and (self.dropout or self.drop_path)
        if not apart and drops:
            raise ValueError(
                f"dropout={self.dropout} and drop_path={self.drop_path} cannot act on "
                f"{self.site.kind} layer {self.site.name!r} ({type(base).__name__}), whose weight "
                "is read as a whole; set both to 0, or leave the layer out of targets"
            )
        if not apart:
            return call_with(base, self.merged(base), self.site.name, args, kwargs)
        x, share = args[0], self._share
        y, given = base(x), F.dropout(x, self.dropout) if drops else x

        def branch(x: Tensor, *tensors: Tensor) -> Tensor:
            delta = self.formed(share, tensors)
            if delta.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
                delta = delta.to(x.dtype)
            return F.linear(x, delta)

        more = self._again(branch, given, *self.tensors())
        return y + (_paths(more, self.drop_path) if drops else more)

    def _again(self, function: Callable[..., Any], *args: Tensor) -> Any:
        """A function whose intermediate matrices are formed again in the backward pass.

        It reads its tensors from its arguments: by then the module may hold others.
        """
        if (
            not self.recompute
            or not torch.is_grad_enabled()
            or torch.compiler.is_compiling()  # which decides itself what to keep
            or torch._C._are_functorch_transforms_active()  # which allow no checkpoint
        ):
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    @property
    @torch.no_grad()
    def changed(self) -> int:
        """Numbers of the weight that differ from the base once merged."""
        return int(self.delta().count_nonzero())

    def facts(self) -> dict[str, Any]:
        """What the report says of this layer."""
        return {"sparsity": self._share, "nonzero": self.changed}

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, sparsity={self._share:g}"


def _paths(y: Tensor, drop: float) -> Tensor:
    """Drop whole examples of a branch's output (stochastic depth), and scale up the others."""
    if not drop:
        return y
    kept = torch.rand(y.shape[0], *[1] * (y.dim() - 1), dtype=y.dtype, device=y.device) >= drop
    return y * kept / (1 - drop)
