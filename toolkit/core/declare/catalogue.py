"""The catalogue: one entry per method, discovered from the parts and never listed twice.

It is read from the methods' source text, so that listing them imports none and one that is broken
breaks no other.

A method is a frozen dataclass with a class attribute ``info`` (an :class:`Info`) whose fields are
declared with :func:`hyper`. The map, the command line, the live controls and the contract tests
all read what is declared here.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import math
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from toolkit.core.declare import source as declared

PARTS = (
    "lowrank",
    "reparam",
    "select",
    "insert",
    "merge",
    "diagnose",
    "learn",
    "generate",
    "control",
)


@dataclass(frozen=True, kw_only=True)
class Info:
    """What a method is, in facts that the book prints and the contract tests check.

    Args:
        slug: short name, the same for module, chapter and test.
        part: one of :data:`PARTS`.
        title: the method's name as the field writes it.
        arxiv: arXiv identifier of the paper.
        year: year of the paper's first version.
        code: ``owner/name`` of the official repository, or None.
        equation: the method in one line of LaTeX.
        acts_on: what moves, in a few words.
        count: LaTeX formula of the numbers trained per layer of shape m x n.
        inference: extra work at inference, in a few words.
        colour: hex colour of the method in every figure of the book.
        zero_init: whether the adapted model equals its base before training.
        mergeable: whether the result is a plain weight again.
        kinds: layer kinds it accepts, of ``toolkit.core.adapt.sites.KINDS``.
        init_tolerance: largest relative output change at initialisation, 0 when it is exact.
        init_reason: why ``init_tolerance`` is not 0.
    """

    slug: str
    part: str
    title: str
    arxiv: str
    year: int
    equation: str
    acts_on: str
    count: str
    inference: str
    colour: str
    code: str | None = None
    zero_init: bool = True
    mergeable: bool = True
    kinds: tuple[str, ...] = ()
    init_tolerance: float = 0.0
    init_reason: str = ""


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


def hyper(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    log: bool = False,
    choices: Sequence[Any] | None = None,
    type: type | None = None,
    help: str = "",
    source: str = "",
    open_low: bool = False,
    open_high: bool = False,
) -> Any:
    """Declare a hyperparameter as a dataclass field.

    Args:
        default: its value when the user gives none.
        low, high: bounds, included unless ``open_low`` / ``open_high``.
        log: whether a control should move on a logarithmic scale.
        choices: the allowed values, instead of a range.
        type: needed only when the default is None.
        help: one line of meaning, with the unit.
        source: where the default comes from.
    """
    kind = type if type is not None else default.__class__
    facts = Hyper(
        name="",
        type=kind,
        default=default,
        low=low,
        high=high,
        log=log,
        choices=tuple(choices) if choices is not None else None,
        optional=default is None,
        help=help,
        source=source,
        open_low=open_low,
        open_high=open_high,
    )
    return field(default=default, metadata={"hyper": facts})


def hyperparameters(method: Any) -> list[Hyper]:
    """The hyperparameters of a method class or instance, in order of declaration."""
    return [
        dataclasses.replace(f.metadata["hyper"], name=f.name)
        for f in dataclasses.fields(method)
        if "hyper" in f.metadata
    ]


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


@dataclass(frozen=True)
class Entry:
    """A method as the catalogue holds it; every field of its :class:`Info` is an attribute.

    Made from the method's source text, so that nothing is imported until :attr:`method` is asked
    for.

    Attributes:
        module: dotted name of the module that defines the method.
        class_name: name of the method's class.
        info: what the class declares.
    """

    module: str
    class_name: str
    info: Info
    _hyperparameters: tuple[Hyper, ...]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.info, name)

    @functools.cached_property
    def method(self) -> type:
        """The method's class; its module is imported now.

        Raises:
            Exception: whatever importing the module raises. An AttributeError becomes an
                ImportError, which ``from toolkit import`` does not hide.
        """
        try:
            return getattr(importlib.import_module(self.module), self.class_name)
        except AttributeError as error:
            raise ImportError(f"{self.module} cannot be imported: {error}") from error

    @property
    def hyperparameters(self) -> list[Hyper]:
        """The hyperparameters, in order of declaration."""
        return list(self._hyperparameters)

    @property
    def chapter(self) -> str:
        """Path of the chapter's recorded notebook, from the book's folder, without suffix."""
        return f"notebooks/{self.part}/{self.slug}"


def _modules() -> list[str]:
    names = []
    for part in PARTS:
        found = importlib.util.find_spec(f"toolkit.{part}")
        if found is None or found.submodule_search_locations is None:
            continue
        for module in pkgutil.iter_modules(found.submodule_search_locations):
            if not module.name.startswith("_"):
                names.append(f"toolkit.{part}.{module.name}")
    return names


def _read(module: str) -> list[Entry]:
    """The methods of one module: from its source text, or by importing it where that is no use."""
    try:
        entries = []
        for found in declared.declared(module):
            hypers = tuple(
                dataclasses.replace(hyper(*given, **named).metadata["hyper"], name=name)
                for name, (given, named) in found.fields.items()
            )
            entries.append(Entry(module, found.name, Info(**found.info), hypers))
        return entries
    except declared.Unreadable:
        return [
            Entry(module, name, vars(value)["info"], tuple(hyperparameters(value)))
            for name, value in vars(importlib.import_module(module)).items()
            if isinstance(value, type)
            and value.__module__ == module
            and isinstance(vars(value).get("info"), Info)
        ]


@functools.cache
def _found() -> tuple[tuple[Entry, ...], dict[str, Exception]]:
    """Every method that can be read, and the modules that cannot with their errors."""
    entries: list[Entry] = []
    damaged: dict[str, Exception] = {}
    for name in _modules():
        try:
            entries += _read(name)
        except Exception as error:  # of that module's own code; kept, and told by whoever asks
            damaged[name] = error
    entries.sort(key=lambda e: (PARTS.index(e.part), e.year, e.slug))
    slugs = [e.slug for e in entries]
    doubled = {s for s in slugs if slugs.count(s) > 1}
    if doubled:
        raise RuntimeError(f"two methods declare the same slug: {sorted(doubled)}")
    return tuple(entries), damaged


def catalogue() -> list[Entry]:
    """Every method of the toolkit, ordered by part, year and slug.

    Nothing is imported. Modules that cannot be read are left out; :func:`broken` names them.
    """
    return list(_found()[0])


def broken() -> dict[str, Exception]:
    """Modules of the parts whose declarations cannot be read, each with its error."""
    return dict(_found()[1])


def entry(slug: str) -> Entry:
    """The entry of one method.

    Raises:
        KeyError: no such slug; the message suggests the nearest.
        ImportError: the module of that name cannot be read; the message says why.
    """
    by_slug = {e.slug: e for e in catalogue()}
    if slug in by_slug:
        return by_slug[slug]
    for module, error in broken().items():
        if module.rpartition(".")[2] == slug:
            why = f"{type(error).__name__}: {error}"
            raise ImportError(f"{module} cannot be read: {why}") from error
    near = difflib.get_close_matches(slug, by_slug, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known: {sorted(by_slug)}"
    raise KeyError(f"no method with slug {slug!r}{hint}")


def find_class(name: str) -> type | None:
    """The method class of that name, or None; only the module that defines it is imported.

    Raises:
        Exception: whatever reading or importing that module raises.
    """
    for module in _modules():
        text = declared.source(module)
        if text is None or not declared.defines(text, name):
            continue
        for found in _read(module):
            if found.class_name == name:
                return found.method
    return None


def forget() -> None:
    """Read the source files anew, because they have changed."""
    _found.cache_clear()
    declared.forget()
