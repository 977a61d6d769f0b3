"""The catalogue: one entry per method, discovered from the parts and never listed twice.

It is read from the methods' source text, so that listing them imports none and one that is broken
breaks no other.

A method is a frozen dataclass with a class attribute ``info`` (an :class:`~toolkit.core.declare
.info.Info`) and annotated fields (:mod:`toolkit.core.declare.fields`). The map, the command line,
the live controls and the contract tests all read what is declared so.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import pkgutil
from dataclasses import dataclass
from typing import Any

from toolkit.core.declare import source as declared
from toolkit.core.declare.fields import Hyper, hyperparameters
from toolkit.core.declare.info import PARTS, Info, home


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
    def chapter(self) -> str | None:
        """Path of the chapter's recorded notebook, from the book's folder, without suffix.

        None for the baselines, which have no chapter.
        """
        return None if self.part == "core" else f"notebooks/{self.part}/{self.slug}"


def _modules() -> list[str]:
    names = []
    for part in PARTS:
        found = importlib.util.find_spec(home(part))
        if found is None or found.submodule_search_locations is None:
            continue
        for module in pkgutil.iter_modules(found.submodule_search_locations):
            if not module.name.startswith("_"):
                names.append(f"{home(part)}.{module.name}")
    return names


def _within(package: str) -> list[str]:
    """Modules of a package, none of which is imported; of a plain module, nothing."""
    found = importlib.util.find_spec(package)
    places = (found and found.submodule_search_locations) or ()
    names = (m.name for m in pkgutil.iter_modules(places))
    return [f"{package}.{name}" for name in names if not name.startswith("_")]


def _read(module: str) -> list[Entry]:
    """The methods of one module: from its source text, or by importing it where that is no use."""
    try:
        entries = []
        for found in declared.declared(module):
            entries.append(Entry(module, found.name, Info(**found.info), found.fields))
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

    A package may hold further methods in its modules, which share its chapter and are not listed.

    Raises:
        Exception: whatever reading or importing that module raises.
    """
    packages = _modules()
    for module in packages + [inner for package in packages for inner in _within(package)]:
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
