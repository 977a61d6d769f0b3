"""Exercises tell right from wrong, and no solution reaches a student."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell

from book.engine import course
from book.engine.exercises import Exercise, of_source
from book.engine.project import Chapter, EngineError, Project
from book.engine.source import read
from tests.book.engine_toy import REPOSITORY, Toy, read_once
from toolkit.core.show import exercise

FIXTURE = [
    "\n## Exercises\n\n### Exercise 1: double it\n\nWrite `double`.\n",
    """
    :tags: [check]
    from toolkit.core.show import exercise

    @exercise.check
    def check_double(answer):
        assert answer(2) == 4, "try it on 2"
        assert answer(3) == 6, "try it on 3"
    """,
    ":tags: [stub]\ndef double(x):\n    return None",
    ":tags: [solution]\ndef double(x):\n    twice_as_much = x + x\n    return twice_as_much",
    ":tags: [wrong]\ndef double(x):\n    return x ** 2",
    ":tags: [wrong]\ndef double(x):\n    return x",
    ":tags: [attempt]\ncheck_double(double)",
]


def fixture(toy: Toy, cells: list[str] = FIXTURE) -> Path:
    text = ""
    for cell in cells:
        cell = textwrap.dedent(cell).strip("\n")
        code = cell.startswith(":tags:")
        text += f"\n```{{code-cell}} python\n{cell}\n```\n" if code else f"\n{cell}\n"
    return toy.chapter("one", "print('start')", tail=text)


SOURCES = sorted((REPOSITORY / "book" / "chapters").glob("*/*.md"))


@pytest.fixture(params=[*SOURCES, None], ids=[*(p.stem for p in SOURCES), "fixture"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Every chapter's source, and a small one made here."""
    return request.param or fixture(Toy(tmp_path))


def chapter_of(path: Path) -> Chapter:
    return Chapter(path.parent.name, path.stem, path.parents[3])


def exercises(path: Path) -> list[Exercise]:
    return of_source(read_once(chapter_of(path)))


def code_lines(code: str) -> set[str]:
    """Its lines that say something, without white space: `return x` alone tells nobody anything."""
    lines = {re.sub(r"\s+", "", line) for line in code.splitlines()}
    return {line for line in lines if len(line) >= 12 and not line.startswith("#")}


def test_the_book_has_exercises() -> None:
    for path in SOURCES:
        designed = "**Exercise 3: Design an experiment.**" in path.read_text(encoding="utf-8")
        assert len(exercises(path)) + designed >= 3, f"{path.stem} has too few exercises"


def test_checks_tell_right_from_wrong_and_why(source: Path) -> None:
    found = exercises(source)
    assert found
    for task in found:
        where = f"exercise {task.number} ({task.title})"
        assert task.hint(task.solution) is None, f"{where}: the solution fails its check"
        assert task.hint(task.stub), f"{where}: the stub passes its check"
        hints = [task.hint(code) for code in task.wrong]
        assert all(hints), f"{where}: a wrong answer passes: {hints}"
        assert len(set(hints)) == len(hints), f"{where}: two answers get the same hint: {hints}"


def test_no_solution_reaches_a_student(source: Path) -> None:
    notebook = course.student(read_once(chapter_of(source)), "https://example.org/repository")
    nbformat.validate(notebook)
    text = re.sub(r"\s+", "", "\n".join(cell.source for cell in notebook.cells))
    for task in exercises(source):
        given = code_lines(task.stub) | code_lines(task.check)
        own = code_lines(task.solution) - given
        assert own, f"exercise {task.number}: the stub already holds the whole solution"
        for line in own:
            assert line not in text, f"exercise {task.number}: students see {line!r}"
        for kept in (task.check, task.stub, task.attempt):
            assert re.sub(r"\s+", "", kept) in text
    tagged = {tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])}
    assert not tagged & {"solution", "wrong"}
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    assert "@REPOSITORY@" not in text


def test_a_leaked_solution_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course, "HIDDEN_FROM_STUDENTS", {"wrong"})
    with pytest.raises(AssertionError, match=r"students see '.*twice_as_much"):
        test_no_solution_reaches_a_student(fixture(Toy(tmp_path)))


def test_both_sets_are_written_and_the_former_ones_removed(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    fixture(toy)
    (toy.root / "toolkit/core/show.py").unlink()
    toy.write("toolkit/core/show/__init__.py", "")
    toy.write("toolkit/core/show/exercise.py", Path(exercise.__file__).read_text(encoding="utf-8"))
    old = toy.write("_build/course/student/alpha/gone.ipynb", "{}")
    command = toy.start("course")
    said, _ = command.communicate(timeout=60)
    assert command.returncode == 0, said
    folder = toy.root / "_build" / "course"
    assert f"1 chapter: {folder / 'student'}" in said
    assert not old.exists()
    student, instructor = (
        nbformat.read(folder / who / "alpha" / "one.ipynb", as_version=4)
        for who in ("student", "instructor")
    )
    text = "\n".join(cell.source for cell in instructor.cells)
    assert "**Wrong answer 1.** The check says: *try it on 3*" in text
    assert "**Wrong answer 2.** The check says: *try it on 2*" in text
    assert "twice_as_much = x + x" in text
    # Run from top to bottom, the right answer is in force when the check is called.
    assert text.index("return x ** 2") < text.index("twice_as_much") < text.rindex("check_double(")
    for notebook in (student, instructor):
        nbformat.validate(notebook)
        parameters = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
        assert len(parameters) == 1
        assert 'SCALE = "ci"' in parameters[0].source


def test_the_instructor_sees_the_recorded_outputs(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    (toy.root / "toolkit/core/show.py").unlink()
    toy.write("toolkit/core/show/__init__.py", "")
    toy.write("toolkit/core/show/exercise.py", Path(exercise.__file__).read_text(encoding="utf-8"))
    source = fixture(toy)
    toy.engine("record")
    chapter = Chapter("alpha", "one", toy.root)
    teacher = course.instructor(read(chapter), Project(toy.root))
    outputs = {c.source: c.outputs for c in teacher.cells if c.cell_type == "code"}
    assert outputs["print('start')"][0].text == "start\n"
    assert outputs["check_double(double)"][0].text.startswith("Right")
    pupil = course.student(read(chapter), "")
    assert [c.outputs for c in pupil.cells if c.get("outputs")] == []
    page = nbformat.read(chapter.page, as_version=4)
    hidden = [c for c in page.cells if "hide-cell" in c.metadata.get("tags", [])]
    assert [c.source for c in hidden] == [course.exercises(source)[0].solution]


def without(tag: str) -> list[str]:
    cells = [c for c in FIXTURE if f"[{tag}]" not in c]
    if tag == "wrong":
        cells.insert(-1, FIXTURE[4])  # one of the two
    return cells


def replaced(old: str, new: str) -> list[str]:
    return [cell.replace(old, new) for cell in FIXTURE]


MALFORMED = {
    "no check": (without("check"), "a cell tagged 'stub' where 'check' was expected"),
    "no stub": (without("stub"), "a cell tagged 'solution' where 'stub' was expected"),
    "no solution": (without("solution"), "a cell tagged 'wrong' where 'solution' was expected"),
    "one wrong answer": (without("wrong"), "it needs two wrong answers"),
    "no attempt": (without("attempt"), "it has no cell tagged 'attempt'"),
    "number": (replaced("Exercise 1:", "Exercise 2:"), "it must be '### Exercise 1: title'"),
    "title": (
        replaced("Exercise 1: double it", "Exercise 1"),
        "it must be '### Exercise 1: title'",
    ),
    "heading": (FIXTURE[1:], "a cell tagged 'check' stands before any"),
    "two tags": (replaced("[stub]", "[stub, check]"), "tagged stub and check, it must be one"),
    "check name": (replaced("check_double", "examine"), "must define or import one check_..."),
    "call": (
        replaced("check_double(double)", "check_double(2)"),
        "must be one line, check_double(",
    ),
    "syntax": (replaced("def double(x):\n    return None", "def ("), "is not Python"),
    "doubled": (
        FIXTURE + replaced("Exercise 1", "Exercise 2"),
        "have a check called",
    ),
    "two headings": (
        replaced("Write", "### Exercise 2: more\n\nWrite"),
        "two exercise headings in one cell",
    ),
}


@pytest.mark.parametrize(("cells", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_exercise_is_named(tmp_path: Path, cells: list[str], message: str) -> None:
    path = fixture(Toy(tmp_path), cells)
    with pytest.raises(EngineError, match=r"^alpha/one") as caught:
        course.exercises(path)
    assert message in str(caught.value)
    with pytest.raises(EngineError):
        course.build(Project(tmp_path), lambda _: None)
    assert not (tmp_path / "_build" / "course").exists(), "nothing half-done is left"


def test_a_wrong_answer_that_passes_is_refused(tmp_path: Path) -> None:
    fixture(Toy(tmp_path), replaced("return x ** 2", "return 2 * x"))
    with pytest.raises(EngineError, match=r"exercise 1 \(double it\): wrong answer 1 passes"):
        course.build(Project(tmp_path), lambda _: None)


def test_answers_need_only_what_the_check_imports(source: Path) -> None:
    for task in exercises(source):
        for code in (task.stub, task.solution, *task.wrong):
            assert ast.parse(code).body, "an answer cell is empty"
            assert new_code_cell(code).source == code
