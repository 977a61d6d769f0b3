"""What linear layers see: statistics of their inputs, from forward hooks.

Means are plain, over all samples and tokens; give sequences without padding, or their padding
counts as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Inputs(NamedTuple):
    """Of a layer: mean (n,) and root mean square (n,) of each input, in float64."""

    mean: Tensor
    size: Tensor


def differences(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What fine-tuning changed, by name: floating tensors that both have in one shape."""
    found = {}
    for name, after in tuned.items():
        before = base.get(name)
        if before is not None and before.shape == after.shape and after.is_floating_point():
            found[name] = after.detach() - before.detach()
    return found


def inputs(model: nn.Module, batches: Iterable[Any]) -> dict[str, Inputs]:
    """Mean and size of what every linear layer sees.

    Args:
        model: the fine-tuned model, as in the official code.
        batches: what the model is called with: a tensor, a tuple or a dict of arguments.

    Returns:
        Weight name -> statistics, for the layers that were called.

    Raises:
        ValueError: no batch, no linear layer called, or inputs that are not finite.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, layer: nn.Linear, x: Tensor) -> None:
        rows = torch.stack([x.sum(dim=0), x.square().sum(dim=0)])
        sums[name] = sums[name] + rows if name in sums else rows
        counts[name] = counts.get(name, 0) + len(x)

    _watch(model, batches, see)
    _checked(sums)
    means = {name: rows / counts[name] for name, rows in sums.items()}
    return {name: Inputs(mean, square.sqrt()) for name, (mean, square) in means.items()}


def signals(
    model: nn.Module, deltas: Mapping[str, Tensor], batches: Iterable[Any]
) -> dict[str, tuple[float, float]]:
    """Sums over the rows of S^2 and of Q, each a mean over samples and tokens.

    Args:
        model: the fine-tuned model.
        deltas: name -> what fine-tuning changed; layers without an entry are passed over.
        batches: see :func:`inputs`.

    Returns:
        Weight name -> (S^2, Q), for :func:`.theory.q_star`.

    Raises:
        ValueError: see :func:`inputs`.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, layer: nn.Linear, x: Tensor) -> None:
        if name not in deltas:
            return
        delta, bias = deltas[name].to(x), deltas.get(name[: -len("weight")] + "bias")
        offset = None if bias is None else bias.to(x)
        total = F.linear(x, delta, offset).square().sum()
        energy = F.linear(x.square(), delta.square(), None if offset is None else offset.square())
        pair = torch.stack([total, energy.sum()])
        sums[name] = sums[name] + pair if name in sums else pair
        counts[name] = counts.get(name, 0) + len(x)

    _watch(model, batches, see)
    _checked(sums)
    return {
        name: (float(total) / counts[name], float(energy) / counts[name])
        for name, (total, energy) in sums.items()
    }


def _checked(sums: Mapping[str, Tensor]) -> None:
    if not sums:
        raise ValueError("no linear layer was called: give batches, and a model that has some")
    wrong = [name for name, value in sums.items() if not bool(value.isfinite().all())]
    if wrong:
        raise ValueError(f"the inputs of {wrong[0]!r} are not finite")


def _watch(
    model: nn.Module, batches: Iterable[Any], see: Callable[[str, nn.Linear, Tensor], None]
) -> None:
    """Call the model, and ``see`` with each linear layer's inputs as (samples, n) in float64."""
    with _hooked(model, see), _evaluated(model), torch.no_grad():
        for batch in batches:
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(*batch) if isinstance(batch, tuple | list) else model(batch)


@contextlib.contextmanager
def _hooked(model: nn.Module, see: Callable[[str, nn.Linear, Tensor], None]) -> Iterator[None]:
    def hook(name: str) -> Callable:
        def seen(layer: nn.Linear, args: tuple, output: Any) -> None:
            see(name, layer, args[0].detach().reshape(-1, args[0].shape[-1]).double())

        return seen

    handles = [
        layer.register_forward_hook(hook(f"{name}.weight" if name else "weight"))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
