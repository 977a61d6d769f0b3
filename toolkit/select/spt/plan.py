"""A plan: which method goes where on one model, as :func:`toolkit.adapt` takes it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pandas as pd
from torch import Tensor, nn

from toolkit.core.adapt import sites
from toolkit.core.adapt.load import among
from toolkit.core.adapt.put import refuse_busy, trained_beside
from toolkit.core.adapt.targets import left_out, select
from toolkit.core.baselines.bitfit import Train
from toolkit.core.states.deltas import fingerprint
from toolkit.select.spt.allocation import Allocation, allocate
from toolkit.select.spt.entries import PARAMETERS, SPTEntries
from toolkit.select.spt.sensitivity import sensitivity
from toolkit.select.spt.structured import SPTAdapter

KINDS = ("linear", "hf_conv1d", "norm")


class Plan(Mapping[Any, Any]):
    """Methods by the layers they go to: ``adapt(model, plan)``.

    Attributes:
        allocation: the decisions, by parameter.
        counted: numbers in the budget that train in any case.
        scores: the sensitivities, by parameter.
        left_out: modules that hold a matrix and are no candidates, with the reason: an attention
            that keeps q, k and v in one matrix would be decided as one, so give it three.
        bases: hash of each candidate, by parameter: the plan is for these weights alone.
    """

    def __init__(
        self,
        methods: Mapping[Any, Any],
        allocation: Allocation,
        counted: int,
        scores: Mapping[str, Tensor],
        left_out: Mapping[str, str],
        bases: Mapping[str, str],
    ):
        self._methods = dict(methods)
        self.allocation, self.counted, self.scores = allocation, counted, dict(scores)
        self.left_out, self.bases = dict(left_out), dict(bases)

    def decided(self, model: nn.Module, *_: Any) -> None:
        """Nothing more: what goes where is in the plan, if the model is the one it is for.

        Raises:
            ValueError: a candidate is missing, or is not the tensor that was scored; the message
                has both hashes.
        """
        own = dict(model.named_parameters())
        for name, base in self.bases.items():
            found = fingerprint(own[name]) if name in own else "missing"
            if found != base:
                raise ValueError(
                    f"{name!r} is not the base of this plan: its hash is {found}, the plan was "
                    f"made on {base}; plan on the weights that are adapted"
                )

    def __getitem__(self, key: Any) -> Any:
        return self._methods[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)

    @property
    def sites(self) -> list[str]:
        """Names of the modules that were decided over, in the model's order."""
        return [*dict.fromkeys(name.rpartition(".")[0] for name in self.bases)]

    @property
    def total(self) -> int:
        """Numbers that train, with what is counted in any case."""
        return self.allocation.total

    def table(self) -> pd.DataFrame:
        """One row per candidate: its numbers, how many are marked, its form and its cost."""
        sizes = self.allocation.ranking.sizes
        rows = [
            {"parameter": name, "numbers": sizes[name], **dataclasses.asdict(decision)}
            for name, decision in self.allocation.decisions.items()
        ]
        return pd.DataFrame(rows)


def make(
    method: Any,
    model: nn.Module,
    batches: Iterable[Any] | None,
    loss: Callable[[nn.Module, Any], Tensor] | None,
    targets: Any,
    train: Any,
    counted: Any,
    scores: Mapping[str, Tensor] | None,
) -> Plan:
    """The plan of :meth:`toolkit.select.spt.SPT.plan`, which says what these are."""
    refuse_busy(model)
    beside = trained_beside(model, counted)
    trains = {**trained_beside(model, train), **beside}
    found = candidates(model, targets, trains)
    taken = found.keys() | _holders(model, trains)
    passed = left_out(dict(model.named_modules()), targets, KINDS, taken)
    still = {id(p) for p in trains.values()}
    shapes = {}
    for name, site in found.items():
        _refuse_rank(method, site)
        for key in PARAMETERS:
            own = model.get_submodule(name)._parameters.get(key)
            if own is not None and id(own) not in still:
                matrix = key == "weight" and site.kind != "norm"
                shapes[f"{name}.{key}"] = (site.rows, site.cols) if matrix else (site.rows,)
    if scores is None:
        if batches is None or loss is None:
            raise ValueError(
                "SPT's budget needs data to score the weights on: give batches and loss, where "
                "loss(model, batch) is a scalar, or scores"
            )
        scores = sensitivity(
            model, shapes, batches, loss, method.passes, training=method.like == "code"
        )
    if missing := [n for n in shapes if n not in scores]:
        raise ValueError(f"scores: none for {missing[0]!r}, which is a candidate")
    scores = {n: scores[n] for n in shapes}
    for name, score in scores.items():
        if score.shape != model.get_parameter(name).shape:
            raise ValueError(
                f"scores of {name!r} have shape {tuple(score.shape)}, the parameter "
                f"{tuple(model.get_parameter(name).shape)}"
            )
    fixed = sum(p.numel() for p in beside.values())
    allocation = allocate(method, scores, fixed, shapes)
    methods = placed(method, allocation)
    if beside:
        methods[frozenset(beside).__contains__] = Train()
    bases = {name: fingerprint(model.get_parameter(name)) for name in shapes}
    return Plan(methods, allocation, fixed, scores, passed, bases)


def placed(method: Any, allocation: Allocation) -> dict[Any, Any]:
    """Targets -> method, for the decisions of an allocation; each form once."""
    forms: dict[str, dict[str, dict[str, Tensor]]] = {}
    structured = {
        name.rpartition(".")[0]: decision.form
        for name, decision in allocation.decisions.items()
        if decision.form in ("lora", "adapter")
    }
    for name, form in structured.items():
        forms.setdefault(form, {})[name] = {}
    for name in allocation.decisions:
        layer, _, key = name.rpartition(".")
        index = allocation.index(name)
        if len(index):
            form = structured.get(layer, "entries")
            forms.setdefault(form, {}).setdefault(layer, {})[key] = index
    kinds = {
        "lora": dataclasses.replace(method, budget=None),
        "adapter": SPTAdapter(method.rank, method.dropout, method.drop_path),
        "entries": SPTEntries(),
    }
    found = {}
    for form, moving in forms.items():
        one = copy.copy(kinds[form])
        object.__setattr__(one, "moving", moving)  # which entries, beside the hyperparameters
        found[among(frozenset(moving))] = one
    return found


def candidates(
    model: nn.Module, targets: Any, beside: Mapping[str, nn.Parameter]
) -> dict[str, sites.Site]:
    """The sites whose weights and biases may move, by name, in the model's order.

    Args:
        model: plain.
        targets: see :func:`toolkit.adapt`; None takes every linear layer and norm.
        beside: parameters that train anyway; modules that hold one as their weight are left out.

    Raises:
        ValueError: nothing is left, or a candidate shares a tensor with another module.
    """
    wanted = _every if targets is None else targets
    layers = select(model, wanted, KINDS, exclude=_holders(model, beside) - {""})
    uses: dict[int, int] = {}
    for module in model.modules():
        for p in sites.own_parameters(module).values():
            uses[id(p)] = uses.get(id(p), 0) + 1
    for name, layer in layers.items():
        if any(uses[id(p)] > 1 for p in layer._parameters.values() if p is not None):
            raise ValueError(
                f"layer {name!r} shares a tensor with another module, so no choice of its entries "
                "is its own; untie them, or leave the layer out of targets"
            )
    return {name: sites.site_of(layer, name, KINDS) for name, layer in layers.items()}


def _holders(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """Names of the modules that hold one of these parameters as their weight."""
    wanted = {id(p) for p in parameters.values()}
    return {
        name
        for name, module in model.named_modules()
        if id(sites.own_parameters(module).get("weight")) in wanted
    }


def _every(name: str, module: nn.Module) -> bool:
    return sites.fits(module, KINDS)


def _refuse_rank(method: Any, site: sites.Site) -> None:
    most = site.rows if method.structured == "adapter" else min(site.rows, site.cols)
    if site.kind != "norm" and method.half != "entries" and method.rank >= most:
        raise ValueError(
            f"rank={method.rank}: layer {site.name!r} is {site.rows} x {site.cols}, so a module of "
            f"that rank is no smaller; take a rank below {most}, or leave the layer out of targets"
        )
