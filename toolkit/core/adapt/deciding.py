"""Methods that decide over all their layers at once, alone or beside others in one mapping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

from torch import nn

from toolkit.core.adapt import targets as names


def decided(
    method: Any, asked: list[tuple[Any, Any]], model: nn.Module, batches: Any, loss: Any,
    trains: Callable[[str], bool], trained: Set[str],
) -> list[tuple[Any, Any]]:  # fmt: skip
    """What is asked for, each method that decides exchanged for those it decided on.

    It decides over what its own pattern names; what trains anyway is no candidate.

    Args:
        method: what :func:`toolkit.adapt` was given; ``asked`` has its methods and patterns.
        asked: pairs of method and pattern.
        model: plain, or with other methods on other sites.
        batches, loss: data for the decision.
        trains: whether the parameter of a name trains beside the methods.
        trained: modules whose weight does.

    Raises:
        ValueError: two methods want one site: each layer that was decided over is the deciding
            method's, also one that it leaves as it is. Or a method cannot decide.
    """
    whole = getattr(method, "decided", None) if isinstance(method, Mapping) else None
    if whole is not None:
        whole(model)
        return asked
    found: list[tuple[Any, Any]] = []
    plans: dict[int, Any] = {}
    for i, (one, pattern) in enumerate(asked):
        decide = getattr(one, "decided", None)
        plan = None if decide is None else decide(model, pattern, batches, loss, trains)
        if plan is None:
            found.append((one, pattern))
        else:
            plans[i] = plan
            found += [(part, key) for key, part in plan.items()]
    if plans and len(asked) > 1:
        _refuse_shared(model, asked, plans, trained)
    return found


def _refuse_shared(
    model: nn.Module, asked: list[tuple[Any, Any]], plans: Mapping[int, Any], trained: Set[str]
) -> None:
    taken: dict[str, Any] = {}
    for i, (one, pattern) in enumerate(asked):
        if one.info.kinds == ("parameter",):
            continue
        sites = plans[i].sites if i in plans else None
        for name in sites or names.select(model, pattern, one.info.kinds, exclude=trained):
            if name in taken:
                raise both_want(taken[name], one, name)
            taken[name] = one


def both_want(one: Any, other: Any, name: str) -> ValueError:
    """The refusal of a site that two methods are asked to act on."""
    return ValueError(
        f"targets: {type(one).__name__} and {type(other).__name__} both want {name!r}; one site "
        "takes one method, so narrow one of the patterns"
    )
