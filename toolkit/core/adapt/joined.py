r"""Saved adapters of one base, merged by any rule or joined to one adapter without forming weights.

A rule that is linear in the task vectors adds factors up,

.. math:: \sum_i c_i s_i B_i A_i = [\,c_1 s_1 B_1 \;\cdots\; c_n s_n B_n\,]\,[A_1; \ldots; A_n],

so the result is a low-rank adapter again. Other rules look at single entries of the differences:
these are formed one tensor at a time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt import handles
from toolkit.core.adapt.from_peft import load_peft
from toolkit.core.adapt.load import among, load, put
from toolkit.core.adapt.lowrank import LowRankLayer
from toolkit.core.adapt.model import Adapted
from toolkit.core.adapt.sites import Site
from toolkit.core.declare.catalogue import entry
from toolkit.core.states.merging import merge
from toolkit.core.states.stored import Fact, Stored


@dataclass
class _Taken:
    """What one saved adapter holds, off the model."""

    label: str
    layers: dict[str, tuple[Any, nn.Module, Site]]
    beside: dict[str, Tensor]
    buffers: dict[str, Tensor]


def merge_adapters(
    model: nn.Module, adapters: Iterable[str | Path], rule: Any, **options: Any
) -> dict[str, Tensor] | Path:
    """Merge saved adapters into the weights of their base, by any rule.

    Args:
        model: the plain base; it stays as it is.
        adapters: files of :meth:`toolkit.Adapted.save`, or folders of peft.
        rule: as in :func:`toolkit.core.states.merging.merge`.
        options: of that function.

    Returns:
        The merged state dict of the base, or ``out`` where that is among the options.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: see :func:`toolkit.load`,
            :func:`toolkit.load_peft` and :func:`~toolkit.core.states.merging.merge`.
    """
    base = {name: value.detach() for name, value in model.state_dict(keep_vars=True).items()}
    models: list[Any] = [_as_model(base, one) for one in _taken(model, adapters)]
    return merge(model, models, rule, **options)


@torch.no_grad()
def join_adapters(
    model: nn.Module, adapters: Iterable[str | Path], weights: Sequence[float] | None = None
) -> Adapted:
    """Put the weighted sum of saved low-rank adapters on their base, as one low-rank adapter.

    Args:
        model: the plain base; adapted in place.
        adapters: files of :meth:`toolkit.Adapted.save`, or folders of peft.
        weights: factor c of each; all 1 if None. Parameters trained beside an adapter move by the
            same factor.

    Returns:
        The model with a LoRA whose rank in each layer is the sum of the adapters'.

    Warns:
        UserWarning: buffers changed with the adapters, which cannot be added up: they stay.

    Raises:
        ValueError: no adapter; weights that do not fit; an adapter that is no product of factors,
            which :func:`merge_adapters` takes. The model is then as it was.
    """
    taken = _taken(model, adapters)
    factors = [1.0] * len(taken) if weights is None else [float(w) for w in weights]
    if not taken or len(factors) != len(taken) or not all(map(math.isfinite, factors)):
        raise ValueError(
            f"weights={weights}: give a finite number for each of {len(taken)} adapters"
        )
    left: dict[str, list[Tensor]] = {}
    right: dict[str, list[Tensor]] = {}
    for one, factor in zip(taken, factors, strict=True):
        for name, (adapter, _, _) in one.layers.items():
            if not isinstance(adapter, LowRankLayer):
                raise ValueError(
                    f"{one.label}: its change of {name!r} is no product of factors; use "
                    "merge_adapters, which forms the weights"
                )
            B, A = adapter.factors()
            left.setdefault(name, []).append(factor * adapter.scale * B)
            right.setdefault(name, []).append(A)
    by_rank: dict[int, list[str]] = {}
    for name, parts in left.items():
        by_rank.setdefault(sum(part.shape[1] for part in parts), []).append(name)
    cls: Any = entry("lora").method
    wanted = {among(frozenset(n)): cls(rank=r, alpha=float(r)) for r, n in by_rank.items()}
    beside = {name for one in taken for name in one.beside}
    start = {name: model.get_parameter(name).clone() for name in beside}
    adapted = put(model, wanted, beside, "the joined adapters")
    for name, placed in adapted.sites.items():
        placed.layer.adapter.B.copy_(torch.cat(left[name], dim=1))
        placed.layer.adapter.A.copy_(torch.cat(right[name], dim=0))
    for one, factor in zip(taken, factors, strict=True):
        for name, value in one.beside.items():
            model.get_parameter(name).add_(value - start[name], alpha=factor)
    _put_buffers(model, taken, factors)
    return adapted


def _put_buffers(model: nn.Module, taken: list[_Taken], factors: Sequence[float]) -> None:
    """The buffers of a lone adapter; those of several cannot be added up."""
    if len(taken) == 1 and factors[0] == 1:
        handles.put_buffers(model, taken[0].buffers)
        return
    changed = sorted({name for one in taken for name in one.buffers})
    if changed:
        warnings.warn(
            f"buffers {changed[:3]}{' ...' if len(changed) > 3 else ''} changed while the adapters "
            "were trained, as running statistics do, and stay those of the base; estimate them "
            "anew by forward passes in train() mode",
            stacklevel=3,
        )


@torch.no_grad()
def _taken(model: nn.Module, adapters: Iterable[str | Path]) -> list[_Taken]:
    """What each file holds; each is put on the model and taken off again."""
    found = []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for path in map(Path, adapters):
        adapted = load_peft(model, path) if path.is_dir() else load(model, path)
        layers = {
            name: (placed.layer.adapter, placed.layer.base, placed.site)
            for name, placed in adapted.sites.items()
        }
        beside = {name: value.detach().clone() for name, value in adapted.extra.items()}
        buffers = {name: b.detach().clone() for name, b in adapted.changed_buffers().items()}
        adapted.unload()
        for name in beside:
            model.get_parameter(name).copy_(before[name])
        found.append(_Taken(str(path), layers, beside, buffers))
    return found


def _as_model(base: dict[str, Tensor], taken: _Taken) -> Stored:
    """A base with an adapter as named tensors, each formed when it is read."""
    places = {
        f"{name}.{site.parameter}": (adapter, module)
        for name, (adapter, module, site) in taken.layers.items()
    }

    @torch.no_grad()
    def read(name: str) -> Tensor:
        if name in places:
            adapter, module = places[name]
            return adapter.merged(module)[name.rpartition(".")[2]]
        return (taken.beside | taken.buffers).get(name, base[name])

    facts = {name: Fact(tuple(value.shape), value.dtype) for name, value in base.items()}
    return Stored(taken.label, facts, read)
