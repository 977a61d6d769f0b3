"""Which definitions a piece of code can reach, each with a hash: the key of what it computes.

A number is stale when code that it came from has changed. To say so exactly, names are followed
from a cell or a job's function through modules, definition by definition, without importing
anything. Where a name cannot be followed (``from m import *``, a module handed on as a value, a
module imported by a computed name) the whole module, or every method, counts. What only scale
``ci`` uses, a size or a number of seeds, is no part of what a larger scale computes.

``toolkit`` hands out names lazily: those listed in a package's ``_EXPORTS`` come from the module
named there, every other name is a class or function that a part module defines.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from toolkit.core.runs.code_index import MODULE, Index
from toolkit.core.runs.code_names import Binding, References, references
from toolkit.core.runs.code_tree import FUNCTIONS

PACKAGE = "toolkit"
OUTSIDE_PARTS = ("core", "labs")
BASELINES = ("core", "baselines")  # methods as well
CATALOGUE = ("toolkit.core.declare.catalogue", "toolkit.core.declare")
DISCOVERING = {"catalogue", "entry", "find_class"}  # whoever names these sees every method


@dataclass(frozen=True, order=True)
class Definition:
    """A name in a file; the path starts from the root."""

    path: str
    name: str

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"


Reached = set[Definition]


class Tracer:
    """Follows names in one project; each file is parsed once.

    Args:
        root: folder that holds the package ``toolkit``, and others whose code counts.
        scale: whose keys; at the larger ones values that only ``ci`` uses do not count.
    """

    def __init__(self, root: Path, scale: str = "ci") -> None:
        self.root = Path(root)
        self.quick = scale == "ci"
        self._indexes: dict[str, Index | None] = {}
        self._files: dict[str, str | None] = {}
        self._edges: dict[Definition, tuple[Reached, tuple[str, ...]]] = {}
        self._hashes: dict[Definition, str] = {}

    def of_source(self, codes: Iterable[str]) -> dict[str, str]:
        """Every definition that the code cells of one chapter can reach, with its hash.

        Args:
            codes: the cells, in order; IPython magics are understood. A cell that is not Python
                counts for nothing: it fails when it runs.
        """
        body = [node for code in codes for node in parse_cell(code).body]
        named = references(body, "")
        taken = {bound for bindings in named.imports.values() for bound in bindings if bound.name}
        for bound in taken:  # a definition imported by name is meant to be used, a module is not
            if not self._is_module(bound):
                named.chains.add((bound.name,))
                named.imports.setdefault(bound.name, []).append(bound)
        found, _ = self._follow(named, None, discovering=True)
        return self._closed(found)

    def of_name(self, dotted: str) -> dict[str, str]:
        """Every definition that the one of this dotted name can reach, with its hash.

        Args:
            dotted: ``package.module.name``.

        Raises:
            ValueError: no file under the root defines it.
        """
        module, _, name = dotted.rpartition(".")
        path = self._file(module)
        index = self._index(path) if path else None
        if index is None or name not in index.definitions:
            raise ValueError(f"{dotted!r}: no module under {self.root.name} defines this name")
        return self._closed({Definition(path, name)})

    def of_function(self, function: Callable) -> dict[str, str]:
        """Every definition that a function can reach, with its hash.

        Args:
            function: a function that a module under the root defines at its top level.

        Raises:
            ValueError: it is defined elsewhere: in a notebook, inside another function, as a
                ``lambda`` or a ``partial``.
        """
        module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
        try:
            return self.of_name(f"{module}.{name}")
        except ValueError as error:
            raise ValueError(
                f"function {name or function!r} of module {module!r}: its code cannot be "
                f"followed. Define it with `def` at the top level of a module under {PACKAGE}/."
            ) from error

    def _closed(self, start: Reached) -> dict[str, str]:
        found: Reached = set()
        todo = list(start)
        while todo:
            one = todo.pop()
            if one not in found:
                found.add(one)
                todo.extend(self._reach(one)[0] - found)
        return {
            str(one): self._hash(one)
            for one in sorted(found)
            if one.name != MODULE or self._index(one.path).rest
        }

    def _hash(self, one: Definition) -> str:
        if one not in self._hashes:
            words = self._reach(one)[1]
            self._hashes[one] = self._index(one.path).hash(one.name, words, quick=self.quick)
        return self._hashes[one]

    # files and modules ------------------------------------------------------------------------

    def _file(self, dotted: str) -> str | None:
        """Path, from the root, of a module's file; None if it is none of this project's."""
        if dotted not in self._files:
            stem = dotted.replace(".", "/")
            paths = (f"{stem}/__init__.py", f"{stem}.py")
            found = (p for p in paths if dotted and (self.root / p).is_file())
            self._files[dotted] = next(found, None)
        return self._files[dotted]

    def _exists(self, dotted: str) -> bool:
        if self._file(dotted) is not None:
            return True
        folder = self.root / dotted.replace(".", "/")
        return bool(dotted) and folder.is_dir() and any(folder.glob("*.py"))

    def _index(self, path: str) -> Index | None:
        if path not in self._indexes:
            dotted = dotted_name(path)
            home = dotted if path.endswith("/__init__.py") else dotted.rpartition(".")[0]
            try:
                tree = ast.parse((self.root / path).read_bytes())
            except SyntaxError:  # its import fails when it runs, with Python's own message
                self._indexes[path] = None
            else:
                self._indexes[path] = Index(tree, home)
        return self._indexes[path]

    def _around(self, dotted: str) -> Reached:
        """What importing a module runs: its own statements and those of the packages around."""
        words = dotted.split(".")
        paths = (self._file(".".join(words[: i + 1])) for i in range(len(words)))
        return {Definition(p, MODULE) for p in paths if p and self._index(p) is not None}

    def _whole(self, dotted: str) -> Reached:
        """Every definition of a module, or of all files of a package."""
        folder = self.root / dotted.replace(".", "/")
        paths = [self._file(dotted)] if self._file(dotted) else []
        if folder.is_dir():
            paths += [p.relative_to(self.root).as_posix() for p in folder.rglob("*.py")]
        return self._around(dotted) | {d for path in paths for d in self._all_of(path)}

    def _all_of(self, path: str) -> Reached:
        index = self._index(path)
        names = [MODULE, *index.definitions] if index is not None else []
        return {Definition(path, name) for name in names}

    @functools.cached_property
    def _part_files(self) -> list[str]:
        """The files a catalogue is made of."""
        found = [p.relative_to(self.root) for p in self.root.glob(f"{PACKAGE}/*/**/*.py")]
        parts = [p.as_posix() for p in found if p.parts[1] not in OUTSIDE_PARTS]
        return sorted(parts + [p.as_posix() for p in found if p.parts[1:3] == BASELINES])

    def _methods(self) -> Reached:
        return {d for path in self._part_files for d in self._all_of(path)}

    def _defining(self, name: str) -> Reached:
        """Classes and functions of this name in part modules."""
        found: Reached = set()
        for path in self._part_files:
            if name.encode() in (self.root / path).read_bytes():
                index = self._index(path)
                nodes = index.definitions.get(name, []) if index is not None else []
                if any(isinstance(n, (ast.ClassDef, *FUNCTIONS)) for n in nodes):
                    found |= {Definition(path, name), *self._around(dotted_name(path))}
        return found

    def _exports(self, module: str) -> Mapping[str, str]:
        """A package's table of lazily imported names."""
        path = self._file(module)
        index = self._index(path) if path and path.endswith("/__init__.py") else None
        for node in index.definitions.get("_EXPORTS", []) if index is not None else []:
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                try:
                    return ast.literal_eval(node.value)
                except ValueError:
                    return {}  # a computed table: the name counts as unknown, so all of it does
        return {}

    # references -------------------------------------------------------------------------------

    def _reach(self, one: Definition) -> tuple[Reached, tuple[str, ...]]:
        """What a definition leads to in one step, and what its outside names stand for."""
        if one not in self._edges:
            index, dotted = self._index(one.path), dotted_name(one.path)
            named = index.references(one.name)
            discovering = not dotted.startswith(f"{PACKAGE}.core.") and dotted != PACKAGE
            found, words = self._follow(named, one.path, discovering=discovering)
            if one.name == MODULE:
                for module in index.top.modules:
                    found |= self._around(module)
                for star in index.top.stars:
                    found |= self._whole(star)
                found |= {Definition(one.path, n) for n in self._registered(one.path)}
            else:
                found |= self._around(dotted)
            self._edges[one] = found, words
        return self._edges[one]

    def _registered(self, path: str) -> set[str]:
        """Definitions that do something when the module is imported: they may register."""
        index = self._index(path)
        found = set()
        for name, nodes in index.definitions.items():
            for node in nodes:
                if isinstance(node, ast.ClassDef):
                    if node.keywords or any(self._hooked(b, path) for b in node.bases):
                        found.add(name)
                elif name == "_" and isinstance(node, ast.Assign):
                    found.add(name)
                for call in getattr(node, "decorator_list", []):
                    marker = call.func if isinstance(call, ast.Call) else call
                    inside = references([ast.Expr(marker)], index.home)
                    if any(d.name != MODULE for d in self._follow(inside, path)[0]):
                        found.add(name)
        return found

    def _hooked(self, base: ast.expr, path: str) -> bool:
        """Whether subclasses of a class announce themselves, by ``__init_subclass__``."""
        named = references([ast.Expr(base)], self._index(path).home)
        for one in self._follow(named, path)[0]:
            nodes = self._index(one.path).nodes(one.name) if one.name != MODULE else []
            for node in (n for n in nodes if isinstance(n, ast.ClassDef)):
                names = {getattr(part, "name", "") for part in node.body}
                again = (self._hooked(b, one.path) for b in node.bases if one.path != path)
                if "__init_subclass__" in names or any(again):
                    return True
        return False

    def _follow(
        self, named: References, path: str | None, *, discovering: bool = False
    ) -> tuple[Reached, tuple[str, ...]]:
        """Where references lead, and words for names that come from outside the project."""
        found: Reached = set()
        words: set[str] = set()
        for module in named.modules:
            found |= self._around(module)
        for star in named.stars:
            found |= self._whole(star) if star else self._all_of(path) if path else set()
        if named.dynamic and discovering:
            found |= self._methods()
        index = self._index(path) if path else None
        for chain in named.chains:
            first, rest = chain[0], chain[1:]
            bindings = list(named.imports.get(first, ()))
            if index is not None:
                bindings += index.top.imports.get(first, [])
                if first in index.definitions:
                    found.add(Definition(path, first))
                if first in index.rest_names:
                    found.add(Definition(path, MODULE))
            for bound in bindings:
                if self._exists(bound.module):
                    inside = (bound.name, *rest) if bound.name else rest
                    found |= self._attribute(bound.module, inside, frozenset())
                    if bound.name and bound.name != first:
                        words.add(f"{first} for {bound.name}")
                else:
                    words.add(f"{first} for {bound.module}.{bound.name}")
        if discovering and any(self._discovers(one) for one in found):
            found |= self._methods()
        return found, tuple(sorted(words))

    def _discovers(self, one: Definition) -> bool:
        return one.name in DISCOVERING and dotted_name(one.path).startswith(CATALOGUE)

    def _attribute(self, module: str, words: tuple[str, ...], seen: frozenset) -> Reached:
        """The definitions behind ``module.words``; a module as such stands for all it holds."""
        found = self._around(module)
        if (module, words) in seen:
            return found
        seen |= {(module, words)}
        if not words:
            return found | self._whole(module)
        first, rest = words[0], words[1:]
        path = self._file(module)
        index = self._index(path) if path else None
        known = False
        if index is not None:
            if first in index.definitions:
                known = True
                found.add(Definition(path, first))
            if first in index.rest_names:
                known = True
            for bound in index.top.imports.get(first, []):
                known = True
                if self._exists(bound.module):
                    inside = (bound.name, *rest) if bound.name else rest
                    found |= self._attribute(bound.module, inside, seen)
        if known:
            return found
        if target := self._exports(module).get(first):
            home, _, name = target.partition(":")
            return found | self._attribute(home, (name or first, *rest), seen)
        if self._exists(f"{module}.{first}"):
            return found | self._attribute(f"{module}.{first}", rest, seen)
        if module == PACKAGE:
            return found | self._defining(first)
        if first.startswith("__") or (path and not rest and index is None):
            return found  # __name__, __file__; or a file that cannot be read
        return found | self._whole(module)  # set by code that cannot be followed

    def _is_module(self, bound: Binding) -> bool:
        return self._exists(f"{bound.module}.{bound.name}")


def dotted_name(path: str) -> str:
    """The module that a file is."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def parse_cell(code: str) -> ast.Module:
    """The syntax tree of a notebook cell, magics included; an empty one if it is not Python."""
    try:
        return ast.parse(code)
    except SyntaxError:
        from IPython.core.inputtransformer2 import TransformerManager
    try:
        return ast.parse(TransformerManager().transform_cell(code))
    except SyntaxError:
        return ast.Module([], [])


def digest(definitions: Mapping[str, str]) -> str:
    """One hash over definitions and their hashes."""
    text = json.dumps(dict(definitions), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """What changed between two sets of definitions, a few words for each.

    Args:
        old: what :meth:`Tracer.of_source` or :meth:`Tracer.of_function` gave then.
        new: what it gives now.
    """
    gone = {key: value for key, value in old.items() if key not in new}
    words = []
    for key, value in new.items():
        path, _, name = key.rpartition(":")
        what = "what it runs when imported" if name == MODULE else name
        if key in old:
            if old[key] != value:
                words.append(f"{path}: {what} changed")
            continue
        before = next((k for k in gone if k.endswith(f":{name}") and gone[k] == value), None)
        if before is not None and name != MODULE:
            del gone[before]
            words.append(f"{path}: {what} moved here from {before.rpartition(':')[0]}")
        else:
            words.append(f"{path}: {what} is new")
    for key in gone:
        path, _, name = key.rpartition(":")
        what = "what it ran when imported" if name == MODULE else name
        words.append(f"{path}: {what} is no longer used")
    return words
