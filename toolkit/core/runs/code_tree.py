"""Syntax trees without what changes no number, their hashes, and the parts that run by themselves.

Comments and positions are no part of a tree; docstrings, ``pass`` and imports for type checkers are
left out here. Hashes are the same in every version of Python that parses alike.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*FUNCTIONS, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


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


def dump(
    value: object,
    text: list[str],
    *,
    imports: bool,
    without: Collection[int] = (),
    quick: bool = True,
) -> None:
    """A syntax tree as words: the same in every version of Python that parses it alike.

    Args:
        value: the tree, or a part of it.
        text: takes the words.
        imports: whether imports count.
        without: ids of statements that do not count.
        quick: whether values that only scale ``ci`` uses count, see :func:`larger`.
    """
    if not quick:
        value = larger(value)
    if isinstance(value, ast.AST):
        if not imports and isinstance(value, (ast.Import, ast.ImportFrom)):
            return  # what its names stand for is told apart
        text.append(type(value).__name__)
        for name, part in ast.iter_fields(value):
            if part is None or part == [] or name in ("ctx", "kind", "type_comment"):
                continue
            text.append(f".{name}")
            parts = _joined(part) if name == "values" else part
            dump(parts, text, imports=imports, without=without, quick=quick)
    elif isinstance(value, list):
        if value and isinstance(value[0], ast.stmt):
            value = [part for part in effective(value) if id(part) not in without]
        text.append("[")
        for part in value:
            dump(part, text, imports=imports, without=without, quick=quick)
        text.append("]")
    else:
        text.append(f"{type(value).__name__} {value!r}")


def larger(value: object) -> object:
    """A part of a syntax tree without the values that only scale ``ci`` uses.

    These are the entry ``"ci"`` of a dictionary that has one for ``"cpu"``, the argument ``ci=`` of
    a call that has ``cpu=`` as well, and what a conditional expression gives for ``... == "ci"``.
    """
    if isinstance(value, ast.Dict):
        keys = [getattr(key, "value", None) for key in value.keys]
        if {"ci", "cpu"} <= {key for key in keys if isinstance(key, str)}:
            kept = [k for k, key in enumerate(keys) if key != "ci"]
            return ast.Dict([value.keys[k] for k in kept], [value.values[k] for k in kept])
    elif isinstance(value, ast.Call):
        if {"ci", "cpu"} <= {word.arg for word in value.keywords}:
            words = [word for word in value.keywords if word.arg != "ci"]
            return ast.Call(value.func, value.args, words)
    elif isinstance(value, ast.IfExp) and isinstance(value.test, ast.Compare):
        test = value.test
        if [getattr(c, "value", None) for c in test.comparators] == ["ci"]:
            if isinstance(test.ops[0], ast.Eq):
                return larger(value.orelse)
            if isinstance(test.ops[0], ast.NotEq):
                return larger(value.body)
    return value


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
        dump(node, text, imports=False)
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
            inner = [n for n in own(node) if isinstance(n, (*FUNCTIONS, ast.ClassDef))]
            name = f"{inside}{node.name}"
            found[name] = ("function", _hash_without(node, inner))
            found |= units(inner, f"{name}.<locals>.")
        elif isinstance(node, ast.ClassDef):
            name = f"{inside}{node.name}"
            found[name] = ("class", _hash_without(node, node.body))
            found |= units(node.body, f"{name}.")
        else:
            name = f"{inside}{', '.join(assigned(node))}"
            text = [found[name][1]] if name in found else []
            dump(node, text, imports=True)
            found[name] = ("constant", hashlib.sha256("\n".join(text).encode()).hexdigest())
    return found


def _hash_without(node: ast.AST, inner: list) -> str:
    """Hash of a syntax tree without some of its statements."""
    text: list[str] = []
    dump(node, text, imports=False, without={id(part) for part in inner})
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def assigned(node: ast.stmt) -> list[str]:
    """The names a top-level assignment defines; none if it also writes into something."""
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        targets = [node.target]
    else:
        alias: Any = node  # Python 3.12's ast.TypeAlias
        return [alias.name.id] if type(node).__name__ == "TypeAlias" else []
    parts = [part for target in targets for part in _flat(target)]
    names = [part.id for part in parts if isinstance(part, ast.Name)]
    return names if len(names) == len(parts) else []


def _flat(target: ast.expr) -> list[ast.expr]:
    if isinstance(target, (ast.Tuple, ast.List)):
        return [part for element in target.elts for part in _flat(element)]
    return _flat(target.value) if isinstance(target, ast.Starred) else [target]


def own(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a scope without those of the scopes inside it, whose first node is given."""
    body = getattr(node, "body", None)
    todo = list(body) if isinstance(body, list) else [body] if body else []
    todo += getattr(node, "generators", [])
    while todo:
        part = todo.pop()
        yield part
        if not isinstance(part, (*SCOPES, ast.ClassDef)):
            todo.extend(ast.iter_child_nodes(part))
