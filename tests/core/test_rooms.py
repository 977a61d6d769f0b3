"""Rooms in order: imports go one way only, lazy and type-only ones included, and in no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (
    "io", "program", "seeds", "scale", "declare", "states", "data", "nets", "adapt", "baselines",
    "train", "lanes", "sample", "runs", "evidence", "show", "sweep",
)  # fmt: skip
PARTS = (
    "lowrank", "reparam", "select", "insert", "merge", "diagnose", "learn", "generate", "control",
)  # fmt: skip


def files(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of every module of the toolkit."""
    found = {}
    for file in sorted((root / "toolkit").rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(file: Path, names: set[str]) -> Iterator[str]:
    """The toolkit's modules that a file imports anywhere: at its top, in functions, for types."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name in names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("toolkit"):
            assert node.level == 0, f"{file}: write the whole name instead of dots"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in names else node.module


def height(module: str) -> tuple[int, str]:
    """How far down the list a module's room stands, and the room."""
    words = module.split(".")[1:]
    if words[0] == "core":
        room = words[1] if len(words) > 1 else ""
        return (0 if not room else 1 + ROOMS.index(room)), f"core.{room}"
    if words[0] in PARTS:
        return 100, words[0]
    return (200, "labs") if words[0] == "labs" else (300, words[0])


def wrong(root: Path) -> list[str]:
    """Imports that go down the list, or from one part to another, and circles."""
    known = files(root)
    graph = {m: sorted(set(imported(f, set(known)))) for m, f in known.items()}
    found = []
    for module, targets in graph.items():
        if module in ("toolkit", "toolkit.__main__"):
            continue
        own, room = height(module)
        for target in targets:
            if target == "toolkit":
                found.append(f"{module} imports the toolkit's front door")
                continue
            other, place = height(target)
            if other > own or (other == own and place != room):
                found.append(f"{module} imports {target}")
    return found + [f"a circle: {' -> '.join(c)}" for c in circles(graph)]


def circles(graph: dict[str, list[str]]) -> list[list[str]]:
    """Circles of imports; a package's door and the files behind it count as they are."""
    done: set[str] = set()
    path: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            path.append(module)
            for target in graph[module]:
                visit(target)
            done.add(path.pop())

    for module in graph:
        visit(module)
    return found


def test_imports_go_one_way() -> None:
    assert wrong(ROOT) == []


def test_every_room_says_what_it_is() -> None:
    for folder in (ROOT / "toolkit").rglob("__init__.py"):
        text = ast.get_docstring(ast.parse(folder.read_text(encoding="utf-8")))
        assert text, f"{folder} opens with no sentence"
        assert text.splitlines()[0].endswith((".", ":")), folder


def test_what_chapters_and_labs_import_has_no_underscore() -> None:
    sources = [*ROOT.glob("book/chapters/*/*.md"), *ROOT.glob("toolkit/labs/**/*.py")]
    for source in sources:
        for line in source.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words[:1] in (["from"], ["import"]) and words[1].startswith("toolkit"):
                assert "._" not in line, f"{source}: {line.strip()}"
                assert " import _" not in line, f"{source}: {line.strip()}"


@pytest.mark.parametrize(
    ("path", "line", "words"),
    [
        ("core/io.py", "def f():\n    from toolkit.core.seeds import generator", "imports"),
        ("core/io.py", "if TYPE_CHECKING:\n    from toolkit.core import data", "imports"),
        ("lowrank/one.py", "import toolkit.diagnose.two", "lowrank.one imports"),
        ("core/data/a.py", "from toolkit.core.data import b", "a circle"),
    ],
)
def test_each_fault_is_seen(tmp_path: Path, path: str, line: str, words: str) -> None:
    texts = {
        "core/io.py": "", "core/seeds.py": "", "core/data/__init__.py": "", "core/data/a.py": "",
        "core/data/b.py": "from toolkit.core.data.a import x", "lowrank/one.py": "",
        "diagnose/two.py": "",
    }  # fmt: skip
    for name, text in {**texts, path: line}.items():
        file = tmp_path / "toolkit" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert any(words in fault for fault in wrong(tmp_path))
