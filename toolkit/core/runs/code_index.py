"""One source file as data: its definitions, what each of them names, and their hashes.

Nothing is imported or run. A *definition* is a top-level function, class or assignment. Everything
else that runs at import (calls, ifs, loops) is gathered under the name :data:`MODULE`.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from functools import cached_property

from toolkit.core.runs.code_names import References, note_import, references
from toolkit.core.runs.code_tree import FUNCTIONS, assigned, dump, effective

MODULE = "<module>"


class Index:
    """A parsed file.

    Args:
        tree: its syntax tree.
        home: dotted name of the package that relative imports start from.
    """

    def __init__(self, tree: ast.Module, home: str) -> None:
        self.home = home
        self.definitions: dict[str, list[ast.stmt]] = {}
        self.rest: list[ast.stmt] = []
        self.top = References()
        self._read(tree.body)

    def _read(self, body: Iterable[ast.stmt]) -> None:
        for node in effective(body):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                note_import(node, self.home, self.top)
            elif isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                self.definitions.setdefault(node.name, []).append(node)
            elif names := assigned(node):
                for name in names:
                    self.definitions.setdefault(name, []).append(node)
            else:
                self.rest.append(node)

    @cached_property
    def rest_names(self) -> set[str]:
        """Names that statements other than definitions bind; they stand for :data:`MODULE`."""
        return {
            name
            for node in self.rest
            for part in ast.walk(node)
            for name in (
                [part.name]
                if isinstance(part, (*FUNCTIONS, ast.ClassDef))
                else [part.id]
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
                else []
            )
        }

    def nodes(self, name: str) -> list[ast.stmt]:
        return self.rest if name == MODULE else self.definitions[name]

    def references(self, name: str) -> References:
        return references(self.nodes(name), self.home)

    def hash(self, name: str, words: Iterable[str], *, quick: bool = True) -> str:
        """Hash of a definition's syntax tree and of ``words`` that say what its names stand for.

        ``quick`` says whether values that only scale ``ci`` uses count.
        """
        text: list[str] = []
        for node in self.nodes(name):
            dump(node, text, imports=name == MODULE, quick=quick)
        text += sorted(words)
        return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]
