"""Loss and gradients of chains of linear layers, as batched matrix products over the lane axis.

``torch.func.vmap`` and autograd call a network of any form. For the smallest networks, multilayer
perceptrons, these calls take longer than the arithmetic. A chain of linear layers and ReLU under
cross-entropy is therefore differentiated by hand: one matrix product per layer on the way forward,
two on the way back. The results are the general way's up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

Call: TypeAlias = tuple[Callable[..., Any], Any, Any, Tensor]
"""An operation, its two arguments, and the tensor that takes the result."""
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def chain(template: nn.Module, x: Tensor, y: Tensor) -> Chain | None:
    """The chain that a network is, or None where only the general way is known to be right.

    A chain is an ``nn.Sequential`` of ``nn.Linear``, ``nn.ReLU``, ``nn.Flatten`` and
    ``nn.Identity``, each exactly of that class, without hooks, patched ``forward``, layers used
    twice or frozen parameters.

    Args:
        template: the network.
        x: training inputs (N, ...).
        y: labels (N,).
    """
    if type(template) is not nn.Sequential or not len(template) or not _plain(template):
        return None
    modules = list(template)
    kinds = [type(module) for module in modules]
    if not all(kind in (nn.Linear, nn.ReLU, nn.Flatten, nn.Identity) for kind in kinds):
        return None
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    sound = (
        all(map(_plain, modules))
        and kinds.count(nn.Linear) > 0
        and len({*map(id, modules)}) == len(modules)
        and len({*map(id, tensors)}) == len(tensors)
        and all(t.requires_grad and t.dtype == x.dtype for t in tensors)
        and all((m.start_dim, m.end_dim) == (1, -1) for m in modules if type(m) is nn.Flatten)
        # cross-entropy leaves out examples of label -100
        and y.dtype == torch.int64
        and int(y.min()) >= 0
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(x.device.type)
    )
    # a linear layer over images or tokens gives outputs of more than two axes
    first = kinds.index(nn.Linear) if sound else 0
    if not sound or (x.dim() != 2 and nn.Flatten not in kinds[:first]):
        return None
    return Chain(modules)


def _plain(module: nn.Module) -> bool:
    """Whether calling the module does what its class says and nothing else."""
    hooked = any(getattr(module, name, None) for name in HOOKS)
    patched = {"forward", "__call__", "_call_impl"} & vars(module).keys()
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    return not (hooked or patched or compiled or torch_module._has_any_global_hook())


class Chain:
    """Forward and backward pass of all lanes of a chain; see :func:`chain`.

    Within, the batch is the last axis. Every product but one then reads rows of memory in order,
    and the softmax runs over whole rows at once, which for ten classes is twenty times faster.

    A step of the smallest networks is short enough that making views of tensors takes a good part
    of it. The calls are therefore laid out once, and made again as long as they are about the same
    tensors.

    Args:
        modules: the layers in order.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        # of a linear layer: the place of its weight among the parameters, and whether a bias
        # follows; None for ReLU
        self.plan: list[tuple[int, bool] | None] = []
        place = 0
        for module in modules:
            if isinstance(module, nn.Linear):
                self.plan.append((place, module.bias is not None))
                place += 1 + (module.bias is not None)
            elif isinstance(module, nn.ReLU):
                self.plan.append(None)
        self.buffers: dict[tuple[str, int], Tensor] = {}
        self.about: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, weights: list[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Mean cross-entropy and its gradients.

        Args:
            weights: weights (M, out, in) and biases (M, out) in the order of the layers.
            x: inputs (M, b, ...); not changed.
            y: labels (M, b).

        Returns:
            Loss (M,) and the gradients, shaped as the weights; valid until the next call.
        """
        about = [x.contiguous(), *weights]
        if len(about) != len(self.about) or not all(map(is_, about, self.about)):
            self._lay_out(*about)
            self.about = about
        for call, a, b, out in self.forward:
            call(a, b, out=out)
        loss = _cross_entropy(self.logits, y, self.slope)
        for call, a, b, out in self.backward:
            call(a, b, out=out)
        return loss, self.grads[:]

    def _lay_out(self, x: Tensor, *weights: Tensor) -> None:
        """The calls of a step: operation, two arguments, and where the result goes."""
        h = x.flatten(2).transpose(1, 2)
        self.forward: list[Call] = []
        inputs = []
        for n, layer in enumerate(self.plan):
            inputs.append(h)
            if layer is None:
                # in place but for the data: what a linear layer gave is not needed any more
                out = h if any(self.plan[:n]) else torch.empty_like(h)
                self.forward.append((torch.clamp_min, h, 0, out))
            else:
                at, biased = layer
                w = weights[at]
                out = self._buffer("output", n, (*w.shape[:2], h.shape[2]), w)
                self.forward.append((torch.bmm, w, h, out))
                if biased:
                    self.forward.append((torch.add, out, weights[at + 1][..., None], out))
            h = out
        self.logits, self.slope = h, self._buffer("slope", 0, h.shape, h)
        self._lay_out_backward(weights, [*inputs, h])

    def _lay_out_backward(self, weights: Sequence[Tensor], values: list[Tensor]) -> None:
        """The calls that give the gradients of all weights.

        Args:
            weights: as in the call.
            values: the input of every layer of the plan (M, units, b), and the output.
        """
        self.backward: list[Call] = []
        self.grads = [self._buffer("gradient", i, w.shape, w) for i, w in enumerate(weights)]
        g = self.slope
        for n in reversed(range(len(self.plan))):
            layer = self.plan[n]
            if layer is None:
                self.backward.append((_relu_backward, g, values[n + 1], g))
                continue
            at, biased = layer
            self.backward.append((torch.bmm, g, values[n].transpose(1, 2), self.grads[at]))
            if biased:
                self.backward.append((torch.sum, g, 2, self.grads[at + 1]))
            if not at:  # nothing before the first linear layer learns
                break
            out = self._buffer("input", n, values[n].shape, g)
            self.backward.append((torch.bmm, weights[at].transpose(1, 2), g, out))
            g = out

    def _buffer(self, role: str, n: int, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory that every step writes over: new memory would cost a page fault every 4 KiB."""
        held = self.buffers.get((role, n))
        if held is None or held.shape != torch.Size(shape):
            held = self.buffers[role, n] = like.new_empty(shape)
        return held


def _relu_backward(g: Tensor, value: Tensor, *, out: Tensor) -> None:
    torch.ops.aten.threshold_backward.grad_input(g, value, 0, grad_input=out)


def _cross_entropy(logits: Tensor, y: Tensor, slope: Tensor) -> Tensor:
    """Mean loss (M,) of logits (M, K, b); its gradient with respect to them goes to ``slope``."""
    spot = y[:, None]
    log_p = logits.log_softmax(1)
    loss = log_p.gather(1, spot).mean((1, 2)).neg_()
    torch.exp(log_p, out=slope)
    # scatter_add_ would do, but not on a GPU with deterministic algorithms
    slope.scatter_(1, spot, slope.gather(1, spot) - 1).div_(y.shape[1])
    return loss
