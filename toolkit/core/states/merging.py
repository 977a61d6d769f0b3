r"""Several models into one, over state dicts, modules or folders, one tensor at a time.

.. math:: \theta = \mathrm{rule}(\theta_P, \theta_1, \ldots, \theta_n; w)

The steps: check all models against each other, decide for each tensor
(:mod:`toolkit.core.states.plan`), let the rule survey what it must know
(:class:`toolkit.core.states.rules.Rule`), merge piece by piece
(:mod:`toolkit.core.states.streams`), write shard by shard (:mod:`toolkit.core.states.written`).
What is in memory at a time is a piece of one tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from toolkit.core.declare.catalogue import entry
from toolkit.core.states.plan import AVERAGE, MERGED, Plan, Targets, planned, short, source_of
from toolkit.core.states.rules import Rule
from toolkit.core.states.stored import Stored, stored
from toolkit.core.states.streams import Stream, finite, working
from toolkit.core.states.written import Folder, Recipe

Source: TypeAlias = str | Path | nn.Module | Mapping[str, Tensor]


def merge(
    base: Source | None,
    models: Iterable[Source],
    rule: Rule | type[Rule] | str,
    *,
    weights: Sequence[float] | None = None,
    targets: Targets = None,
    heads: str | int = "refuse",
    buffers: str | int = "average",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    shard_bytes: int = 1 << 30,
    tokenizer: str = "refuse",
    progress: bool | None = None,
) -> dict[str, Tensor] | Path:
    """Merge models that were trained from one base.

    Args:
        base: what the models were trained from: a state dict, a module, or a folder or file of
            safetensors. None for rules that need none; the first model then says what is what.
        models: the models, in any of these forms.
        rule: how; an instance, its class, or its slug.
        weights: one per model; each rule says what they mean. All 1 if None.
        targets: which tensors take part: name patterns, or a callable (name, fact) -> bool whose
            fact has ``shape`` and ``dtype``. The others stay as in the base. None for every tensor
            of floating point that is no statistic.
        heads: what happens to tensors that not all have, or in other shapes or dtypes: "refuse",
            "base", or the number of the model that gives them (from 1).
        buffers: what happens to running statistics and whole numbers: "average" (whole numbers are
            taken from the first model), "base", or the number of a model. Averaged statistics are
            those of no model: compute them anew on data where they matter.
        dtype: of the result's floating tensors; that of the base if None. The work is done in
            float32 at least.
        seed: of random masks. Each tensor of each model draws from a stream of its own.
        out: a folder that does not exist yet. Its tensors are written as safetensors in shards,
            with configuration and tokenizer of the base and the recipe of the merge. An interrupted
            merge goes on when it is called again.
        shard_bytes: most bytes of a shard; an interrupted merge loses the shard it was at.
        tokenizer: "refuse" models whose tokenizer differs from the base's, or take the "base"'s.
        progress: whether to print the plan and show a bar; None for: when ``out`` is given.

    Returns:
        The merged state dict, or ``out``. Tied tensors of a base in memory stay tied.

    Raises:
        ValueError: models that do not fit each other (all differing tensors are named), a base
            among the models, weights that do not fit, targets that name nothing, numbers that are
            not finite, a tokenizer that differs. Nothing is written then.
        FileNotFoundError, TypeError: see :func:`toolkit.core.states.stored.stored`.
        FileExistsError: ``out`` exists.
        toolkit.core.io.DiskFull: no room; what is written is kept, and the next call goes on.
    """
    rule = _rule(rule)
    given = [*models]
    if not given:
        raise ValueError("models is empty: give at least one")
    others = [stored(model, f"model {i}") for i, model in enumerate(given, 1)]
    start = None if base is None else stored(base, "the base")
    strengths = _checked(rule, start, others, weights)
    if base is not None:
        _no_base_among(base, start, given, others)
    first = others[0] if start is None else start
    plan = planned(first, others, targets=targets, heads=heads, buffers=buffers, dtype=dtype)
    work = _Work(rule, start, others, strengths, seed, plan)
    loud = out is not None if progress is None else progress
    if out is None:
        if loud:
            print(plan)
        return _in_memory(work, loud)
    recipe = Recipe(
        rule=type(rule).info.slug, settings=rule.settings(), weights=list(strengths),
        targets=targets if targets is None or isinstance(targets, str) else _patterns(targets),
        heads=heads, buffers=buffers, dtype=None if dtype is None else short(dtype), seed=seed,
        base=None if base is None else _path(base), models=[_path(one) for one in given],
    )  # fmt: skip
    folder = Folder(Path(out), plan, recipe, first, others, shard_bytes, tokenizer)
    if loud:
        print(plan)
    return folder.fill(work.survey, work.parts, loud)


class _Work:
    """The arithmetic of one merge."""

    def __init__(
        self, rule: Rule, base: Stored | None, models: Sequence[Stored],
        weights: tuple[float, ...], seed: int, plan: Plan,
    ) -> None:  # fmt: skip
        self.rule, self.base, self.models, self.plan = rule, base, models, plan
        names = [name for name in plan.merged if name not in plan.tied]
        self.stream = Stream(base if rule.needs_base else None, models, names, weights, seed)

    def survey(self) -> dict[str, Any]:
        """What the rule must know of the whole model."""
        return dict(self.rule.survey(self.stream)) if self.rule.scope == "model" else {}

    def parts(self, name: str, facts: Mapping[str, Any]) -> Iterator[Tensor]:
        """One tensor of the result, in flat parts that follow each other."""
        fact, how = self.plan.facts[name], self.plan.how[name]
        sources = [self.base or self.models[0], *self.models]
        source = source_of(how)
        if source is not None:
            yield sources[source].read(name).reshape(-1).cpu().to(fact.dtype)
            return
        if how == AVERAGE:
            found = [one.read(name).reshape(-1).cpu() for one in self.models]
            mean = torch.stack([one.to(working(one.dtype)) for one in found]).mean(dim=0)
            yield mean.to(fact.dtype)
            return
        assert how == MERGED
        own = dataclasses.replace(self.stream, names=[name], facts=facts)
        if self.rule.spreads:
            own.checked.add(name)
        if self.rule.scope == "tensor":
            own.facts = self.rule.survey(own)
        for piece in own:
            new = self.rule.merged(piece).to(fact.dtype)
            if not finite(new):
                own.culprit(piece)
                raise ValueError(
                    f"tensor {name!r} of the result is not finite, though those of the models are; "
                    "their numbers are too large for this rule and its settings"
                )
            yield new


def _in_memory(work: _Work, loud: bool) -> dict[str, Tensor]:
    facts: dict[str, Any] = work.survey()
    result: dict[str, Tensor] = {}
    for name in tqdm(work.plan.how, desc="merge", unit="tensor", disable=not loud):
        tied = work.plan.tied.get(name)
        if tied is not None:
            result[name] = result[tied]
            continue
        fact = work.plan.facts[name]
        result[name], start = torch.empty(fact.shape, dtype=fact.dtype), 0
        for part in work.parts(name, facts):
            result[name].view(-1)[start : start + len(part)] = part
            start += len(part)
    return result


def _rule(rule: Any) -> Rule:
    if isinstance(rule, str):
        found = entry(rule).method
        if not (isinstance(found, type) and issubclass(found, Rule)):
            raise ValueError(f"{rule!r} is no rule of merging; see `python -m toolkit list`")
        rule = found
    if isinstance(rule, type) and issubclass(rule, Rule):
        rule = rule()
    if not isinstance(rule, Rule):
        raise TypeError(f"rule is a {type(rule).__name__}: give a rule, its class or its slug")
    return rule


def _checked(
    rule: Rule, base: Stored | None, models: Sequence[Stored], weights: Sequence[float] | None
) -> tuple[float, ...]:
    """The weights as numbers."""
    name = type(rule).__name__
    if rule.needs_base and base is None:
        raise ValueError(f"{name} merges differences from a base: give base")
    if rule.models is not None and len(models) != rule.models:
        raise ValueError(f"{name} takes {rule.models} models, not {len(models)}")
    strengths = tuple(float(w) for w in weights) if weights is not None else (1.0,) * len(models)
    if len(strengths) != len(models):
        raise ValueError(f"weights has {len(strengths)} numbers for {len(models)} models")
    if not all(map(math.isfinite, strengths)):
        raise ValueError(f"weights={list(strengths)}: each must be finite")
    rule.check(strengths)
    return strengths


def _patterns(targets: Any) -> Any:
    return "a function" if callable(targets) else list(targets)


def _path(source: Source) -> str | None:
    return str(source) if isinstance(source, (str, Path)) else None


def _no_base_among(
    base: Source, start: Stored | None, given: Sequence[Source], models: Sequence[Stored]
) -> None:
    for one, model in zip(given, models, strict=True):
        twin = one is base
        if start is not None and start.folder is not None and model.folder is not None:
            twin = twin or start.folder.resolve() == model.folder.resolve()
        if twin or (start is not None and _equal(start, model)):
            raise ValueError(f"{model.label} is the base itself; it has no difference to merge")


def _equal(one: Stored, other: Stored) -> bool:
    """Whether two models hold the same numbers; looked at until the first tensor that differs."""
    if one.facts != other.facts:
        return False
    return all(torch.equal(one.read(name), other.read(name)) for name in one.facts)
