"""The penalty that keeps the vectors of a factored difference nearly orthonormal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.steps import shapes
from toolkit.core.adapt.steps.controller import Controller

Pair = tuple[Tensor, Tensor]


def _gaps(pairs: Sequence[Pair]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    r"""Places, stacked M (k, m, r) and :math:`M^\top M - I` (k, r, r), shape by shape.

    M is P or :math:`Q^\top`, in order P1, Q1, P2, ... One by one their cost is all overhead.
    """
    tall = [t for P, Q in pairs for t in (P, Q.T)]
    for places in shapes.groups(tall, shapes.alike):
        stack = shapes.stacked(tall, places)
        gap = stack.mT @ stack
        yield places, stack, gap - torch.eye(gap.shape[-1], dtype=gap.dtype, device=gap.device)


def orthogonality(pairs: Sequence[Pair], squared: bool = False) -> Tensor:
    r"""How far each P and Q is from orthonormal: the penalty R, a scalar with its graph.

    .. math:: R = \frac1{2N}\sum_k \|P_k^\top P_k - I\|_F + \|Q_k Q_k^\top - I\|_F

    Args:
        pairs: N pairs of P (m, r) and Q (r, n).
        squared: squared norms, summed over the pairs (AdaLoRA's paper, equation 4), instead of the
            mean of norms (its official code).
    """
    gaps, home = [gap for _, _, gap in _gaps(pairs)], pairs[0][0].device
    if squared:
        return torch.stack([gap.square().sum().to(home) for gap in gaps]).sum()
    norms = torch.cat([torch.linalg.norm(gap, dim=(-2, -1)).to(home) for gap in gaps])
    return norms.sum() / len(norms)


@torch.no_grad()
def value_and_gradients(pairs: Sequence[Pair], squared: bool = False) -> tuple[Tensor, list]:
    r"""R, and its gradient for every P and Q, in order P1, Q1, P2, ...

    With :math:`G = P^\top P - I` it is :math:`4PG` (squared) or :math:`2PG / \|G\|_F / 2N`.
    """
    result: list[Any] = [None] * (2 * len(pairs))
    norms: list[Tensor] = []
    for places, stack, gap in _gaps(pairs):
        norm = torch.linalg.norm(gap, dim=(-2, -1), keepdim=True)
        norms.append(norm.flatten().to(pairs[0][0].device))
        if squared:
            gap.mul_(4)
        else:
            # the norm has no gradient at 0; 0 is the one that keeps an orthonormal matrix still
            gap.div_(norm.clamp_min(torch.finfo(norm.dtype).tiny)).mul_(2 / len(result))
        for i, g in zip(places, (stack @ gap).unbind(), strict=True):
            result[i] = g if i % 2 == 0 else g.T
    whole = torch.cat(norms)
    return whole.square().sum() if squared else whole.sum() / len(whole), result


class PenalisedController(Controller):
    r"""A controller whose loss has the penalty :math:`\gamma R`, gamma = ``method.orthogonality``.

    It acts in one of two places. In the step (the default): its gradient is added to the tensors'
    own just before the optimizer moves them, so after gradient clipping, and the loss that a loop
    prints has no R in it. In the loss: nothing is added in the step, and the loop writes
    ``loss = loss + method.orthogonality * adapted.controller.penalty()`` before ``backward()``, as
    the official codes do, so that clipping sees it.

    Attributes:
        last_penalty: R at the last step, a scalar without graph; None when gamma is 0.
        squared: the form of R, see :func:`orthogonality`.

    Args:
        method, layers, optimizer: as in :class:`Controller`.
        penalty: where it acts, "step" or "loss".

    Raises:
        ValueError: another word for ``penalty``.
    """

    squared = False

    def __init__(
        self,
        method: Any,
        layers: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        penalty: str = "step",
    ):
        super().__init__(method, layers, optimizer)
        if penalty not in ("step", "loss"):
            raise ValueError(f'penalty={penalty!r}: where it acts must be "step" or "loss"')
        self.place, self.last_penalty = penalty, None

    def blocks(self) -> list[tuple[Sequence[Tensor], Sequence[Tensor]]]:
        """For each pair the blocks of P, each (m, w), and those of Q, each (w, n)."""
        raise NotImplementedError

    def _pairs(self, blocks: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> list[Pair]:
        return [(_joined(Ps, 1), _joined(Qs, 0)) for Ps, Qs in blocks]

    def penalty(self) -> Tensor:
        """R of all layers now, a scalar with its graph: see the class."""
        return orthogonality(self._pairs(self.blocks()), self.squared)

    @torch.no_grad()
    def add_penalty(self) -> None:
        """Add gamma times the gradient of R to that of the loss, unless the loss has R in it."""
        if self.method.orthogonality == 0:
            return
        if self.place == "loss":
            self.last_penalty = self.penalty()
            return
        blocks = self.blocks()
        self.last_penalty, gradients = value_and_gradients(self._pairs(blocks), self.squared)
        sides = [side for Ps, Qs in blocks for side in ((Ps, 1), (Qs, 0))]
        grads, pieces = [], []
        for (parts, dim), whole in zip(sides, gradients, strict=True):
            split = whole.split([t.shape[dim] for t in parts], dim)
            for t, piece in zip(parts, split, strict=True):
                if t.requires_grad:
                    if t.grad is None:
                        t.grad = torch.zeros_like(t)
                    grads.append(t.grad)
                    pieces.append(piece)
        torch._foreach_add_(grads, pieces, alpha=self.method.orthogonality)


def _joined(blocks: Sequence[Tensor], dim: int) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks), dim)
