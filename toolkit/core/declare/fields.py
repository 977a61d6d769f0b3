"""Hyperparameters as annotated fields: a type with its range, and a meaning in the docstring.

A method writes ``rank: Rank = 4`` and, in the ``Args`` of its docstring, what it means and where
the default comes from::

    Args:
        rank: rank r of the difference. Source: official code, examples use 4.

Controls, command line, tables and contract tests all read this.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union


@dataclass(frozen=True)
class Range:
    """Bounds of a number, included unless open; ``log`` where a control should move so."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    open_low: bool = False
    open_high: bool = False


Rank = Annotated[int, Range(1, 256, log=True)]
"""Rank of one layer."""
TotalRank = Annotated[int, Range(1, 100_000)]
"""Ranks of all layers together."""
Steps = Annotated[int, Range(0, 1_000_000)]
"""Optimizer steps, or none."""
Interval = Annotated[int, Range(1, 100_000)]
"""Steps between two times."""
Alpha = Annotated[float, Range(0.0, 1024.0, open_low=True)]
"""Numerator of the scale of a low-rank difference."""
Share = Annotated[float, Range(0.0, 1.0)]
"""A share, its ends included."""
BelowOne = Annotated[float, Range(0.0, 1.0, open_high=True)]
"""A share that is never 1: dropout, or how much a moving average keeps."""
Smoothing = Annotated[float, Range(0.0, 1.0, open_low=True, open_high=True)]
"""How much a moving average keeps, strictly between 0 and 1."""
Weight = Annotated[float, Range(0.0, 10.0)]
"""Weight of a penalty, or the like."""
Like = Literal["paper", "code"]
"""Which of the two to follow where paper and official code differ."""


@dataclass(frozen=True)
class Hyper:
    """One hyperparameter: its type, default, range, meaning and where the default comes from."""

    name: str
    type: type
    default: Any
    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Any, ...] | None = None
    optional: bool = False
    help: str = ""
    source: str = ""
    open_low: bool = False
    open_high: bool = False


class Declared:
    """Base of what declares hyperparameters; a dataclass that inherits it checks its values.

    Raises:
        TypeError, ValueError: a value of the wrong type or outside its range.
    """

    def __post_init__(self) -> None:
        validate(self)


def described(docstring: str | None) -> dict[str, tuple[str, str]]:
    """Name -> (meaning, source) of the entries below ``Args:`` in a docstring.

    An entry's text is one line of meaning, and after ``Source:`` where the default comes from.
    """
    lines = (docstring or "").expandtabs().splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip() == "Args:"), None)
    if start is None:
        return {}
    margin = len(lines[start]) - len(lines[start].lstrip())
    found: dict[str, list[str]] = {}
    name, depth = "", 0
    for line in lines[start + 1 :]:
        indent = len(line) - len(line.lstrip())
        if line.strip() and indent <= margin:
            break
        entry = re.match(r"\s*(\w+): ?(.*)", line)
        if entry and (not name or indent <= depth):
            name, depth = entry[1], indent
            found[name] = [entry[2].strip()]
        elif name:
            found[name].append(line.strip())
    whole = {name: " ".join(part for part in parts if part) for name, parts in found.items()}
    split = {name: text.partition(" Source: ") for name, text in whole.items()}
    return {name: (text.rstrip("."), where.rstrip(".")) for name, (text, _, where) in split.items()}


def read(name: str, hint: Any, default: Any, words: Mapping[str, tuple[str, str]]) -> Hyper:
    """The hyperparameter that an annotation declares.

    Args:
        name: of the field.
        hint: its annotation, evaluated: a type, ``Annotated[type, Range(...)]``, ``Literal``, or
            one of these ``| None``.
        default: its value when the user gives none.
        words: see :func:`described`.

    Raises:
        TypeError: an annotation of another form.
    """
    optional, limits = False, Range()
    if typing.get_origin(hint) in (Union, types.UnionType):
        rest = [part for part in typing.get_args(hint) if part is not type(None)]
        optional = len(rest) < len(typing.get_args(hint))
        if len(rest) != 1:
            raise TypeError(f"{name}: {hint} is more than one type")
        hint = rest[0]
    if typing.get_origin(hint) is Annotated:
        hint, *more = typing.get_args(hint)
        limits = next((m for m in more if isinstance(m, Range)), limits)
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else None
    kind = type(choices[0]) if choices else hint
    if kind not in (int, float, bool, str):
        raise TypeError(f"{name}: a hyperparameter is int, float, bool, str or Literal, not {hint}")
    meaning, source = words.get(name, ("", ""))
    return Hyper(
        name=name, type=kind, default=default, choices=choices, optional=optional,
        help=meaning, source=source, **dataclasses.asdict(limits),
    )  # fmt: skip


@functools.cache
def _declared(cls: type) -> tuple[Hyper, ...]:
    words: dict[str, tuple[str, str]] = {}
    for base in reversed(cls.__mro__):
        words |= described(vars(base).get("__doc__"))
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = (f for f in dataclasses.fields(cls) if f.init)
    return tuple(read(f.name, hints[f.name], f.default, words) for f in fields)


def hyperparameters(method: Any) -> list[Hyper]:
    """The hyperparameters of a method class or instance, in order of declaration."""
    return list(_declared(method if isinstance(method, type) else type(method)))


def validate(method: Any) -> None:
    """Check every hyperparameter of a method instance against its declaration.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value outside its range or choices. Both name the argument and the remedy.
    """
    owner = type(method).__name__
    for h in hyperparameters(method):
        value: Any = getattr(method, h.name)
        where = f"{owner}({h.name}={value!r})"
        if value is None and h.optional:
            continue
        if h.choices is not None:
            if value not in h.choices:
                raise ValueError(f"{where}: {h.name} must be one of {list(h.choices)}")
            continue
        accepted = (int, float) if h.type is float else (h.type,)
        accepts = isinstance(value, accepted)
        if not accepts or (isinstance(value, bool) and h.type is not bool):
            raise TypeError(f"{where}: {h.name} must be {h.type.__name__}")
        if h.type in (int, float):
            _check_range(where, h, value)


def _check_range(where: str, h: Hyper, value: float) -> None:
    low_ok = h.low is None or value > h.low or (value == h.low and not h.open_low)
    high_ok = h.high is None or value < h.high or (value == h.high and not h.open_high)
    if not math.isfinite(value) or not low_ok or not high_ok:
        left, right = ("(" if h.open_low else "["), (")" if h.open_high else "]")
        low = "-inf" if h.low is None else h.low
        high = "inf" if h.high is None else h.high
        raise ValueError(f"{where}: {h.name} must lie in {left}{low}, {high}{right}")
