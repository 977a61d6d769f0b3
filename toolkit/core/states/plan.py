"""What is done with each tensor when models are merged, decided and checked before any work."""

from __future__ import annotations

import collections
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from toolkit.core.states.stored import Fact, Stored

STATISTICS = ("*running_mean", "*running_var", "*num_batches_tracked")
MERGED = "merged by the rule"
AVERAGE = "mean of the models"
BASE = "as in the base"
MODEL = "as in model {}"

Targets = str | Iterable[str] | Callable[[str, Fact], bool] | None


@dataclass(frozen=True)
class Plan:
    """What becomes of each tensor.

    Attributes:
        how: name -> one of the words of this module.
        facts: name -> shape and dtype of the result.
        tied: name -> the name whose memory it shares.
    """

    how: Mapping[str, str]
    facts: Mapping[str, Fact]
    tied: Mapping[str, str]

    @property
    def merged(self) -> list[str]:
        return [name for name, how in self.how.items() if how == MERGED]

    def __str__(self) -> str:
        """A line per kind of treatment: how many tensors and numbers, and the first names."""
        kinds = collections.defaultdict(list)
        for name, how in self.how.items():
            kinds[how].append(name)
        lines = []
        for how, names in kinds.items():
            numbers = sum(self.facts[name].count for name in names)
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            lines.append(f"{how:20} {len(names):5} tensors {numbers:13,} numbers  {shown}")
        return "\n".join(lines)


def planned(
    base: Stored,
    models: Sequence[Stored],
    *,
    targets: Targets = None,
    heads: str | int = "refuse",
    buffers: str | int = "average",
    dtype: torch.dtype | None = None,
) -> Plan:
    """Decide for each tensor; see :func:`toolkit.core.states.merging.merge` for the arguments.

    Raises:
        ValueError: names, shapes or dtypes that differ, all of them named; targets that name
            nothing; a policy that cannot be followed.
    """
    for name, policy, words in (("heads", heads, ("refuse", "base")),
                                ("buffers", buffers, ("average", "base"))):  # fmt: skip
        inside = isinstance(policy, int) and not isinstance(policy, bool)
        if policy not in words and not (inside and 1 <= int(policy) <= len(models)):
            raise ValueError(
                f"{name}={policy!r}: write one of {list(words)}, or the number of a model, "
                f"1 to {len(models)}"
            )
    chosen = _predicate(targets)
    names = {name: None for source in (base, *models) for name in source.facts}
    known = frozenset().union(*(source.buffers for source in (base, *models)))
    how, facts, wrong = {}, {}, []
    for name in names:
        found = [source.facts.get(name) for source in (base, *models)]
        apart = _apart(name, found, base, models)
        if apart and heads == "refuse":
            wrong.append(apart)
            continue
        if apart:
            source = 0 if heads == "base" else int(heads)
            if found[source] is None:
                continue  # the source of the heads has no such tensor, so the result has none
            how[name], facts[name] = _word(source), found[source]
            continue
        fact = facts[name] = found[0]
        assert fact is not None
        if not fact.dtype.is_floating_point or _statistic(name, known):
            how[name] = _buffer(fact, buffers, len(models))
        else:
            how[name] = MERGED if chosen(name, fact) else BASE
    if wrong:
        listed = "\n  ".join(wrong)
        raise ValueError(
            f"the models differ in {len(wrong)} tensors; leave them to one model with heads=, or "
            f"give models of one architecture:\n  {listed}"
        )
    if MERGED not in how.values():
        raise ValueError(f"targets={targets!r} names no tensor of numbers that all models share")
    if dtype is not None:
        facts = {
            name: Fact(fact.shape, dtype if fact.dtype.is_floating_point else fact.dtype)
            for name, fact in facts.items()
        }
    tied = {name: other for name, other in base.same.items() if name in how and other in how}
    return Plan(how, facts, tied)


def _predicate(targets: Targets) -> Callable[[str, Fact], bool]:
    if targets is None:
        return lambda name, fact: True
    if callable(targets):
        return targets
    patterns = [targets] if isinstance(targets, str) else list(targets)
    return lambda name, fact: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _apart(name: str, found: list[Any], base: Stored, models: Sequence[Stored]) -> str:
    """How a tensor differs between the models, in words; nothing if it does not."""
    kinds = collections.defaultdict(list)
    for source, fact in zip((base, *models), found, strict=True):
        kinds[fact].append(source.label)
    if len(kinds) == 1:
        return ""
    words = []
    for fact, labels in kinds.items():
        what = "missing" if fact is None else f"{tuple(fact.shape)} {short(fact.dtype)}"
        words.append(f"{what} in {', '.join(labels)}")
    return f"{name}: {'; '.join(words)}"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _statistic(name: str, known: frozenset[str]) -> bool:
    return name in known or any(fnmatch.fnmatchcase(name, pattern) for pattern in STATISTICS)


def _buffer(fact: Fact, policy: str | int, models: int) -> str:
    if policy == "average":
        # a mean of whole numbers is none: counters and tables are taken from the first model
        return AVERAGE if fact.dtype.is_floating_point and models > 1 else _word(1)
    return _word(0 if policy == "base" else int(policy))


def _word(source: int) -> str:
    return BASE if source == 0 else MODEL.format(source)


def source_of(how: str) -> int | None:
    """The number of the model a tensor is copied from, 0 for the base; None if it is computed."""
    if how == BASE:
        return 0
    return int(how.rpartition(" ")[2]) if how.startswith("as in model") else None
