"""SGD and AdamW over all lanes, each lane with its own rate, decay and momentum.

Where these agree among the lanes, PyTorch's fused kernels update all tensors in one pass over
memory; otherwise every operation covers all lanes of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

BETA2, EPS = 0.999, 1e-8
Setting: TypeAlias = "float | Tensor"
"""A number that all lanes share, or one per lane (M,)."""


class SGD:
    """PyTorch's SGD with momentum.

    Args:
        weights: tensors (M, ...) whose updates are to be remembered.
    """

    def __init__(self, weights: list[Tensor]):
        self.moments = [torch.zeros_like(w) for w in weights]

    def memory(self) -> list[list[Tensor]]:
        """What is kept of earlier steps: lists in the order of the weights."""
        return [self.moments]

    def shrink(self, count: int) -> None:
        """Go on with the first ``count`` lanes."""
        for tensors in self.memory():
            tensors[:] = [t[:count].clone() for t in tensors]

    @torch.no_grad()
    def step(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        step: int,
        rate: Setting,
        decay: Setting,
        momentum: Setting,
    ) -> None:
        """Update ``weights`` in place; a tensor laid out anew takes its place in the list.

        Args:
            weights: (M, ...).
            grads: shaped as the weights; written over.
            step: counted from 0.
            rate: learning rate.
            decay: weight decay.
            momentum: of SGD; the first beta of AdamW.
        """
        grads = [g if _fills(g) else g.contiguous() for g in grads]
        self._lay_out(weights, grads)
        fused = not any(isinstance(v, Tensor) for v in (rate, decay, momentum))
        update: Callable[..., None] = self._fused if fused else self._lanewise
        update(weights, grads, step, rate, decay, momentum)

    def _lay_out(self, weights: list[Tensor], grads: list[Tensor]) -> None:
        """Give weights and moments the memory order of their gradients.

        Autograd's gradients of matrices come transposed. Copying them at every step would cost
        more than the update; the fused optimiser reads memory in order and needs all of one tensor
        alike.
        """
        for tensors in (weights, *self.memory()):
            for i, g in enumerate(grads):
                if tensors[i].stride() != g.stride():
                    tensors[i] = torch.empty_strided(
                        g.shape, g.stride(), dtype=g.dtype, device=g.device
                    ).copy_(tensors[i])

    def _fused(
        self, weights: list[Tensor], grads: list[Tensor], step: int, rate: float, decay: float,
        momentum: float,
    ) -> None:  # fmt: skip
        sgd(
            *map(_in_order, (weights, grads, self.moments)),
            weight_decay=decay, momentum=momentum, lr=rate,
            dampening=0.0, nesterov=False, maximize=False, fused=True,
        )  # fmt: skip

    def _lanewise(
        self, weights: list[Tensor], grads: list[Tensor], step: int, rate: Setting, decay: Setting,
        momentum: Setting,
    ) -> None:  # fmt: skip
        for w, g, m in zip(weights, grads, self.moments, strict=True):
            _add(g, w, decay)
            m.mul_(column(momentum, m)).add_(g)
            _add(w, m, -rate)


class AdamW(SGD):
    """PyTorch's AdamW with the second beta at 0.999."""

    def __init__(self, weights: list[Tensor]):
        super().__init__(weights)
        self.squares = [torch.zeros_like(w) for w in weights]
        # the fused kernel counts the steps of every tensor by itself
        self.counts = [w.new_zeros((), dtype=torch.float32) for w in weights]

    def memory(self) -> list[list[Tensor]]:
        return [self.moments, self.squares]

    def _fused(
        self, weights: list[Tensor], grads: list[Tensor], step: int, rate: float, decay: float,
        momentum: float,
    ) -> None:  # fmt: skip
        for count in self.counts:
            count.fill_(step)
        adamw(
            *map(_in_order, (weights, grads, self.moments, self.squares)), [], self.counts,
            lr=rate, beta1=momentum, beta2=BETA2, eps=EPS, weight_decay=decay,
            amsgrad=False, maximize=False, fused=True,
        )  # fmt: skip

    def _lanewise(
        self, weights: list[Tensor], grads: list[Tensor], step: int, rate: Setting, decay: Setting,
        momentum: Setting,
    ) -> None:  # fmt: skip
        first = 1 - momentum ** (step + 1)
        second = math.sqrt(1 - BETA2 ** (step + 1))
        for w, g, m, v in zip(weights, grads, self.moments, self.squares, strict=True):
            w.mul_(1 - column(rate * decay, w))
            m.lerp_(g, 1 - column(momentum, m))
            v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
            w.addcdiv_(m * column(-rate / first, w), v.sqrt().div_(second).add_(EPS))


OPTIMIZERS: dict[str, type[SGD]] = {"sgd": SGD, "adamw": AdamW}


def column(value: Setting, like: Tensor) -> float | Tensor:
    """A number, or one number per lane, in a form that broadcasts over ``like`` (M, ...)."""
    return value.view(-1, *[1] * (like.dim() - 1)) if isinstance(value, Tensor) else value


def _add(to: Tensor, what: Tensor, times: Setting) -> None:
    """``to += times * what``, in one pass."""
    if isinstance(times, Tensor):
        to.addcmul_(what, column(times, to))
    else:
        to.add_(what, alpha=times)


def _in_order(tensors: list[Tensor]) -> list[Tensor]:
    """Views whose axes follow memory: the fused optimiser would copy any others."""
    return [
        t if t.is_contiguous() else t.permute(sorted(range(t.dim()), key=t.stride, reverse=True))
        for t in tensors
    ]


def _fills(t: Tensor) -> bool:
    """Whether a tensor fills its memory, in whatever order: ``empty_like`` then keeps its strides,
    and others are copied."""
    return t.is_contiguous() or torch.empty_like(t).stride() == t.stride()
