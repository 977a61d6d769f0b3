"""Reading a chapter's source: a MyST text notebook with front matter and tagged cells."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

import jupytext
from nbformat import NotebookNode

from book.engine.project import Chapter, EngineError, suggest

TITLE = re.compile(r"^# (?!#)\s*(.+?)\s*$", re.MULTILINE)
TOKEN = "@REPOSITORY@"  # in a source, stands for the address that pyproject.toml holds
HIDDEN = {"setup": "hide-input", "solution": "hide-cell"}  # tag the engine adds for the page


@dataclass(frozen=True)
class Settings:
    """What the ``chapter:`` block of the front matter may say.

    Args:
        title: short title, if it differs from the heading.
        data: names of the data sets the chapter loads; their hashes are part of its key.
        memory_gib: memory it needs at most, in GiB.
        gpu_gib: GPU memory it needs at scale ``gpu``, in GiB.
        paper: arXiv identifier, for a chapter that is no method of the catalogue.
        code: ``owner/name`` of the official code, likewise.
    """

    title: str = ""
    data: tuple[str, ...] = ()
    memory_gib: float = 2.0
    gpu_gib: float = 16.0
    paper: str = ""
    code: str = ""


@dataclass
class Source:
    """A chapter as read: its cells, its settings and its parameters."""

    chapter: Chapter
    cells: list[NotebookNode]
    title: str
    settings: Settings
    seed: int

    @property
    def run(self) -> list[NotebookNode]:
        """The cells of the page: all but the known wrong answers."""
        return [cell for cell in self.cells if "wrong" not in tags(cell)]

    @property
    def code(self) -> list[NotebookNode]:
        """The code cells of the page, in order."""
        return [cell for cell in self.run if cell.cell_type == "code"]


def tags(cell: NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def read(chapter: Chapter) -> Source:
    """Read a chapter's source.

    Raises:
        EngineError: it cannot be parsed, or lacks its title or its ``parameters`` cell.
    """
    try:
        notebook = jupytext.read(chapter.source, fmt="md:myst")
    except Exception as error:  # jupytext and its YAML reader raise many kinds
        raise EngineError(f"{chapter.name}: the source cannot be read as MyST: {error}") from error
    settings = _settings(chapter.name, notebook.metadata.get("chapter", {}))
    cells = [cell for cell in notebook.cells if cell.source.strip()]
    first = cells[0] if cells else None
    heading = TITLE.search(first.source) if first and first.cell_type == "markdown" else None
    if heading is None:
        raise EngineError(f"{chapter.name}: the first cell must hold the title, '# ...'")
    for cell in cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            extra = [HIDDEN[tag] for tag in tags(cell) if tag in HIDDEN]
            if extra:
                cell.metadata["tags"] = list(dict.fromkeys([*tags(cell), *extra]))
    seed = _parameters(chapter.name, cells)["SEED"]
    return Source(chapter, cells, settings.title or heading[1], settings, seed)


def _settings(name: str, block: object) -> Settings:
    where = f"{name}: `chapter:` in the front matter"
    if not isinstance(block, dict):
        raise EngineError(f"{where} must be a mapping such as {{data: [digits], memory_gib: 2}}")
    known = list(Settings.__dataclass_fields__)
    for key, value in block.items():
        if key not in known:
            raise EngineError(f"{where} has an unknown entry {key!r}{suggest(key, known, known)}")
        if key == "data":
            right = isinstance(value, list) and all(isinstance(v, str) for v in value)
            wanted = "a list of names"
        elif key.endswith("_gib"):
            right = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
            wanted = "a number of GiB above 0"
        else:
            right, wanted = isinstance(value, str), "text (put it in quotes)"
        if not right:
            raise EngineError(f"{where}: {key} is {value!r}, it must be {wanted}")
    return Settings(**{k: tuple(v) if k == "data" else v for k, v in block.items()})


def _parameters(name: str, cells: list[NotebookNode]) -> dict:
    tagged = [c for c in cells if c.cell_type == "code" and "parameters" in tags(c)]
    if len(tagged) != 1:
        raise EngineError(
            f"{name}: {len(tagged)} cells are tagged `parameters`; there must be one, with "
            '`SCALE = "ci"` and `SEED = 0`'
        )
    try:
        found = {k: ast.literal_eval(v) for k, v in assignments(tagged[0].source).items()}
    except (SyntaxError, ValueError) as error:
        raise EngineError(
            f"{name}: the parameters cell may only assign plain values ({error})"
        ) from error
    if found.get("SCALE") != "ci" or type(found.get("SEED")) is not int or len(found) != 2:
        raise EngineError(
            f'{name}: the parameters cell must assign SCALE = "ci" and an integer SEED, nothing '
            f"else; it assigns {found}"
        )
    return found


def assignments(code: str) -> dict[str, ast.expr]:
    """The value node of every top-level ``NAME = value`` of a cell."""
    return {
        target.id: node.value
        for node in ast.parse(code).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def with_scale(code: str, scale: str) -> str:
    """The parameters cell with the scale it ran at; comments and layout stay."""
    value = assignments(code)["SCALE"]
    lines = code.splitlines()
    line = lines[value.lineno - 1].encode()  # ast counts bytes
    new = line[: value.col_offset] + f'"{scale}"'.encode() + line[value.end_col_offset :]
    lines[value.lineno - 1] = new.decode()
    return "\n".join(lines)
