"""What a piece of code names: dotted expressions from outside, and what its imports bind."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field

from toolkit.core.runs.code_tree import FUNCTIONS, effective, own

NAMED = (*FUNCTIONS, ast.ClassDef, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)


@dataclass(frozen=True)
class Binding:
    """What an import gives a name: a module, or a name inside a module.

    Args:
        module: dotted, absolute.
        name: the name taken from it; '' for the module itself.
    """

    module: str
    name: str = ""


@dataclass
class References:
    """What a piece of code names.

    Args:
        chains: dotted expressions that start with a name from outside, as tuples of words.
        imports: names that imports inside the code bind.
        modules: modules it imports, for what they do at import.
        stars: modules of which it takes ``*``.
        dynamic: whether it imports a module whose name is computed.
    """

    chains: set[tuple[str, ...]] = field(default_factory=set)
    imports: dict[str, list[Binding]] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)
    stars: set[str] = field(default_factory=set)
    dynamic: bool = False


def note_import(node: ast.Import | ast.ImportFrom, home: str, into: References) -> None:
    """Add what an import binds."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            into.modules.add(alias.name)
            whole = alias.name if alias.asname else alias.name.split(".")[0]
            into.imports.setdefault(alias.asname or whole, []).append(Binding(whole))
        return
    base = _base(node, home)
    into.modules.add(base)
    for alias in node.names:
        if alias.name == "*":
            into.stars.add(base)
        else:
            bound = Binding(base, alias.name)
            into.imports.setdefault(alias.asname or alias.name, []).append(bound)


def _base(node: ast.ImportFrom, home: str) -> str:
    if node.level == 0:
        return node.module or ""
    words = home.split(".") if home else []
    words = words[: len(words) - (node.level - 1)]
    return ".".join([*words, node.module] if node.module else words)


def references(nodes: Iterable[ast.stmt], home: str) -> References:
    """What statements name, scopes respected: a local variable is no reference to a module."""
    reader = _Reader(home)
    for node in effective(nodes):
        reader.visit(node)
    return reader.found


class _Reader(ast.NodeVisitor):
    """Collects references; ``scopes`` holds the local names of the functions around."""

    def __init__(self, home: str) -> None:
        self.home = home
        self.found = References()
        self.scopes: list[set[str]] = []
        self.inner: set[str] = set()  # names that imports inside functions bind

    def generic_visit(self, node: ast.AST) -> None:
        for _, value in ast.iter_fields(node):
            if isinstance(value, list):
                statements = bool(value) and isinstance(value[0], ast.stmt)
                for part in effective(value) if statements else value:
                    if isinstance(part, ast.AST):
                        self.visit(part)
            elif isinstance(value, ast.AST):
                self.visit(value)

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        note_import(node, self.home, self.found)

    visit_ImportFrom = visit_Import

    def visit_Name(self, node: ast.Name) -> None:
        if not isinstance(node.ctx, ast.Store):
            self._chain((node.id,))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        words, base = [node.attr], node.value
        while isinstance(base, ast.Attribute):
            words.insert(0, base.attr)
            base = base.value
        if isinstance(base, ast.Name):
            self._chain((base.id, *words))
        else:
            self.visit(base)

    def _chain(self, words: tuple[str, ...]) -> None:
        if words[0] in self.inner or not any(words[0] in s for s in self.scopes):
            self.found.chains.add(words)

    def visit_Call(self, node: ast.Call) -> None:
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if called in ("import_module", "__import__"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                self.found.modules.add(first.value)
                self.found.stars.add(first.value)
            else:
                self.found.dynamic = True
        elif called == "globals":
            self.found.stars.add("")  # the file itself
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        # of a field of a class the annotation says something; of a variable it never runs
        if not self.scopes and isinstance(node.target, ast.Name):
            self._annotation(node.annotation)
        self.visit(node.target)
        if node.value is not None:
            self.visit(node.value)

    def _annotation(self, node: ast.expr) -> None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                node = ast.parse(node.value, mode="eval").body
            except SyntaxError:
                return  # a text that only looks like an annotation
        self.visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for part in [*node.decorator_list, *_defaults(node.args)]:
            self.visit(part)
        self._scoped(node, node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        for part in _defaults(node.args):
            self.visit(part)
        self._scoped(node, [node.body])

    def visit_ListComp(self, node: ast.AST) -> None:
        self._scoped(node, list(ast.iter_child_nodes(node)))

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp

    def _scoped(self, node: ast.AST, body: list) -> None:
        inner = list(own(node))
        for part in inner:  # its imports first: their names are references, not local variables
            if isinstance(part, (ast.Import, ast.ImportFrom)):
                note_import(part, self.home, self.found)
                self.inner |= {(a.asname or a.name).split(".")[0] for a in part.names}
        self.scopes.append(_locals(node, inner))
        for part in effective(body) if body and isinstance(body[0], ast.stmt) else body:
            self.visit(part)
        self.scopes.pop()


def _defaults(arguments: ast.arguments) -> list[ast.expr]:
    return [d for d in [*arguments.defaults, *arguments.kw_defaults] if d is not None]


def _locals(node: ast.AST, inner: list[ast.AST]) -> set[str]:
    names: set[str] = set()
    arguments = getattr(node, "args", None)
    if isinstance(arguments, ast.arguments):
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every += [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
        names |= {a.arg for a in every}
    free: set[str] = set()
    for part in inner:
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            names.add(part.id)
        elif isinstance(part, NAMED) and part.name:
            names.add(part.name)
        elif isinstance(part, (ast.Global, ast.Nonlocal)):
            free |= set(part.names)
    return names - free
