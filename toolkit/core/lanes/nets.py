"""Many networks of one architecture as one: tensors with a leading lane axis.

The states of M networks are one dictionary, the networks' ``state_dict`` with every tensor stacked
along a first axis of length M. :class:`LaneNet` calls them all at once with ``torch.func.vmap``, so
any module works whose layers PyTorch can batch: linear, convolution, normalisation, residual sums.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm

States = dict[str, Tensor]
Make = Callable[[torch.Generator], nn.Module]
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def stack(models: Sequence[nn.Module | Mapping[str, Tensor]]) -> States:
    """Stack networks of one architecture: name -> (M, ...), copies.

    Args:
        models: M networks, or their state dicts.

    Raises:
        ValueError: no model, or one whose names or shapes differ from the first one's.
    """
    if not models:
        raise ValueError("models is empty: give at least one network to stack.")
    dicts = [m.state_dict() if isinstance(m, nn.Module) else m for m in models]
    for i, other in enumerate(dicts):
        require_same(dicts[0], other, "models[0]", f"models[{i}]")
    return {name: torch.stack([d[name].detach() for d in dicts]) for name in dicts[0]}


def require_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], first: str, second: str) -> None:
    """Raise ValueError unless two sets of tensors have the same names and shapes."""
    odd = sorted(a.keys() ^ b.keys())
    odd += [name for name in a.keys() & b.keys() if a[name].shape != b[name].shape]
    if odd:
        raise ValueError(
            f"{first} and {second} are not of one architecture: {odd[0]!r} is missing in one, or "
            f"its shape differs ({len(odd)} such tensors). Compare networks made by one call."
        )


def lanes_of(states: Mapping[str, Tensor]) -> int:
    """How many lanes there are."""
    return len(next(iter(states.values())))


def take(states: Mapping[str, Tensor], lanes: Tensor | Sequence[int]) -> States:
    """The states of some lanes, copied, in the order given; a lane may be named twice."""
    first = next(iter(states.values()))
    index = torch.as_tensor(lanes, device=first.device)
    return {name: t.index_select(0, index) for name, t in states.items()}


def lane(states: Mapping[str, Tensor], m: int) -> States:
    """One lane's state dict, without the lane axis: ``module.load_state_dict(lane(states, 3))``."""
    return {name: t[m] for name, t in states.items()}


def initial(make: Make, seeds: Sequence[int]) -> States:
    """Initial weights, one lane per seed; equal seeds start equal.

    Args:
        make: builds a network from a ``torch.Generator``.
        seeds: the seed of each lane.
    """
    from toolkit.core.seeds import generator

    unique = sorted(set(seeds))
    states = stack([make(generator(seed, "weights")) for seed in unique])
    return take(states, [unique.index(seed) for seed in seeds])


class LaneNet:
    """Calls all lanes of a stacked state.

    Args:
        template: a network of the architecture; its own weights are not used.

    Attributes:
        parameters: names of what is trained; of tied weights the first name.
        tied: a second name of a tied tensor -> its first name.

    Raises:
        ValueError: the template drops units at random, which lanes cannot repeat draw by draw, or
            it has parameters that are made at the first call.
    """

    def __init__(self, template: nn.Module):
        for name, module in template.named_modules():
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p:
                raise ValueError(
                    f"layer {name!r} is dropout with p={module.p}: lanes take every random draw as "
                    "an argument and have none for it; set p=0."
                )
        if any(map(nn.parameter.is_lazy, template.parameters())):
            raise ValueError("the network has lazy layers: call it once before it is returned.")
        self.template = copy.deepcopy(template)
        self.parameters = [n for n, p in self.template.named_parameters() if p.requires_grad]
        first: dict[int, str] = {}
        self.tied: dict[str, str] = {}
        for name, tensor in self.template.state_dict(keep_vars=True).items():
            if (own := first.setdefault(id(tensor), name)) != name:
                self.tied[name] = own
        norms = {n: m for n, m in self.template.named_modules() if isinstance(m, _BatchNorm)}
        self.norms = list(norms.values())
        # a momentum of None: the mean over all batches so far
        self.cumulative = [
            (f"{n}.num_batches_tracked".lstrip("."), m)
            for n, m in norms.items()
            if m.momentum is None and m.num_batches_tracked is not None
        ]

    def __call__(self, states: States, x: Tensor, train: bool = False) -> Tensor:
        """Outputs (M, b, ...) of all lanes.

        Args:
            states: name -> (M, ...). In training mode the batch-norm statistics in it are updated
                in place.
            x: inputs (M, b, ...), each lane its own; or (b, ...) shared, see :meth:`shared`.
            train: whether batch-norm uses the batch.
        """
        self._prepare(states, train)
        return vmap(self._call)(states, x)

    def shared(self, states: States, x: Tensor, train: bool = False) -> Tensor:
        """Outputs (M, b, ...) of all lanes for the same inputs (b, ...)."""
        self._prepare(states, train)
        return self._shared(states, x)

    def _prepare(self, states: States, train: bool) -> None:
        self.template.train(train)
        for name, norm in self.cumulative if train else ():
            # the layer would read the number itself, which it cannot for many lanes at once
            low, high = states[name].aminmax()
            if low != high:
                raise ValueError(
                    f"states[{name!r}] differs between lanes, and a batch-norm of momentum=None "
                    "needs one count for all: start from networks that saw equally many batches."
                )
            norm.momentum = 1 / (int(low) + 1)

    def _shared(self, states: States, x: Tensor) -> Tensor:
        return vmap(self._call, in_dims=(0, None))(states, x)

    def _call(self, state: States, x: Tensor) -> Tensor:
        if self.tied:  # the first name sets them all
            state = {name: t for name, t in state.items() if name not in self.tied}
        return logits_of(functional_call(self.template, state, (x,)))

    @torch.no_grad()
    def predict(self, states: States, x: Tensor, batch: int = 1024) -> Tensor:
        """Outputs (M, N, ...) in evaluation mode, for inputs (N, ...)."""
        return torch.cat([self.shared(states, part) for part in x.split(batch)], 1)

    @torch.no_grad()
    def restate(self, states: States, x: Tensor, batch: int = 256) -> States:
        """States with batch-norm statistics estimated anew by one pass over ``x`` (N, ...).

        A cumulative mean: batch number i of size b counts with weight b / (n + b) after n samples;
        the variance of a batch is the unbiased one (official code of Garipov et al., 2018). The
        other tensors are shared with ``states``.
        """
        if not self.norms:
            return states
        fresh = dict(states)
        for name, t in states.items():
            if name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked"):
                fresh[name] = torch.zeros_like(t)
        self.template.train(True)
        before = [norm.momentum for norm in self.norms]
        seen = 0
        try:
            for part in x.split(batch):
                for norm in self.norms:
                    norm.momentum = len(part) / (seen + len(part))
                self._shared(fresh, part)
                seen += len(part)
        finally:
            for norm, momentum in zip(self.norms, before, strict=True):
                norm.momentum = momentum
        return fresh


def logits_of(output: Any) -> Tensor:
    """The logits in what a network returned: a tensor, alone in a tuple, or called ``logits``.

    Raises:
        TypeError: none of these.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, tuple) and len(output) == 1:
        found = output[0]
    else:
        found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"the network returns a {type(output).__name__}, and lanes need its logits: return a "
            "tensor, or an object or a dict with `logits`."
        )
    return found


def weighted(template: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear and convolution layers by name, in the order in which they were defined."""
    for name, module in template.named_modules():
        if isinstance(module, WEIGHTED):
            yield name, module


def width_masks(template: nn.Module, widths: Sequence[float]) -> States:
    """Masks that make lane m as narrow as ``widths[m]`` says: name -> (M, ...), of 0 and 1.

    A lane of width w keeps the first ceil(w n) of the n outputs of every linear, convolution and
    batch-norm layer but the last weighted one. What is cut has weight and bias 0, so it adds
    nothing downstream: the lane computes what the narrow network computes. (Its initial weights
    keep the scale of the wide network's.)

    Raises:
        ValueError: a width outside (0, 1].
    """
    for w in widths:
        if not 0 < w <= 1:
            raise ValueError(f"width={w}: the share of units kept must lie in (0, 1].")
    names = [name for name, _ in weighted(template)]
    masks: States = {}
    for name, module in template.named_modules():
        if name == names[-1] or not isinstance(module, (*WEIGHTED, _BatchNorm)):
            continue
        for key, tensor in module.named_parameters(recurse=False):
            n = tensor.shape[0]
            kept = torch.tensor([math.ceil(w * n) for w in widths])
            keep = torch.arange(n) < kept[:, None]
            shape = (len(widths), n, *[1] * (tensor.dim() - 1))
            masks[f"{name}.{key}"] = keep.view(shape).expand(-1, *tensor.shape).to(tensor.dtype)
    return masks


def join_masks(a: States | None, b: States | None) -> States:
    """The product of two sets of masks; a name in one alone is kept as it is."""
    joined = dict(a or {})
    for name, mask in (b or {}).items():
        joined[name] = joined[name] * mask if name in joined else mask
    return joined
