"""Files written whole: what kills leave, what a full disk says, and what is never touched."""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.core import io

HANGING = """
import sys, time
from toolkit.core import io
def write(path):
    path.write_bytes(b"half")
    print("begun", flush=True)
    time.sleep(60)
io.write_beside(sys.argv[1], write)
"""


@pytest.fixture
def writer(tmp_path):
    """A process in the middle of writing ``a.txt``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, str(tmp_path / "a.txt")],
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert process.stdout.readline() == "begun\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    """As if this process had written nothing so far."""
    monkeypatch.setattr(io, "_swept", set())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_writer_left_is_removed_by_the_next_write(writer, tmp_path):
    (tmp_path / "a.txt").write_text("old")
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert len(names(tmp_path)) == 2
    io.write_text(tmp_path / "b.txt", "new")
    assert names(tmp_path) == ["a.txt", "b.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_what_a_living_writer_works_in_is_left(writer, tmp_path):
    io.write_text(tmp_path / "b.txt", "new")
    io.sweep(tmp_path)
    left = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert [(path / "a.txt").read_bytes() for path in left] == [b"half"]


def test_only_own_folders_are_swept(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (tmp_path / ".a.txt.0123456789ab.pim-part").symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".hidden.part").mkdir()
    (tmp_path / ".b.0123456789ab.pim-part").touch()  # no folder
    before = names(tmp_path)
    io.sweep(tmp_path)
    assert names(tmp_path) == before
    assert (tmp_path / "elsewhere" / "kept").exists()
    io.sweep(tmp_path / "missing")


def test_a_writer_that_replaces_its_file_is_still_known_as_living(tmp_path):
    def write(path):
        shutil.copy(__file__, path.with_name("other"))
        path.with_name("other").replace(path)
        io.sweep(tmp_path)

    io.write_beside(tmp_path / "a", write)
    assert (tmp_path / "a").read_bytes() == Path(__file__).read_bytes()
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "quota")]
)
def test_a_full_disk_names_the_folder(tmp_path, error):
    def write(path):
        path.write_bytes(b"half")
        raise error

    (tmp_path / "a").write_text("old")
    with pytest.raises(io.DiskFull) as caught:
        io.write_beside(tmp_path / "a", write)
    assert f"no space left on the disk that holds {tmp_path}" in str(caught.value)
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_writer_with_its_own_kind_of_error_is_understood_too(tmp_path, monkeypatch):
    def write(path):
        raise RuntimeError("file write failed")

    with pytest.raises(RuntimeError, match="file write failed"):
        io.write_beside(tmp_path / "a", write)
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(io.DiskFull):
        io.write_beside(tmp_path / "a", write)


def test_a_folder_in_the_place_of_a_file_is_refused_by_name(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder: name a file"):
        io.write_text(tmp_path / "a", "words")
    assert names(tmp_path) == ["a"]


def test_long_names_leave_room_for_the_folder_beside(tmp_path):
    name = "ü" * 120
    io.write_text(tmp_path / name, "words")
    assert names(tmp_path) == [name]


def pair(one, two):
    return {"a": lambda file: file.write_text(one), "b": lambda file: file.write_text(two)}


@pytest.mark.parametrize("number", range(5))
def test_files_that_belong_together_are_never_mixed(number, tmp_path, monkeypatch):
    """Broken off before each of the calls that change the folder."""
    io.write_together(tmp_path, pair("old", "old"))
    calls, replace, unlink = [], io.os.replace, Path.unlink

    def breaking(call):
        def wrapped(*args, **kwargs):
            calls.append(call)
            if len(calls) == number:
                raise KeyboardInterrupt
            return call(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(io.os, "replace", breaking(replace))
    monkeypatch.setattr(Path, "unlink", breaking(unlink))
    try:
        io.write_together(tmp_path, pair("new", "new"))
    except KeyboardInterrupt:
        assert 0 < number < 4
    found = {name: (tmp_path / name).read_text() for name in names(tmp_path)}
    assert "b" not in found or set(found.values()) in ({"old"}, {"new"})
    assert len(calls) >= min(number, 3)


def test_of_files_that_belong_together_none_is_moved_before_all_are_whole(tmp_path):
    io.write_together(tmp_path, pair("old", "old"))
    with pytest.raises(OSError, match="too little"):
        io.write_together(tmp_path, pair("new", "new") | {"b": full})
    assert names(tmp_path) == ["a", "b"]
    assert (tmp_path / "a").read_text() == "old"


def full(file):
    file.write_text("half")
    raise OSError("too little")
