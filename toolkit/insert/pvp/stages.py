"""The two stages: train modules on a source with the backbone frozen, then start a task there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.handles import same
from toolkit.core.adapt.model import Adapted
from toolkit.core.adapt.put import adapt
from toolkit.core.adapt.sites import kind_of
from toolkit.insert.pvp.modules import Modules, start_from


def fresh_head(
    model: nn.Module,
    classes: int,
    head: str = "head",
    generator: torch.Generator | None = None,
    zeros: bool = False,
) -> nn.Module:
    r"""Put a new linear layer with so many outputs in the place of a model's head.

    Weight and bias are drawn from :math:`U(-1/\sqrt d, 1/\sqrt d)`, d inputs.

    Args:
        model: changed in place, at this one layer.
        classes: C, at least 2.
        head: name of the layer.
        generator: source of the draw.
        zeros: start at 0 instead.

    Returns:
        The old head.

    Raises:
        ValueError: fewer than two classes, or no layer of that name; the linear ones are listed.
        TypeError: that layer is not linear.
    """
    old = _head(model, head)
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
        raise ValueError(f"classes={classes!r}: a head tells 2 or more classes apart")
    weight, biased = old.weight, getattr(old, "bias", None) is not None
    made = nn.Linear(weight.shape[1], classes, bias=biased)  # drawn anew just below
    where = generator.device if generator is not None else "cpu"
    bound = 0.0 if zeros else 1 / math.sqrt(weight.shape[1])
    with torch.no_grad():
        for parameter in made.parameters():
            draw = torch.empty(parameter.shape, device=where)
            parameter.copy_(draw.uniform_(-bound, bound, generator=generator))
    put_head(model, made.to(weight.device, weight.dtype).train(old.training), head)
    return old


def put_head(model: nn.Module, layer: nn.Module, head: str) -> None:
    """Put a layer in a head's place."""
    *path, leaf = head.split(".")
    parent = model.get_submodule(".".join(path))
    parent._modules[leaf] = layer


def _head(model: nn.Module, head: str) -> nn.Module:
    try:
        found = model.get_submodule(head)
    except AttributeError:
        linear = [name for name, module in model.named_modules() if kind_of(module) == "linear"]
        raise ValueError(
            f"head={head!r}: the model has no such layer; its last linear ones are "
            f"{', '.join(linear[-4:]) or 'none'}"
        ) from None
    if kind_of(found) != "linear":
        raise TypeError(
            f"head={head!r} is a {type(found).__name__}; name the linear layer whose outputs are "
            "the classes"
        )
    return found


def pretrain(
    model: nn.Module,
    method: Any,
    targets: Any = None,
    *,
    classes: int,
    loop: Callable[[Adapted], object],
    head: str = "head",
    generator: torch.Generator | None = None,
) -> Modules:
    """Stage 1: train modules, and a head that is thrown away, on a source.

    The model has its own head, weights and flags back afterwards, also if the loop fails.

    Args:
        model: pre-trained.
        method: prompts, LoRA or any other, with their targets, as :func:`toolkit.adapt` takes them.
        classes: of the source.
        loop: trains ``adapted.parameters()`` by any means: called with the handle, whose ``model``
            has the new head.
        head: name of the head.
        generator: of the head's start, then the modules'.

    Returns:
        The trained modules.

    Raises:
        RuntimeError: the loop moved a number of the backbone, such as the running statistics of a
            normalisation; it is named.
        ValueError, TypeError: as :func:`fresh_head` and :func:`toolkit.adapt`.
    """
    modes = [(module, module.training) for module in model.modules()]
    old = fresh_head(model, classes, head, generator)
    flags = [(p, p.requires_grad) for p in old.parameters()]
    adapted = None
    try:
        adapted = adapt(model, method, targets, train=f"{head}.*", generator=generator)
        frozen = _frozen(adapted, head)
        loop(adapted)
        _refuse_moved(frozen, _frozen(adapted, head, copy=False))
        return Modules.of(adapted)
    finally:
        if adapted is not None and adapted.state == "adapted":
            adapted.unload()
        put_head(model, old, head)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def downstream(
    model: nn.Module,
    method: Any,
    targets: Any = None,
    source: Any = None,
    *,
    classes: int,
    head: str = "head",
    t: float = 1.0,
    generator: torch.Generator | None = None,
) -> Adapted:
    """Stage 2, before its first step: a fresh head, and modules that start from pre-trained ones.

    Args:
        model: as stage 1 had it.
        method, targets: as in stage 1.
        source: :class:`~toolkit.insert.pvp.modules.Modules` or a file; None keeps the random start.
        classes: of the task.
        head: name of the head.
        t: see :func:`~toolkit.insert.pvp.modules.start_from`.
        generator: of the head's start, then the modules': a generator in the same state gives the
            same head to every method and start.

    Returns:
        The handle; train ``adapted.parameters()``, which holds the head.

    Raises:
        RuntimeError, TypeError, ValueError: see :func:`fresh_head`, :func:`toolkit.adapt` and
            :func:`~toolkit.insert.pvp.modules.start_from`. The model is then as it was.
    """
    old = fresh_head(model, classes, head, generator)
    adapted = None
    try:
        adapted = adapt(model, method, targets, train=f"{head}.*", generator=generator)
        return adapted if source is None else start_from(adapted, source, t)
    except BaseException:
        if adapted is not None:
            adapted.unload()
        put_head(model, old, head)
        raise


def _frozen(adapted: Adapted, head: str, copy: bool = True) -> dict[str, Tensor]:
    """The numbers of the base that must not move, by name."""
    ours = {id(p) for p in adapted.parameters()}
    inner = {id(b) for layer in adapted.adapters.values() for b in layer.buffers()}
    found: dict[str, Tensor] = dict(adapted.model.named_parameters())
    found |= {name: b for name, b in adapted.model.named_buffers() if id(b) not in inner}
    return {
        name: value.detach().clone() if copy else value
        for name, value in found.items()
        if id(value) not in ours and not name.startswith(f"{head}.")
    }


def _refuse_moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    moved = [name for name in before if name not in after or not same(before[name], after[name])]
    if moved:
        names = ", ".join(name.replace(".base.", ".") for name in moved[:3])
        raise RuntimeError(
            f"loop: it moved {len(moved)} frozen tensors of the backbone ({names}); train "
            "adapted.parameters() alone, and keep normalisations with running statistics in eval()"
        )
