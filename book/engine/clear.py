"""Whether a change of code is one that a comparison at ``ci`` can clear.

Two runs that agree say nothing about code that neither of them called. So every changed function
must have run. A changed constant is never cleared: it may be one that only a larger scale uses.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

from book.engine import key
from book.engine.source import Source, tags
from toolkit.core.runs import code
from toolkit.core.runs.code_index import MODULE, Index
from toolkit.core.runs.code_tree import same, units


class Side:
    """The code of one tree: keys, by scale, and syntax trees of its definitions.

    Args:
        root: the tree's folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tracer = functools.cache(functools.partial(code.Tracer, root))
        self._indexes: dict[str, Index] = {}

    def nodes(self, definition: str) -> list[ast.stmt]:
        path, _, name = definition.rpartition(":")
        if path not in self._indexes:
            self._indexes[path] = Index(ast.parse((self.root / path).read_bytes()), "")
        return self._indexes[path].nodes(name)


def objections(
    old: Mapping[str, str], new: Mapping[str, str], before: Side, now: Side, ran: set[str]
) -> list[str]:
    """What speaks against clearing a change, in words; nothing when it may be cleared.

    Args:
        old: definitions and hashes at the base.
        new: those of today.
        before: the base's tree.
        now: today's tree.
        ran: functions that today's run called.
    """
    gone = {k for k in old if k not in new}
    found: list[str] = []
    for one, value in new.items():
        path, _, name = one.rpartition(":")
        if old.get(one) == value:
            continue
        twin = one if one in old else _twin(name, gone, old, value)
        if twin is not None and old[twin] == value:
            continue  # moved
        former = before.nodes(twin) if twin is not None else []
        found += _of_definition(path, name, former, now.nodes(one), ran)
    return found


def _twin(name: str, gone: set[str], old: Mapping[str, str], value: str) -> str | None:
    named = sorted(k for k in gone if k.endswith(f":{name}") and name != MODULE)
    return next((k for k in named if old[k] == value), named[0] if named else None)


def _of_definition(
    path: str, name: str, former: list[ast.stmt], nodes: list[ast.stmt], ran: set[str]
) -> list[str]:
    before, now = units(former), units(nodes)
    found = []
    for unit, (kind, value) in now.items():
        if before.get(unit, ("", ""))[1] == value:
            continue
        words = "what it runs when imported" if name == MODULE else unit or name
        if kind == "function":
            if f"{path}:{unit}" not in ran:
                found.append(f"{path}: {words} changed, and no ci run calls it")
        elif unit in before:
            found.append(f"{path}: {words} changed, which a ci run need not show")
    return found


def same_cells(before: Source, now: Source) -> bool:
    """Whether two sources have the same code cells but for their import lines."""
    if len(before.code) != len(now.code):
        return False
    return all(
        ("raises-exception" in tags(one)) == ("raises-exception" in tags(other))
        and same(code.parse_cell(one.source), code.parse_cell(other.source))
        for one, other in zip(before.code, now.code, strict=True)
    )


def recorded_at(parts: Mapping, base: Source, before: Side) -> bool:
    """Whether a page was recorded with the code that the base has.

    Args:
        parts: the page's.
        base: the chapter's source at the base.
        before: the base's tree.
    """
    if parts["cells"] != key.cells(base):
        return False
    if "code" in parts:
        return parts["code"] == before.tracer(parts["scale"]).of_source(c.source for c in base.code)
    files = {**parts.get("toolkit", {}), "constraints.txt": parts.get("constraints")}
    return _same_files(files.items(), before.root)  # a page of format 1


def _same_files(files: Iterable[tuple[str, str]], root: Path) -> bool:
    return all((root / p).is_file() and key.file_hash(root / p) == h for p, h in files)
