"""Which toolkit modules a chapter uses, found without running anything.

Imports are followed through the syntax trees, also inside functions. ``toolkit`` hands out names
lazily: those listed in a package's ``_EXPORTS`` come from the module named there, every other
name is a class or function that a part module defines.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager

PACKAGE = "toolkit"
CATALOGUE = "toolkit.core.catalogue"
DISCOVERING = {"catalogue", "entry", "find_class"}  # a chapter using these sees every method


class Tracer:
    """Traces imports in one project, parsing each module once.

    Args:
        root: folder that holds the ``toolkit`` package.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._tree = cache(self._read_tree)
        self._direct = cache(self._read_direct)

    def modules(self, cells: Iterable[str]) -> list[str]:
        """Paths, from the root, of every toolkit module these code cells need, sorted."""
        found: set[str] = set()
        for code in cells:
            tree = parse_cell(code)
            if tree is not None:
                found |= self._names(tree, None, chapter=True)
        todo = list(found)
        while todo:
            new = self._direct(todo.pop()) - found
            found |= new
            todo.extend(new)
        return sorted(found)

    def methods(self) -> set[str]:
        """All part modules: the files a catalogue is made of."""
        return {
            path.relative_to(self.root).as_posix()
            for path in self.root.glob(f"{PACKAGE}/*/*.py")
            if path.parent.name != "core"
        }

    def _read_tree(self, path: str) -> ast.Module | None:
        try:
            return ast.parse((self.root / path).read_bytes())
        except SyntaxError:
            return None  # the import fails when the chapter runs, with Python's own message

    def _read_direct(self, path: str) -> set[str]:
        tree = self._tree(path)
        dotted = path.removesuffix(".py").replace("/", ".")
        if path.endswith("/__init__.py"):
            home = dotted.removesuffix(".__init__")
        else:
            home = dotted.rpartition(".")[0]
        return set() if tree is None else self._names(tree, home, chapter=False)

    def _file(self, dotted: str) -> str | None:
        stem = dotted.replace(".", "/")
        for path in (f"{stem}/__init__.py", f"{stem}.py"):
            if (self.root / path).is_file():
                return path
        return None

    def _exists(self, dotted: str) -> bool:
        return self._file(dotted) is not None or (self.root / dotted.replace(".", "/")).is_dir()

    def _files(self, dotted: str) -> set[str]:
        """A module's file and those of the packages around it, which Python imports first."""
        words = dotted.split(".")
        files = {self._file(".".join(words[: i + 1])) for i in range(len(words))}
        return {file for file in files if file is not None}

    def _names(self, tree: ast.AST, home: str | None, *, chapter: bool) -> set[str]:
        found: set[str] = set()
        bound: dict[str, str] = {}  # local name -> toolkit module it stands for
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if _inside(alias.name):
                        found |= self._follow(alias.name.split("."), chapter)
                        bound[alias.asname or PACKAGE] = alias.name if alias.asname else PACKAGE
            elif isinstance(node, ast.ImportFrom):
                base = _base(node, home)
                if not _inside(base):
                    continue
                found |= self._files(base)
                for alias in node.names:
                    if alias.name == "*":
                        found |= self._all(base)
                        continue
                    found |= self._follow([*base.split("."), alias.name], chapter)
                    if self._exists(f"{base}.{alias.name}"):
                        bound[alias.asname or alias.name] = f"{base}.{alias.name}"
            elif isinstance(node, ast.Call):
                named = _imported_by_name(node)
                if named and _inside(named):
                    found |= self._follow(named.split("."), chapter)
        for words in _chains(tree):
            if words[0] in bound:
                found |= self._follow([*bound[words[0]].split("."), *words[1:]], chapter)
        return found

    def _follow(self, words: list[str], chapter: bool) -> set[str]:
        """Files behind a dotted path: as far as it leads through modules, then the name."""
        found: set[str] = set()
        module = words[0]
        found |= self._files(module)
        for place, word in enumerate(words[1:], 2):
            here = f"{module}.{word}"
            if chapter and (
                (module == CATALOGUE and word in DISCOVERING)
                or (module == PACKAGE and word == "catalogue")
                or (here == CATALOGUE and place == len(words))  # the module as a whole
            ):
                found |= self.methods()
            target = self._exports(module).get(word)
            if target is not None:
                return found | self._files(target)
            if self._exists(here):
                module = here
                found |= self._files(here)
                continue
            return found | (self._defining(word) if module == PACKAGE else set())
        return found

    def _exports(self, module: str) -> dict[str, str]:
        file = self._file(module)
        tree = self._tree(file) if file and file.endswith("/__init__.py") else None
        for node in tree.body if tree is not None else []:
            target = node.targets[0] if isinstance(node, ast.Assign) else None
            target = node.target if isinstance(node, ast.AnnAssign) else target
            if isinstance(target, ast.Name) and target.id == "_EXPORTS" and node.value:
                return ast.literal_eval(node.value)
        return {}

    def _defining(self, name: str) -> set[str]:
        """Files of the part modules that define a class or function of this name."""
        found: set[str] = set()
        for path in self.methods():
            tree = self._tree(path)
            for node in tree.body if tree is not None else []:
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
                    found |= self._files(path.removesuffix(".py").replace("/", "."))
        return found

    def _all(self, base: str) -> set[str]:
        folder = self.root / base.replace(".", "/")
        return {path.relative_to(self.root).as_posix() for path in folder.rglob("*.py")}


def parse_cell(code: str) -> ast.Module | None:
    """The syntax tree of a notebook cell, magics included; None if it is not Python."""
    try:
        return ast.parse(TransformerManager().transform_cell(code))
    except SyntaxError:
        return None  # the cell fails when it runs, and is reported with its traceback


def _inside(dotted: str | None) -> bool:
    return dotted is not None and (dotted == PACKAGE or dotted.startswith(f"{PACKAGE}."))


def _base(node: ast.ImportFrom, home: str | None) -> str | None:
    if node.level == 0:
        return node.module
    if home is None:
        return None
    words = home.split(".")
    words = words[: len(words) - (node.level - 1)]
    return ".".join([*words, node.module] if node.module else words)


def _imported_by_name(node: ast.Call) -> str | None:
    function = node.func
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if called not in ("import_module", "__import__") or not node.args:
        return None
    argument = node.args[0]
    literal = isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    return argument.value if literal else None


def _chains(tree: ast.AST) -> Iterator[list[str]]:
    """Every dotted expression ``a.b.c`` as its words."""
    for node in ast.walk(tree):
        words: list[str] = []
        while isinstance(node, ast.Attribute):
            words.insert(0, node.attr)
            node = node.value
        if words and isinstance(node, ast.Name):
            yield [node.id, *words]
