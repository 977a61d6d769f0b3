"""Training at a perturbed point without ever writing into a parameter.

A :class:`Cover` lies over one adapted layer. It is empty until a controller fills it, holds for all
forward passes up to the next optimizer step, and is neither saved nor copied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
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
        used: whether a forward pass has seen what lies there now.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.shift: tuple[Tensor, Tensor] | None = None
        self.stand_in: nn.Module | None = None
        self.make: Maker | None = None
        self.used = False

    def __reduce__(self) -> Any:
        return Cover, ()  # a copy of the model, in memory or in a file, is a plain one

    @property
    def lies(self) -> bool:
        """Whether anything lies over the layer."""
        return self.shift is not None or self.stand_in is not None

    def move(self, dA: Tensor, dB: Tensor) -> None:
        """Shift the factors."""
        self.shift, self.used = (dA, dB), False

    def lay(self, base: nn.Module, parameter: str, make: Maker, keep: bool) -> None:
        """Put the weight that ``make`` forms over the layer, the same each time; base stays.

        With ``keep`` it is held, without it formed in each forward and again in each backward pass.
        """
        if self.stand_in is None:
            # the same layer, hooks and bias included, but with a table of parameters of its own
            self.stand_in = copy.copy(base)
            self.stand_in._parameters = dict(base._parameters)
        weight = base._parameters[parameter]
        self.make, self.used = None if keep else make, False
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
        if not torch.compiler.is_compiling():
            if not self.used and torch._C._current_graph_task_id() != -1:  # inside backward()
                raise RuntimeError(
                    "activation checkpointing of the reentrant kind runs its first pass without "
                    "gradients, so without the perturbation under which it is repeated here; use "
                    "torch.utils.checkpoint with use_reentrant=False"
                )
            self.used = True
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
