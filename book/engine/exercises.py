"""Exercises as a chapter's source holds them.

An exercise is a heading ``### Exercise N: title`` in a Markdown cell, then code cells tagged
``check``, ``stub``, ``solution``, ``wrong`` (two or more) and ``attempt``, in this order. The cells
need nothing but what the check cell imports.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from book.engine.project import Chapter, EngineError
from book.engine.source import Source, read, tags

HEADING = re.compile(r"^### Exercise\b(.*)$", re.MULTILINE)
NUMBERED = re.compile(r" (\d+): (\S.*)")
ORDER = ("check", "stub", "solution", "wrong", "attempt")


@dataclass
class Exercise:
    """One exercise of a chapter.

    Args:
        name: of its check, without ``check_``.
        title: from its heading.
        number: from its heading.
        check: code of the check cell: an import by name, or the check itself.
        stub: code of the student's start.
        solution: code of the right answer.
        wrong: code of each known wrong answer.
        attempt: the line that calls the check.
        answer: name of the function (or class, or value) that the attempt hands to the check.
    """

    name: str
    title: str
    number: int
    check: str = ""
    stub: str = ""
    solution: str = ""
    wrong: list[str] = field(default_factory=list)
    attempt: str = ""
    answer: str = ""

    def hint(self, code: str) -> str | None:
        """What the check says to an answer: None when it is right.

        Args:
            code: a cell that defines the answer.
        """
        space: dict[str, Any] = {"__name__": f"exercise_{self.name}"}
        exec(compile(self.check, f"<check of exercise {self.number}>", "exec"), space)
        exec(compile(code, f"<answer to exercise {self.number}>", "exec"), space)
        return space[f"check_{self.name}"].hint(space[self.answer])


def exercises(path: Path | str) -> list[Exercise]:
    """The exercises of a chapter's source.

    Raises:
        EngineError: one is malformed; the message names chapter and exercise.
    """
    path = Path(path).resolve()
    return of_source(read(Chapter(path.parent.name, path.stem, path.parents[3])))


def of_source(source: Source) -> list[Exercise]:
    """The exercises of a chapter as read; see :func:`exercises`."""
    chapter, found, open_one = source.chapter.name, [], None
    for cell in source.cells:
        if cell.cell_type == "markdown":
            headings = HEADING.findall(cell.source)
            if not headings:
                continue
            _complete(chapter, open_one)
            if len(headings) > 1:
                raise EngineError(f"{chapter}: two exercise headings in one cell, one has no code")
            open_one = _opened(chapter, headings[0], len(found) + 1)
            found.append(open_one)
            continue
        kinds = [tag for tag in tags(cell) if tag in ORDER]
        if not kinds:
            continue
        if open_one is None:
            raise EngineError(
                f"{chapter}: a cell tagged {kinds[0]!r} stands before any '### Exercise N: title'"
            )
        _take(chapter, open_one, kinds, cell.source)
    _complete(chapter, open_one)
    names = [e.name for e in found]
    if doubled := sorted({n for n in names if names.count(n) > 1}):
        raise EngineError(f"{chapter}: two exercises have a check called check_{doubled[0]}")
    return found


def _opened(chapter: str, rest: str, number: int) -> Exercise:
    match = NUMBERED.fullmatch(rest.rstrip())
    if match is None or int(match[1]) != number:
        raise EngineError(
            f"{chapter}, exercise {number}: its heading is '### Exercise{rest}', it must be "
            f"'### Exercise {number}: title'"
        )
    return Exercise(name="", title=match[2], number=number)


def _take(chapter: str, exercise: Exercise, kinds: list[str], code: str) -> None:
    where = f"{chapter}, exercise {exercise.number} ({exercise.title})"
    if len(kinds) > 1:
        raise EngineError(f"{where}: a cell is tagged {' and '.join(kinds)}, it must be one")
    kind = kinds[0]
    filled = [k for k in ORDER if getattr(exercise, k)]
    expected = ORDER[len(filled)] if len(filled) < len(ORDER) else None
    if kind != expected and not (kind == "wrong" and filled and filled[-1] == "wrong"):
        raise EngineError(
            f"{where}: a cell tagged {kind!r} where {expected or 'no further cell'!r} was "
            f"expected; the order is {', '.join(ORDER)}"
        )
    if kind == "wrong":
        exercise.wrong.append(code)
        return
    setattr(exercise, kind, code)
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        raise EngineError(f"{where}: the cell tagged {kind!r} is not Python: {error}") from error
    if kind == "check":
        names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
        names += [a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names]
        checks = [name for name in names if name.startswith("check_")]
        if len(checks) != 1:
            raise EngineError(f"{where}: its check cell must define or import one check_...")
        exercise.name = checks[0].removeprefix("check_")
    elif kind == "attempt":
        exercise.answer = _answer(where, exercise.name, tree)


def _answer(where: str, name: str, tree: ast.Module) -> str:
    call = tree.body[0].value if tree.body and isinstance(tree.body[0], ast.Expr) else None
    if (
        len(tree.body) != 1
        or not isinstance(call, ast.Call)
        or getattr(call.func, "id", "") != f"check_{name}"
        or len(call.args) != 1
        or not isinstance(call.args[0], ast.Name)
    ):
        raise EngineError(f"{where}: its attempt cell must be one line, check_{name}(<answer>)")
    return call.args[0].id


def _complete(chapter: str, exercise: Exercise | None) -> None:
    if exercise is None:
        return
    where = f"{chapter}, exercise {exercise.number} ({exercise.title})"
    if missing := [kind for kind in ORDER if not getattr(exercise, kind)]:
        raise EngineError(f"{where}: it has no cell tagged {missing[0]!r}")
    if len(exercise.wrong) < 2:
        raise EngineError(f"{where}: it needs two wrong answers, each its own cell tagged 'wrong'")
