"""LoRA-Pro's full mode: Adam on the gradient of the whole weight, inside the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from toolkit.core.adapt.steps.wrappers import unwrap
from toolkit.lowrank.lora_pro.adjustment import Adjustment
from toolkit.lowrank.lora_pro.projection import Frame, equivalent_gradient, widest


class Moments:
    """Adam's two averages for a stack of L tensors, and each one's count of steps.

    Args:
        like: tells dtype and device; half precisions get averages in float32.
        count: L. shape: of one tensor.
    """

    def __init__(self, like: Tensor, count: int, *shape: int):
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.first = torch.zeros(count, *shape, dtype=dtype, device=like.device)
        self.second = torch.zeros_like(self.first)
        self.steps = [0] * count

    def direction(self, g: Tensor, active: Sequence[int], method: Any) -> tuple[Tensor, Tensor]:
        r"""Take in gradients and return the direction of Adam in two parts.

        .. math:: u = c \cdot \frac{M}{\sqrt V + \epsilon\sqrt{b_2}}, \qquad
            c = \frac{\sqrt{b_2}}{b_1}, \qquad b_i = 1 - \beta_i^t

        The official code has t + 1 in the place of t.

        Args:
            g: (L', ...) gradients; overwritten.
            active: the L' places in the stack that have a gradient now.
            method: betas, eps, and whether like paper or code.

        Returns:
            The quotient (L', ...) and c (L',), which can then go where it costs less.
        """
        whole = len(active) == len(self.steps)
        first, second = (m if whole else m[active] for m in (self.first, self.second))
        first.lerp_(g, 1 - method.beta1)
        second.mul_(method.beta2).addcmul_(g, g, value=1 - method.beta2)
        if not whole:
            self.first[active], self.second[active] = first, second
        for i in active:
            self.steps[i] += 1
        times = [self.steps[i] + (method.like == "code") for i in active]
        b1, b2 = ([1 - beta**t for t in times] for beta in (method.beta1, method.beta2))
        small = g.new_tensor([method.eps * b**0.5 for b in b2])
        c = [b**0.5 / a for a, b in zip(b1, b2, strict=True)]
        torch.sqrt(second, out=g)
        torch.div(first, g.add_(small.view(-1, *[1] * (g.ndim - 1))), out=g)
        return g, torch.tensor(c, dtype=widest(g.device), device=g.device)

    def state(self, name: str) -> dict[str, Tensor]:
        steps = torch.tensor(self.steps)
        return {f"{name}.first": self.first, f"{name}.second": self.second, f"{name}.steps": steps}

    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        self.first.copy_(state[f"{name}.first"])
        self.second.copy_(state[f"{name}.second"])
        self.steps = state[f"{name}.steps"].tolist()


class AdamAdjustment(Adjustment):
    """Full mode: Adam on the equivalent gradient of the whole weight, then the adjusted pair.

    The moments have the size of the adapted weights, (m, n) per layer, in :meth:`state`.
    Parameters that train beside the adapters get Adam's own direction, unless ``beside`` holds
    them.

    Args:
        extra: parameters that train beside the adapters, by name.
        beside: an optimizer for some of them. They are taken out of ``optimizer``.

    Raises:
        TypeError, ValueError: ``optimizer`` is not plain SGD, or the factors of a layer are in
            different groups of it, or ``beside`` holds factors or nothing of this model.
    """

    exclusive: ClassVar[bool] = True

    def __init__(
        self,
        method: Any,
        layers: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        extra: Mapping[str, nn.Parameter],
        beside: torch.optim.Optimizer | None = None,
    ):
        super().__init__(method, layers, optimizer)
        refuse_all_but_sgd(optimizer)
        self._refuse_split_pairs()
        self._elsewhere = set() if beside is None else self._held_by(beside, extra)
        self.extra = {name: p for name, p in extra.items() if id(p) not in self._elsewhere}
        firsts = [(self.A[g[0]], len(g), len(self.B[g[0]])) for g in self.groups]
        self.moments = [Moments(A, count, m, A.shape[1]) for A, count, m in firsts]
        self.own = {name: Moments(p, 1, *p.shape) for name, p in self.extra.items()}
        self._place = {i: place for group in self.groups for place, i in enumerate(group)}

    def named(self) -> dict[str, nn.Parameter]:
        return super().named() | self.extra

    def hooked(self, unhook: Callable[[], None]) -> None:
        super().hooked(unhook)
        # only now, so that a refusal has left the optimizer as it was
        for held in self.optimizer.param_groups:
            held["params"] = [p for p in held["params"] if id(p) not in self._elsewhere]

    @torch.no_grad()
    def before_step(self) -> None:
        refuse_all_but_sgd(self.optimizer)  # a scheduler may have switched momentum on
        super().before_step()
        for name, p in self.extra.items():
            if p.grad is not None:
                g = p.grad.to(self.own[name].first.dtype, copy=True)[None]
                u, c = self.own[name].direction(g, [0], self.method)
                self.exchange([p], u.mul_(c.to(u.dtype)))

    def moved(
        self, k: int, at: Sequence[int], frame: Frame, gA: Tensor, gB: Tensor
    ) -> tuple[Tensor, Tensor]:
        s, dtype = self.layers[at[0]].scale, self.moments[k].first.dtype
        A, B = frame.A.to(dtype), frame.B.to(dtype)
        gA, gB = frame.pair(gA, gB, s, "zero")
        g = equivalent_gradient(gA.to(dtype), gB.to(dtype), A, B, s)
        u, c = self.moments[k].direction(g, [self._place[i] for i in at], self.method)
        c = s * c[:, None, None]
        return frame.pair(c * (B.mT @ u), c * (u @ A.mT), s, self.method.X)

    def _kept(self) -> dict[str, Moments]:
        layers = {f"layers.{k}": moments for k, moments in enumerate(self.moments)}
        return layers | {f"beside.{name}": moments for name, moments in self.own.items()}

    def state(self) -> dict[str, Tensor]:
        state = super().state()
        for name, moments in self._kept().items():
            state |= moments.state(name)
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        super().load(state)
        for name, moments in self._kept().items():
            moments.load(name, state)

    def _refuse_split_pairs(self) -> None:
        place = {id(p): k for k, g in enumerate(self.optimizer.param_groups) for p in g["params"]}
        for name, a, b in zip(self.names, self.A, self.B, strict=True):
            if place[id(a)] != place[id(b)]:
                raise ValueError(
                    f"optimizer holds A and B of layer {name!r} in different groups; their "
                    "changes are computed together, so put both into one group"
                )

    def _held_by(self, beside: Any, extra: Mapping[str, nn.Parameter]) -> set[int]:
        held = {id(p) for g in unwrap(beside).param_groups for p in g["params"]}
        for name, p in super().named().items():
            if id(p) in held:
                raise ValueError(
                    f"beside holds {name!r}, which LoRA-Pro moves itself; give it only parameters "
                    "named by train"
                )
        elsewhere = held & {id(p) for p in extra.values()}
        if not elsewhere:
            raise ValueError(
                f"beside holds none of the parameters trained beside the adapters "
                f"({list(extra)[:3]}); name them in adapt(..., train=...) or leave beside out"
            )
        return elsewhere


def refuse_all_but_sgd(optimizer: torch.optim.Optimizer) -> None:
    """Raise unless the optimizer does nothing but subtract learning rate times gradient."""
    remedy = (
        "LoRA-Pro in full mode runs Adam itself and a second one must not follow; attach "
        "torch.optim.SGD(adapted.parameters(), lr=..., weight_decay=...) with momentum off, or "
        "use LoRAPro(mode='efficient') with the optimizer you like"
    )
    if type(optimizer) is not torch.optim.SGD:
        raise TypeError(f"optimizer is {type(optimizer).__name__}, but {remedy}")
    for group in optimizer.param_groups:
        for option in ("momentum", "nesterov", "maximize"):
            if group.get(option):
                raise ValueError(f"optimizer has {option}={group[option]}, but {remedy}")
