"""What a module declares about its methods, read from its source text without importing it.

A declaration is a class at the top level whose body says ``info = Info(...)``. Values are
literals, arithmetic on them, names of literals in the same module, or names imported from another
module of the toolkit that holds a literal of that name. Anything else is :class:`Unreadable`:
whoever needs it imports that one module.
"""

from __future__ import annotations

import ast
import functools
import importlib.machinery
import importlib.util
import operator
import re
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from toolkit.core.declare.fields import Hyper, Range, described, read

OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
TYPES = {"int": int, "float": float, "bool": bool, "str": str}


class Unreadable(Exception):
    """A declaration that is no literal; the message says which and where."""


@dataclass(frozen=True)
class Declared:
    """One class that declares ``info``, as its source text has it.

    Attributes:
        name: the class's name.
        info: keyword arguments of ``Info(...)``.
        fields: the hyperparameters, in order of declaration, those of base classes first.
    """

    name: str
    info: dict[str, Any]
    fields: tuple[Hyper, ...]


def source(module: str) -> str | None:
    """Source text of a module of the toolkit, or None if there is none; nothing is executed.

    The packages above it are imported; they hold no code but their docstring.
    """
    parent, _, _ = module.rpartition(".")
    package = importlib.util.find_spec(parent) if parent else None
    places = package.submodule_search_locations if package else None
    spec = importlib.machinery.PathFinder.find_spec(module, places)
    if spec is None or not hasattr(spec.loader, "get_source"):
        return None
    return spec.loader.get_source(module)


def defines(text: str, name: str) -> bool:
    """Whether a source text has a class of that name at its top level."""
    return re.search(rf"^class {re.escape(name)}\b", text, re.MULTILINE) is not None


@functools.cache
def _file(module: str) -> _File:
    text = source(module)
    if text is None:
        raise Unreadable(f"{module} has no source text")
    return _File(module, ast.parse(text, filename=module))


def declared(module: str) -> list[Declared]:
    """Every class of a module that declares ``info``, in order.

    Raises:
        SyntaxError: the source text is no Python.
        Unreadable: a declaration is not made of literals.
    """
    file = _file(module)
    return [file.declared(node) for node in file.classes.values() if _info(node) is not None]


def forget() -> None:
    """Drop what was read, because source files have changed."""
    _file.cache_clear()


class _File:
    """The syntax tree of one module: its top-level classes, constants and imported names."""

    def __init__(self, module: str, tree: ast.Module):
        self.module = module
        self.classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
        self.constants: dict[str, ast.expr] = {}
        self.imported: dict[str, tuple[str, str]] = {}
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.constants[node.targets[0].id] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                if node.value is not None:
                    self.constants[node.target.id] = node.value
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    self.imported[alias.asname or alias.name] = (node.module, alias.name)

    def declared(self, node: ast.ClassDef) -> Declared:
        call = _info(node)
        if not isinstance(call, ast.Call) or not _calls(call, "Info"):
            raise self.unreadable(node, "info is no call of Info")
        positional, info = self.arguments(call)
        if positional:
            raise self.unreadable(node, "Info takes keyword arguments only")
        return Declared(node.name, info, tuple(self.fields(node).values()))

    def fields(self, node: ast.ClassDef) -> dict[str, Hyper]:
        found: dict[str, Hyper] = {}
        for base in reversed(node.bases):  # as dataclasses collects them
            found |= self.inherited(node, base)
        words = described(ast.get_docstring(node))
        for name, (meaning, source) in words.items():
            if name in found:
                found[name] = replace(found[name], help=meaning, source=source)
        for line in node.body:
            if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
                continue
            name = line.target.id
            if "ClassVar" in ast.unparse(line.annotation):
                found.pop(name, None)
                continue
            if line.value is None:
                raise self.unreadable(line, f"hyperparameter {name} has no default")
            known = {name: (found[name].help, found[name].source)} if name in found else {}
            try:
                given = self.hint(line.annotation), self.value(line.value)
                found[name] = read(name, *given, known | words)
            except TypeError as error:
                raise self.unreadable(line, str(error)) from error
        return found

    def hint(self, node: ast.expr) -> Any:
        """The type that an annotation says, of the forms that :func:`read` takes."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            if isinstance(node.right, ast.Constant) and node.right.value is None:
                return self.hint(node.left) | None
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            if node.value.id == "Literal":
                return Literal[tuple(self.value(part) for part in parts)]
            if node.value.id == "Annotated" and len(parts) == 2 and isinstance(parts[1], ast.Call):
                if not _calls(parts[1], "Range"):
                    raise self.unreadable(node, "Annotated without a Range")
                given, named = self.arguments(parts[1])
                return Annotated[self.hint(parts[0]), Range(*given, **named)]
        elif isinstance(node, ast.Name):
            module, name = self.imported.get(node.id, ("", ""))
            if node.id in self.constants:
                return self.hint(self.constants[node.id])
            if module.startswith("toolkit.") and name in _file(module).constants:
                return _file(module).hint(_file(module).constants[name])
            if node.id in TYPES and not module:
                return TYPES[node.id]
        raise self.unreadable(node, f"{ast.unparse(node)} is no type of a hyperparameter")

    def inherited(self, node: ast.ClassDef, base: ast.expr) -> dict[str, Hyper]:
        if isinstance(base, ast.Subscript):  # Generic[T], Protocol[T]
            base = base.value
        if not isinstance(base, ast.Name):
            raise self.unreadable(node, "a base class that is no plain name")
        if base.id in self.classes:
            return self.fields(self.classes[base.id])
        module, name = self.imported.get(base.id, ("", base.id))
        if not module.startswith("toolkit."):
            return {}
        file = _file(module)
        if name not in file.classes:
            raise self.unreadable(node, f"base class {name} is not defined in {module}")
        return file.fields(file.classes[name])

    def arguments(self, call: ast.Call) -> tuple[list[Any], dict[str, Any]]:
        if any(k.arg is None for k in call.keywords):
            raise self.unreadable(call, "keyword arguments by **")
        positional = self.value(ast.Tuple(call.args, ast.Load()))
        return list(positional), {k.arg: self.value(k.value) for k in call.keywords}

    def value(self, node: ast.expr) -> Any:
        """The value of a literal, of a constant's name, or of a tuple or list of these."""
        if isinstance(node, ast.Name):
            return self.named(node)
        if isinstance(node, (ast.Tuple, ast.List)):
            items: list[Any] = []
            for item in node.elts:
                if isinstance(item, ast.Starred):
                    items += self.value(item.value)
                else:
                    items.append(self.value(item))
            return tuple(items) if isinstance(node, ast.Tuple) else items
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
            left, right = self.value(node.left), self.value(node.right)
            if isinstance(left, (int, float)) and isinstance(right, (int, float)):
                return OPERATIONS[type(node.op)](left, right)
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError) as error:
            raise self.unreadable(node, f"{ast.unparse(node)} is no literal") from error

    def named(self, node: ast.Name) -> Any:
        if node.id in self.constants:
            return self.value(self.constants[node.id])
        module, name = self.imported.get(node.id, ("", ""))
        if module.startswith("toolkit."):
            file = _file(module)
            if name in file.constants:
                return file.value(file.constants[name])
        raise self.unreadable(node, f"{node.id} is no literal")

    def unreadable(self, node: ast.AST, why: str) -> Unreadable:
        return Unreadable(f"{self.module}, line {getattr(node, 'lineno', '?')}: {why}")


def _info(node: ast.ClassDef) -> ast.expr | None:
    """What the body of a class assigns to ``info``, or None."""
    for line in node.body:
        if not isinstance(line, (ast.AnnAssign, ast.Assign)):
            continue
        names = [line.target] if isinstance(line, ast.AnnAssign) else line.targets
        if any(isinstance(n, ast.Name) and n.id == "info" for n in names):
            return line.value
    return None


def _calls(node: ast.expr | None, function: str) -> bool:
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function
    )
