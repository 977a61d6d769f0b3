"""One source file as data: its definitions, what each of them names, and their hashes.

Nothing is imported or run. A *definition* is a top-level function, class or assignment. Everything
else that runs at import (calls, ifs, loops) is gathered under the name :data:`MODULE`.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

MODULE = "<module>"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
NAMED = (*FUNCTIONS, ast.ClassDef, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)
SCOPES = (*FUNCTIONS, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


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
            elif names := _assigned(node):
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

    def hash(self, name: str, words: Iterable[str]) -> str:
        """Hash of a definition's syntax tree and of ``words`` that say what its names stand for."""
        text: list[str] = []
        for node in self.nodes(name):
            _dump(node, text, imports=name == MODULE)
        text += sorted(words)
        return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def _assigned(node: ast.stmt) -> list[str]:
    """The names a top-level assignment defines; none if it also writes into something."""
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        targets = [node.target]
    else:
        return [node.name.id] if type(node).__name__ == "TypeAlias" else []
    parts = [part for target in targets for part in _flat(target)]
    return [p.id for p in parts] if all(isinstance(p, ast.Name) for p in parts) else []


def _flat(target: ast.expr) -> list[ast.expr]:
    if isinstance(target, (ast.Tuple, ast.List)):
        return [part for element in target.elts for part in _flat(element)]
    return _flat(target.value) if isinstance(target, ast.Starred) else [target]


def effective(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that do something: no docstrings, ``pass`` or imports for type checkers only."""
    for node in body:
        if isinstance(node, ast.Pass):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            continue
        if isinstance(node, ast.If) and _type_checking(node.test):
            yield from effective(node.orelse)
            continue
        yield node


def _type_checking(test: ast.expr) -> bool:
    return getattr(test, "id", getattr(test, "attr", "")) == "TYPE_CHECKING"


def _dump(value: object, text: list[str], *, imports: bool, without: Collection[int] = ()) -> None:
    """A syntax tree as words: the same in every version of Python that parses it alike."""
    if isinstance(value, ast.AST):
        if not imports and isinstance(value, (ast.Import, ast.ImportFrom)):
            return  # what its names stand for is told apart
        text.append(type(value).__name__)
        for name, part in ast.iter_fields(value):
            if part is None or part == [] or name in ("ctx", "kind", "type_comment"):
                continue
            text.append(f".{name}")
            parts = _joined(part) if name == "values" else part
            _dump(parts, text, imports=imports, without=without)
    elif isinstance(value, list):
        if value and isinstance(value[0], ast.stmt):
            value = [part for part in effective(value) if id(part) not in without]
        text.append("[")
        for part in value:
            _dump(part, text, imports=imports, without=without)
        text.append("]")
    else:
        text.append(f"{type(value).__name__} {value!r}")


def _joined(parts: list) -> list:
    """The parts of an f-string with neighbouring texts as one: versions of Python split them."""
    found: list = []
    for part in parts:
        texts = [
            p.value
            for p in (found[-1] if found else None, part)
            if isinstance(p, ast.Constant) and isinstance(p.value, str)
        ]
        if len(texts) == 2:
            found[-1] = ast.Constant("".join(texts))
        else:
            found.append(part)
    return found


def same(one: ast.AST, other: ast.AST) -> bool:
    """Whether two syntax trees say the same, apart from imports, comments and docstrings."""
    texts: list[list[str]] = [[], []]
    for node, text in zip((one, other), texts, strict=True):
        _dump(node, text, imports=False)
    return texts[0] == texts[1]


def units(nodes: Iterable[ast.stmt], inside: str = "") -> dict[str, tuple[str, str]]:
    """A definition cut into what runs by itself: kind and hash by qualified name.

    Functions and methods, those inside others too, are of kind ``function``, named as Python's
    ``__qualname__``; a class without its methods is a ``class``; values are a ``constant`` each.

    Args:
        nodes: the definition's statements.
        inside: qualified name of what they stand in, with the dot after it.
    """
    found: dict[str, tuple[str, str]] = {}
    for node in effective(nodes):
        if isinstance(node, FUNCTIONS):
            inner = [n for n in _own(node) if isinstance(n, (*FUNCTIONS, ast.ClassDef))]
            name = f"{inside}{node.name}"
            found[name] = ("function", _hash_without(node, inner))
            found |= units(inner, f"{name}.<locals>.")
        elif isinstance(node, ast.ClassDef):
            name = f"{inside}{node.name}"
            found[name] = ("class", _hash_without(node, node.body))
            found |= units(node.body, f"{name}.")
        else:
            name = f"{inside}{', '.join(_assigned(node))}"
            text = [found[name][1]] if name in found else []
            _dump(node, text, imports=True)
            found[name] = ("constant", hashlib.sha256("\n".join(text).encode()).hexdigest())
    return found


def _hash_without(node: ast.AST, inner: list) -> str:
    """Hash of a syntax tree without some of its statements."""
    text: list[str] = []
    _dump(node, text, imports=False, without={id(part) for part in inner})
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def note_import(node: ast.Import | ast.ImportFrom, home: str, into: References) -> None:
    """Add what an import binds."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            into.modules.add(alias.name)
            bound = alias.name if alias.asname else alias.name.split(".")[0]
            into.imports.setdefault(alias.asname or bound, []).append(Binding(bound))
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

    def visit_Import(self, node: ast.Import) -> None:
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

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for part in [*node.decorator_list, *_defaults(node.args)]:
            self.visit(part)
        self._scoped(node, node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        for part in _defaults(node.args):
            self.visit(part)
        self._scoped(node, [node.body])

    def visit_ListComp(self, node: ast.ListComp) -> None:
        self._scoped(node, list(ast.iter_child_nodes(node)))

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp

    def _scoped(self, node: ast.AST, body: list) -> None:
        inner = list(_own(node))
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


def _own(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a scope without those of the scopes inside it, whose first node is given."""
    body = getattr(node, "body", None)
    todo = list(body) if isinstance(body, list) else [body] if body else []
    todo += getattr(node, "generators", [])
    while todo:
        part = todo.pop()
        yield part
        if not isinstance(part, (*SCOPES, ast.ClassDef)):
            todo.extend(ast.iter_child_nodes(part))


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
