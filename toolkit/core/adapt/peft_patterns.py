"""Layers of a peft folder that have a rank or a scale of their own, by patterns of their names."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

PATTERNS = {"rank_pattern": "rank", "alpha_pattern": "alpha"}
"""Their configuration field -> our hyperparameter that it gives single layers."""


def one_method(adapted: Any) -> Any:
    """The method of the first site, to which those of others are told by patterns.

    Raises:
        TypeError: they differ in what peft has no patterns for.
    """
    first, *rest = [placed.method for placed in adapted.sites.values()] or adapted.methods
    for other in (m for m in rest if m != first):
        ranked = {ours: getattr(first, ours) for ours in PATTERNS.values() if hasattr(first, ours)}
        if type(other) is not type(first) or dataclasses.replace(other, **ranked) != first:
            raise TypeError(
                f"a peft folder holds one method, and {first} and {other} differ in more than rank "
                "and alpha; save() keeps them all"
            )
        if getattr(first, "peft", None) is not None and first.peft.kind != "LORA":
            raise TypeError(f"peft has one rank and alpha for all layers of {first.info.title}")
    return first


def patterns(adapted: Any, method: Any) -> dict[str, Any]:
    """The ranks and scales of layers that differ from the first one's."""
    found: dict[str, Any] = {}
    for name, placed in adapted.sites.items():
        # a name may be the end of another layer's
        start = "^" if any(other.endswith(f".{name}") for other in adapted.sites) else ""
        for theirs, ours in PATTERNS.items():
            value = getattr(placed.method, ours, None)
            if value != getattr(method, ours, None):
                found.setdefault(theirs, {})[start + re.escape(name)] = value
    return found


def kept_ranks(adapted: Any, names: Any) -> dict[str, Any]:
    """Which of the initial ranks each layer kept, for layers that were made smaller."""
    if not names.ranks:
        return {}
    pattern = {}
    for name, placed in adapted.sites.items():
        kept = getattr(placed.layer.adapter, names.ranks).shape[0]
        rank = placed.method.rank
        if kept < rank:
            stored = names.names(placed.site.kind)[names.ranks]
            pattern[f"{name}.{stored}"] = [i < kept for i in range(rank)]
    return {"rank_pattern": pattern or None}


def by_pattern(where: str, patterns: Any, name: str) -> Any:
    """What the first pattern that a layer's name ends in gives it, as peft matches, or None.

    Args:
        where: folder and field, for messages.
        patterns: as they were read.
        name: the layer's.

    Raises:
        ValueError: they are no patterns.
    """
    if not isinstance(patterns, dict):
        raise ValueError(f"{where}={patterns!r} is no object")
    for pattern, value in patterns.items():
        try:
            hit = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error as error:
            raise ValueError(f"{where}: {pattern!r}: {error}") from error
        if hit:
            if value is None:
                raise ValueError(f"{where} gives {pattern!r} no number")
            return value
    return None
