"""Exercises that answer: a check says right or wrong, and why, and never raises.

>>> from toolkit.core import exercise
>>> @exercise.check
... def check_double(answer):
...     assert answer(2) == 4, "Try it on 2 by hand first."
>>> check_double(lambda x: x + x)
Right: every test of this check passed.
>>> check_double(lambda x: x + 1)
Not yet: Try it on 2 by hand first.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

RIGHT = "every test of this check passed."
NO_HINT = "one of the tests does not agree with your answer."


class Check:
    """A check made by :func:`check`. Call it with the answer; ``hint`` is for tests.

    Args:
        function: Takes the reader's answer and holds ``assert condition, "hint"`` statements. If
            it returns a string, that is printed after "Right:".
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        functools.update_wrapper(self, function)

    def __call__(self, *answer: Any) -> None:
        """Print "Right: ..." or "Not yet: ...".

        Returns nothing, so that a cell that ends with the check shows the sentence alone.
        """
        right, words = self._examine(answer)
        print(f"{'Right' if right else 'Not yet'}: {words}")

    def hint(self, *answer: Any) -> str | None:
        """Return what the reader would be told, or ``None`` if the answer is right."""
        right, words = self._examine(answer)
        return None if right else words

    def _examine(self, answer: tuple[Any, ...]) -> tuple[bool, str]:
        if not answer or answer[0] is None or answer[0] is Ellipsis:
            return False, "there is no answer yet. Write one and run this cell again."
        try:
            praise = self.function(*answer)
        except AssertionError as error:
            if _from_answer(error, answer):
                return False, f"your code raised {_name(error)}"
            return False, str(error) or NO_HINT
        except (Exception, SystemExit) as error:  # an answer may fail in any way
            if _from_answer(error, answer):
                return False, f"your code raised {_name(error)}"
            words = f"your answer does not fit the check ({_name(error)})."
            if "NoneType" in str(error):
                words += " Does your function return a value?"
            return False, words
        return True, praise if isinstance(praise, str) else RIGHT


def check(function: Callable[..., Any]) -> Check:
    """Turn a function of plain ``assert`` statements into a check for readers.

    Args:
        function: Takes the answer (a function, class or value) and asserts, each with a hint.

    Raises:
        TypeError: If ``function`` takes no answer.
        RuntimeError: If Python runs with ``-O``, which removes every ``assert``.
    """
    if not inspect.signature(function).parameters:
        raise TypeError(f"{function.__name__} must take the answer as its argument.")
    if not __debug__:
        raise RuntimeError("checks are made of assert statements: run Python without -O.")
    return Check(function)


def _name(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _from_answer(error: BaseException, answer: tuple[Any, ...]) -> bool:
    """Whether the reader's own code was running when the error arose."""
    own = {code for item in answer for code in _codes(item)}
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in own:
            return True
        trace = trace.tb_next
    return False


def _codes(item: Any) -> Iterator[types.CodeType]:
    """All code objects an answer brings: of a function, of what it nests, of a class."""
    if isinstance(item, types.CodeType):
        yield item
        for constant in item.co_consts:
            yield from _codes(constant)
    elif isinstance(item, (classmethod, staticmethod, types.MethodType)):
        yield from _codes(item.__func__)
    elif isinstance(item, functools.partial):
        yield from _codes(item.func)
    elif isinstance(item, property):
        yield from _codes(item.fget)
    elif hasattr(item, "__code__"):
        yield from _codes(item.__code__)
    elif isinstance(item, type):
        for member in vars(item).values():
            if not isinstance(member, type):
                yield from _codes(member)
    elif type(item).__module__ not in ("builtins", "torch", "numpy"):
        for base in type(item).__mro__:  # an instance of the reader's class
            if base.__module__ == type(item).__module__:
                yield from _codes(base)
