"""Training at a perturbed point without ever writing into a parameter; and SAM, the reference.

A :class:`Cover` lies over one adapted layer. It is empty until a controller fills it, holds for all
forward passes up to the next optimizer step, and is neither saved nor copied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Maker = Callable[..., Tensor]  # of nothing, or of out=, a tensor to fill


class Cover:
    """What is laid over one layer: another frozen weight, or shifts of the factors, or nothing.

    Attributes:
        shift: (dA, dB) that the layer adds to its factors, or None.
        stand_in: a shallow copy of the base layer with a weight of its own, or None.
        make: forms the perturbed weight anew, when it is not kept between forward and backward.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.shift: tuple[Tensor, Tensor] | None = None
        self.stand_in: nn.Module | None = None
        self.make: Maker | None = None

    def __reduce__(self) -> Any:
        return Cover, ()  # a copy of the model, in memory or in a file, is a plain one

    @property
    def lies(self) -> bool:
        """Whether anything lies over the layer."""
        return self.shift is not None or self.stand_in is not None

    def lay(self, base: nn.Module, parameter: str, make: Maker, keep: bool) -> None:
        """Put a perturbed weight over the layer.

        Args:
            base: the frozen layer; it is not touched.
            parameter: name of its weight.
            make: returns the perturbed weight, the same each time until the next step.
            keep: hold the weight, or form it in each forward and again in each backward pass.
        """
        if self.stand_in is None:
            # the same layer, hooks and bias included, but with a table of parameters of its own
            self.stand_in = copy.copy(base)
            self.stand_in._parameters = dict(base._parameters)
        weight = base._parameters[parameter]
        self.make = None if keep else make
        held = self.stand_in._parameters[parameter]
        if not keep:
            self.stand_in._parameters[parameter] = weight
        elif held is weight:
            self.stand_in._parameters[parameter] = nn.Parameter(make(), requires_grad=False)
        else:
            with torch.no_grad():
                make(out=held)

    def call(self, base: nn.Module, parameter: str, function: Callable[[nn.Module], Any]) -> Any:
        """``function`` of the base layer as it is covered now."""
        if self.stand_in is None:
            return function(base)
        if self.make is None:
            return function(self.stand_in)
        return _without_keeping(self.stand_in, base, parameter, self.make, function)


@torch.compiler.disable
def _without_keeping(
    stand_in: nn.Module, base: nn.Module, parameter: str, make: Maker, function: Callable
) -> Any:
    """Call with a weight that autograd does not keep: backward asks ``make`` for it again."""
    with torch._C._DisableFuncTorch():  # vmap refuses to draw, though all samples share this
        weight = make()
    address = weight.untyped_storage().data_ptr()

    def pack(tensor: Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() != address:
            return tensor
        return tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else make().as_strided(*packed)

    stand_in._parameters[parameter] = weight
    try:
        if torch._C._are_functorch_transforms_active():  # which take no such hooks
            return function(stand_in)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return function(stand_in)
    finally:
        stand_in._parameters[parameter] = base._parameters[parameter]


def sam_step(
    parameters: Iterable[nn.Parameter], closure: Callable[[], Tensor], rho: float
) -> Tensor:
    r"""Gradients at the worst nearby point, by two passes: sharpness-aware minimisation.

    .. math:: g = \nabla\mathcal L\Big(\theta + \rho\,\frac{\nabla\mathcal L(\theta)}
        {\|\nabla\mathcal L(\theta)\|_2}\Big)

    The parameters end bit for bit as they were, with g in their ``grad``; the optimizer's step is
    yours. Source: Foret et al., arXiv 2010.01412, algorithm 1.

    Args:
        parameters: the tensors to move, such as ``adapted.parameters()``.
        closure: clears the gradients, computes the loss, calls ``backward()``, returns the loss.
            It is called twice and must see the same batch both times.
        rho: radius, in the units of the parameters.

    Returns:
        The loss of the first pass, at the parameters themselves. Where the gradient is zero there
        is no direction, and the first pass is all.

    Raises:
        ValueError: ``rho`` is not positive, or no parameter has a gradient after the closure.
        FloatingPointError: the first gradient is not finite; nothing was moved.
    """
    if not rho > 0:
        raise ValueError(f"sam_step(rho={rho}): rho must be positive; SAM with 0 is plain training")
    parameters = list(parameters)
    loss = closure()
    moved = [p for p in parameters if p.grad is not None]
    if not moved:
        raise ValueError("no parameter has a gradient: the closure must call loss.backward()")
    grads = [p.grad for p in moved]
    norm = float(torch.stack([n.float() for n in torch._foreach_norm(grads)]).norm())
    if not norm < float("inf"):
        raise FloatingPointError(
            f"SAM's first gradient has norm {norm}; nothing was moved. Lower the learning rate, "
            "clip gradients, or skip the step"
        )
    if norm == 0:
        return loss
    with torch.no_grad():
        old = [p.clone() for p in moved]
        torch._foreach_add_(moved, torch._foreach_mul(grads, rho / norm))
    try:
        closure()
    finally:
        with torch.no_grad():
            torch._foreach_copy_(moved, old)  # adding and subtracting would leave rounding behind
    return loss
