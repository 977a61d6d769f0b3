"""Programs whose output nobody reads, or that no disk can take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.book.engine_toy import Toy

ROOT = Path(__file__).resolve().parents[2]


def ran(command: list[str], *, stdout, stderr=subprocess.PIPE) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stdout,
        stderr=stderr, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture
def unread():
    """The writing end of a pipe whose reader is gone."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize(
    "command", [["-m", "toolkit", "list"], ["-m", "toolkit", "show", "lora"],
                ["-u", "-m", "toolkit", "list"]],
)  # fmt: skip
def test_a_reader_that_is_gone_ends_a_program_without_a_word(command, unread):
    done = ran(command, stdout=unread)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_engine_ends_so_too(tmp_path, unread):
    toy = Toy(tmp_path / "project")  # the book's own list asks each of its labs
    toy.chapter("one", "print(1)")
    done = ran(["-m", "book.engine", "list", "--root", str(toy.root)], stdout=unread)
    assert (done.returncode, done.stderr) == (141, "")


def test_help_and_errors_that_nobody_reads_leave_no_trace(unread):
    done = ran(["-m", "benchmarks", "--help"], stdout=unread)
    assert done.returncode in (0, 141)
    assert done.stderr == ""
    done = ran(["-m", "toolkit", "show", "nothing"], stdout=subprocess.PIPE, stderr=unread)
    assert (done.returncode, done.stdout) == (141, "")


PROGRAM = """
import sys
from toolkit.core.program import run_program
def main():
    {}
sys.exit(run_program(main))
"""


@pytest.mark.parametrize(
    ("body", "code"),
    [("print('x' * 100_000)", 1), ("print('x')", 1), ("sys.stdout.write('x'); sys.exit(3)", 1)],
)
def test_a_disk_without_room_for_the_output_is_named(body, code):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        done = ran(["-c", PROGRAM.format(body)], stdout=full)
    assert done.returncode == code
    assert done.stderr.startswith("error: the output, or a file, cannot be written: No space")
    assert "Traceback" not in done.stderr


def test_another_broken_pipe_is_not_taken_for_the_output():
    done = ran(["-c", PROGRAM.format("raise BrokenPipeError('a worker is gone')")],
               stdout=subprocess.PIPE)  # fmt: skip
    assert done.returncode == 1
    assert "BrokenPipeError: a worker is gone" in done.stderr


@pytest.mark.parametrize(("body", "code"), [("return 7", 7), ("pass", 0), ("sys.exit(5)", 5)])
def test_exit_codes_are_kept(body, code):
    assert ran(["-c", PROGRAM.format(body)], stdout=subprocess.PIPE).returncode == code
