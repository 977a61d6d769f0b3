"""Keys of code: what changes one, and what does not."""

from __future__ import annotations

import ast
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest

from toolkit.core.runs.code import Tracer, differences, digest

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "toolkit/__init__.py": '_EXPORTS = {"adapt": "toolkit.core.adapted"}\n__version__ = "1"\n',
    "toolkit/core/__init__.py": "",
    "toolkit/core/declare/__init__.py": "",
    "toolkit/core/adapted.py": "from toolkit.core import deep\ndef adapt(): return deep.far()\n",
    "toolkit/core/deep.py": "from toolkit.core.deeper import WIDTH\ndef far(): return WIDTH\n",
    "toolkit/core/deeper.py": "WIDTH = 3\nHEIGHT = 4\n",
    "toolkit/core/declare/catalogue.py": (
        "def catalogue(): return []\ndef find_class(name): return None\n"
    ),
    "toolkit/core/show.py": """
        from toolkit.core.declare.catalogue import catalogue
        def later():
            from toolkit.core.deeper import WIDTH
            return WIDTH
        def listed(): return catalogue()
        """,
    "toolkit/alpha/__init__.py": "",
    "toolkit/alpha/one.py": "class One:\n    value = 1\n",
    "toolkit/alpha/two.py": "from .one import One\nclass Two(One):\n    value = 2\n",
    "toolkit/labs/alpha/one.py": '''
        """The lab."""
        from __future__ import annotations
        import math
        from typing import TYPE_CHECKING
        import toolkit
        from toolkit import adapt
        from toolkit.alpha import one, two
        from toolkit.core import deeper
        if TYPE_CHECKING:
            from pathlib import Path

        RATE = 0.1
        TABLE = {"a": two.Two}
        READY = []
        READY.append(RATE)

        def marked(f):
            return f

        @marked
        def job(seed):
            """Run."""
            rate = RATE  # of learning
            return rate * seed + helper(TABLE, deeper.HEIGHT) + math.pi

        def helper(table, deeper=1):
            from toolkit.core.show import later
            return later() + len(table) + adapt() + deeper

        def unrelated():
            return toolkit.alpha
        ''',
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for path, text in FILES.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
    return tmp_path


LAB = "toolkit/labs/alpha/one.py"
USE = "from toolkit.labs.alpha.one import job"


def key(root: Path, *cells: str) -> dict[str, str]:
    return Tracer(root).of_source(cells or (USE,))


def edit(root: Path, path: str, old: str, new: str) -> None:
    text = (root / path).read_text(encoding="utf-8")
    assert old in text
    (root / path).write_text(text.replace(old, new), encoding="utf-8")


def names(found: dict[str, str]) -> set[str]:
    return {key.removeprefix("toolkit/") for key in found}


def test_names_are_followed_definition_by_definition(project: Path) -> None:
    assert names(key(project)) == {
        "labs/alpha/one.py:job",
        "labs/alpha/one.py:marked",
        "labs/alpha/one.py:helper",
        "labs/alpha/one.py:RATE",
        "labs/alpha/one.py:TABLE",
        "labs/alpha/one.py:READY",
        "labs/alpha/one.py:<module>",
        "alpha/two.py:Two",
        "alpha/one.py:One",
        "core/deeper.py:HEIGHT",
        "core/deeper.py:WIDTH",
        "core/show.py:later",
        "core/adapted.py:adapt",
        "core/deep.py:far",
    }


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        (LAB, '"""Run."""', '"""Run one job."""'),
        (LAB, '    """Run."""\n', ""),
        (LAB, "  # of learning", "  # a rate\n\n"),
        (LAB, '"""The lab."""', '"""Another."""\n\n\n'),
        (LAB, "import Path", "import Path, PurePath"),
        (LAB, "if TYPE_CHECKING:\n    from pathlib import Path\n", ""),
        (LAB, "rate = RATE", "rate = (RATE)"),
        (LAB, "return toolkit.alpha", "return 7"),
        (LAB, "def unrelated", "def another(): return 1\n\ndef unrelated"),
        ("toolkit/core/show.py", "return catalogue()", "return 1"),
        ("toolkit/__init__.py", '"1"', '"2"'),
        ("toolkit/core/deeper.py", "HEIGHT = 4", "# tall\n\n\nHEIGHT = 4\nDEPTH = 5"),
    ],
)
def test_edits_that_change_no_number_change_no_key(
    project: Path, path: str, old: str, new: str
) -> None:
    before = key(project)
    edit(project, path, old, new)
    assert key(project) == before


@pytest.mark.parametrize(
    ("path", "old", "new", "words"),
    [
        (LAB, "RATE = 0.1", "RATE = 0.2", ["RATE changed"]),
        (LAB, "@marked\n", "", ["job changed", "marked is no longer used"]),
        (LAB, "return f\n", "return staticmethod(f)\n", ["marked changed"]),
        (LAB, "READY.append(RATE)", "READY.append(1)", ["what it runs when imported changed"]),
        (LAB, "rate = RATE", "speed = rate = RATE", ["job changed"]),
        (LAB, "import math", "import cmath as math", ["job changed"]),
        ("toolkit/alpha/one.py", "value = 1", "value = 5", ["One changed"]),
        ("toolkit/alpha/two.py", "Two(One)", "Two(One, object)", ["Two changed"]),
        ("toolkit/alpha/two.py", "value = 2", "value = 3", ["Two changed"]),
        ("toolkit/core/deeper.py", "HEIGHT = 4", "HEIGHT = 5", ["HEIGHT changed"]),
        ("toolkit/core/deeper.py", "WIDTH = 3", "WIDTH = 5", ["WIDTH changed"]),
        ("toolkit/core/adapted.py", "deep.far()", "-deep.far()", ["adapt changed"]),
        ("toolkit/core/show.py", "    return WIDTH", "    return -WIDTH", ["later changed"]),
    ],
)
def test_edits_that_may_change_a_number_change_the_key(
    project: Path, path: str, old: str, new: str, words: list[str]
) -> None:
    before = key(project)
    edit(project, path, old, new)
    said = differences(before, key(project))
    assert [line.partition(": ")[2] for line in said] == words
    assert digest(before) != digest(key(project))


def test_a_moved_definition_is_told_as_moved(project: Path) -> None:
    before = key(project)
    edit(project, "toolkit/core/deeper.py", "WIDTH = 3\n", "")
    edit(project, "toolkit/core/deep.py", "from toolkit.core.deeper import WIDTH\n", "WIDTH = 3\n")
    edit(project, "toolkit/core/show.py", "core.deeper import WIDTH", "core.deep import WIDTH")
    assert differences(before, key(project)) == [
        "toolkit/core/deep.py: WIDTH moved here from toolkit/core/deeper.py"
    ]


ONE, TWO = "alpha/one.py:One", "alpha/two.py:Two"
ADAPT = {"core/adapted.py:adapt", "core/deep.py:far", "core/deeper.py:WIDTH"}
BOTH = {"core/deeper.py:WIDTH", "core/deeper.py:HEIGHT"}
LISTED = {"core/show.py:listed", "core/declare/catalogue.py:catalogue"}
CATALOGUE = {"core/declare/catalogue.py:catalogue", ONE, TWO}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import numpy", set()),
        ("import toolkit", set()),
        ("import toolkit.alpha.one", set()),
        ("from toolkit.alpha import one", set()),
        ("from toolkit import adapt", ADAPT),
        ("import toolkit as t\nt.adapt()", ADAPT),
        ("from toolkit import adapt as put", ADAPT),
        ("from toolkit import One", {ONE}),
        ("from toolkit import Two", {TWO, ONE}),
        ("import toolkit\ntoolkit.Two()", {TWO, ONE}),
        ("import toolkit\ntoolkit.alpha.one.One()", {ONE}),
        ("import toolkit.alpha.one as o\no.One.value", {ONE}),
        ("from toolkit.alpha.two import Two", {TWO, ONE}),
        ("from toolkit.alpha.two import One", {ONE}),
        ("from toolkit import core\ncore.deeper.WIDTH", {"core/deeper.py:WIDTH"}),
        ("%matplotlib inline\n!ls\ndef f():\n    from toolkit import One", {ONE}),
        ("import importlib\nimportlib.import_module('toolkit.alpha.one')", {ONE}),
        ("import importlib\nimportlib.import_module(name)", {ONE, TWO}),
        ("from toolkit.alpha import *", {ONE, TWO}),
        ("from toolkit.alpha import two\ngetattr(two, name)", {TWO, ONE}),
        ("from toolkit.core import deeper\nvars(deeper)", BOTH),
        ("from toolkit.core import deeper\ndeeper.unknown", BOTH),
        ("from toolkit.core import deeper\ndef f(deeper): return deeper", set()),
        ("from toolkit.core import deeper\n[deeper for deeper in x]", set()),
        ("from toolkit import catalogue\ncatalogue()", CATALOGUE),
        ("from toolkit.core.declare.catalogue import catalogue", CATALOGUE),
        ("from toolkit.core.show import listed", LISTED),
        ("this is not Python", set()),
    ],
)
def test_what_a_cell_reaches(project: Path, code: str, expected: set[str]) -> None:
    if "import catalogue" in code:
        text = '{"adapt": "toolkit.core.adapted", "catalogue": "toolkit.core.declare.catalogue"}'
        edit(project, "toolkit/__init__.py", '{"adapt": "toolkit.core.adapted"}', text)
    assert names(key(project, code)) == expected


def test_cells_share_their_names(project: Path) -> None:
    assert names(key(project, "from toolkit.core import deeper", "print(deeper.WIDTH)")) == {
        "core/deeper.py:WIDTH"
    }


def test_a_decorator_that_registers_counts_for_whoever_reads_the_registry(project: Path) -> None:
    text = """
        TABLE = {}
        def register(f):
            TABLE[f.__name__] = f
            return f
        @register
        def first(): return 1
        def second(): return 2
        """
    (project / "toolkit/core/table.py").write_text(textwrap.dedent(text), encoding="utf-8")
    found = names(key(project, "from toolkit.core.table import TABLE"))
    assert {"core/table.py:first", "core/table.py:TABLE"} <= found
    assert "core/table.py:second" not in found


def test_subclasses_that_announce_themselves_count(project: Path) -> None:
    text = """
        ALL = []
        class Base:
            def __init_subclass__(cls): ALL.append(cls)
        class Kind(Base): pass
        class Apart: pass
        """
    (project / "toolkit/core/kinds.py").write_text(textwrap.dedent(text), encoding="utf-8")
    found = names(key(project, "from toolkit.core.kinds import ALL"))
    assert {"core/kinds.py:Kind", "core/kinds.py:Base"} <= found
    assert "core/kinds.py:Apart" not in found


def test_two_imports_that_change_places_change_the_key(project: Path) -> None:
    head = "from toolkit.core.deeper import WIDTH as a, HEIGHT as b\n"
    (project / "toolkit/core/swap.py").write_text(head + "def f(): return a - b\n")
    before = key(project, "from toolkit.core.swap import f")
    edit(project, "toolkit/core/swap.py", "WIDTH as a, HEIGHT as b", "WIDTH as b, HEIGHT as a")
    assert key(project, "from toolkit.core.swap import f") != before


def test_a_file_that_is_not_python_stops_nothing(project: Path) -> None:
    (project / "toolkit/alpha/one.py").write_text("class One(:\n", encoding="utf-8")
    assert names(key(project, "from toolkit.alpha.two import Two")) == {TWO}


def test_line_endings_do_not_count(project: Path) -> None:
    before = key(project)
    file = project / LAB
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert key(project) == before


def here(seed: int) -> float:
    return float(seed)


def test_a_function_is_followed_like_a_cell() -> None:
    from toolkit.core.train.fit import dress

    found = Tracer(ROOT).of_function(dress)
    assert {"toolkit/core/train/fit.py:dress", "toolkit/core/adapt/put.py:adapt"} <= found.keys()
    assert list(Tracer(ROOT).of_function(here)) == ["tests/core/test_code_keys.py:here"]


def test_functions_whose_code_cannot_be_followed_are_refused() -> None:
    def inner() -> None: ...

    for function in (inner, lambda: 1, partial(here, 1), len, sys.exit):
        with pytest.raises(ValueError, match="Define it with `def` at the top level of a module"):
            Tracer(ROOT).of_function(function)


def test_each_file_is_parsed_once(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    real = ast.parse
    monkeypatch.setattr(ast, "parse", lambda s, *a, **k: parsed.append(s) or real(s, *a, **k))
    tracer = Tracer(project)
    cell = "import toolkit\nprint(toolkit)"
    first = tracer.of_source([cell])
    assert len(parsed) == len(list(project.rglob("*.py"))) + 1
    assert tracer.of_source([cell]) == first
    assert parsed[-1] == cell, "only the cell is parsed again"


SIZES = """\
STEPS = {"ci": 6, "cpu": 80}


def job(scale):
    seeds = scale.pick(ci=2, cpu=20, gpu=20)
    rate = 1e-2 if scale.name == "ci" else 2e-3
    width = 64 if scale.name != "ci" else 8
    return seeds * rate * STEPS[scale.name] * width * (1 if scale.name == "gpu" else 2)
"""


@pytest.mark.parametrize(
    ("old", "new", "quick"),
    [
        ('"ci": 6', '"ci": 7', True),
        ("ci=2", "ci=3", True),
        ("1e-2", "1e-3", True),
        ("else 8", "else 16", True),
        ('"cpu": 80', '"cpu": 81', False),
        ("cpu=20", "cpu=21", False),
        ("2e-3", "1e-3", False),
        ("64 if", "65 if", False),
        ("(1 if", "(3 if", False),
        ('"ci": 6, "cpu": 80', '"ci": 6, "gpu": 80', False),
    ],
)
def test_what_only_ci_uses_is_no_part_of_a_larger_scale(
    tmp_path: Path, old: str, new: str, quick: bool
) -> None:
    for folder, text in (("before", SIZES), ("after", SIZES.replace(old, new))):
        file = tmp_path / folder / LAB
        file.parent.mkdir(parents=True)
        file.write_text(text, encoding="utf-8")
    keys = {
        scale: [Tracer(tmp_path / f, scale).of_source([USE]) for f in ("before", "after")]
        for scale in ("ci", "cpu")
    }
    assert keys["ci"][0] != keys["ci"][1]
    assert (keys["cpu"][0] == keys["cpu"][1]) == quick
