"""A check says right or not yet, says why, and never raises.

PYTEST_DONT_REWRITE: the checks below hold plain asserts, as they do in a notebook.
"""

import subprocess
import sys

import pytest

from toolkit.core.show import exercise


@exercise.check
def check_double(answer):
    """Twice the input."""
    assert answer(2) == 4, "Try it on 2 by hand first."
    assert answer(-3) == -6, "What happens below zero?"


def stub(x):
    return None


def crash(x):
    return [][x]


def own_assert(x):
    assert x < 0, "mine"
    return 2 * x


def square(x):
    return x * x


def leave(x):
    sys.exit("bye")


class Doubler:
    def __init__(self, offset=0):
        self.offset = offset

    def __call__(self, x):
        return 2 * x if self.offset == 0 else [][0]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "no answer yet"),
        (..., "no answer yet"),
        (stub, "Try it on 2"),
        (square, "below zero"),
        (crash, "your code raised IndexError: list index out of range"),
        (own_assert, "your code raised AssertionError: mine"),
        (leave, "your code raised SystemExit: bye"),
        (Doubler(1), "your code raised IndexError"),
        (3, "does not fit the check (TypeError"),
    ],
)
def test_wrong_answers_are_told_why(answer, words, capsys):
    check_double(answer)
    said = capsys.readouterr().out
    assert said.startswith("Not yet: ")
    assert words in said
    assert said.count("\n") == 1
    assert words in check_double.hint(answer)


@pytest.mark.parametrize("answer", [lambda x: x + x, Doubler(), Doubler().__call__])
def test_right_answers(answer, capsys):
    check_double(answer)
    assert capsys.readouterr().out == "Right: every test of this check passed.\n"
    assert check_double.hint(answer) is None


def test_a_returned_none_that_breaks_the_check_is_explained():
    @exercise.check
    def check_sum(answer):
        assert answer(1) + 1 == 2, "no"

    assert "Does your function return a value?" in check_sum.hint(stub)


def test_praise_names_and_missing_hint(capsys):
    @exercise.check
    def check_pair(first, second):
        assert first < second
        return "the order is what matters."

    check_pair(1, 2)
    assert capsys.readouterr().out == "Right: the order is what matters.\n"
    assert check_pair.hint(2, 1) == exercise.NO_HINT
    assert check_double.__name__ == "check_double"
    assert check_double.__doc__ == "Twice the input."


def test_a_closure_made_by_the_answer_counts_as_the_answer():
    def maker():
        return lambda x: [][x]

    @exercise.check
    def check_maker(answer):
        assert answer()(1) == 1, "no"

    assert "your code raised IndexError" in check_maker.hint(maker)


def test_a_check_needs_an_answer_and_asserts():
    with pytest.raises(TypeError, match="must take the answer"):
        exercise.check(lambda: None)
    code = "from toolkit.core.show import exercise; exercise.check(lambda a: None)"
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "without -O" in done.stderr
