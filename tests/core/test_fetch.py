"""Hosts that do what they should not: a download ends in bounded time, and keeps only the truth."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import socket
import tarfile
import threading
import wave
from contextlib import suppress

import numpy as np
import pytest

from toolkit.core import data
from toolkit.core.data import download, fetch, manifest, readers
from toolkit.core.data.datasets import content_digest

GOOD = b"To be, or not to be, that is the question.\n" * 200
OK = b"HTTP/1.1 200 OK\r\n"


class Host:
    """A host that answers every connection by one function of the socket."""

    def __init__(self, answer):
        self.answer, self.closed, self.asked = answer, threading.Event(), 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/a"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                self.asked += 1
                threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection):
        with connection, suppress(OSError):
            connection.recv(65536)
            self.answer(connection, self)

    def close(self):
        self.closed.set()
        self.socket.close()


@pytest.fixture
def host():
    hosts = []

    def start(answer):
        hosts.append(Host(answer))
        return hosts[-1]

    yield start
    for one in hosts:
        one.close()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(download, "RETRIES", 1)
    monkeypatch.setattr(fetch, "PATIENCE", 20.0)
    return tmp_path / "data"


@pytest.fixture
def promise(monkeypatch):
    """Makes a manifest of one file, and loads it."""

    def load(*urls, reader="text", **facts):
        facts = facts or {"sha256": hashlib.sha256(GOOD).hexdigest(), "bytes": len(GOOD)}
        file = manifest.File("sub/a.txt", urls=urls, **facts)
        entry = manifest.Entry(
            "play", "t", "l", "https://h", "c", (manifest.Form(reader, "n", (file,)),)
        )
        monkeypatch.setattr(manifest, "read_manifest", lambda path: {"play": entry})
        return data.load("play", progress=False)

    return load


def files(folder):
    return [path for path in folder.rglob("*") if not path.is_dir()]


def endless(head):
    def answer(connection, host):
        connection.sendall(head)
        while not host.closed.is_set():
            connection.sendall(b"x" * 65536)

    return answer


def drop_by_drop(head, drop):
    def answer(connection, host):
        connection.sendall(head)
        while not host.closed.wait(0.05):
            connection.sendall(drop)

    return answer


def plain(head, body=GOOD):
    def answer(connection, host):
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    return answer


BOMB = gzip.compress(bytes(5_000_000))


def packed(connection, host):
    body = BOMB
    head = OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
    connection.sendall(head + body)


def moved(target):
    head = f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n"
    return lambda connection, host: connection.sendall(head.encode())


def silent(connection, host):
    host.closed.wait(20)


LOOP = b"HTTP/1.1 302 Found\r\nLocation: /a\r\n"
BAD = {
    "without an end": (endless(OK + b"\r\n"), "too long: sends more than 8,600"),
    "chunks without an end": (
        drop_by_drop(
            OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1000\r\n" + b"x" * 4096 + b"\r\n"
        ),
        "too long: sends more than",
    ),
    "announced too long": (
        endless(OK + b"Content-Length: 99999999999999999999999999999999\r\n\r\n"),
        "too long: announces",
    ),
    "longer than announced": (
        lambda c, host: c.sendall(OK + b"Content-Length: 5\r\n\r\n" + GOOD),
        "truncated: 5 of 8,600",
    ),
    "a lie about nothing": (plain(OK + b"Content-Length: -5\r\n"), r"."),
    "a packed bomb": (packed, "too long|truncated|sends more"),
    "a byte at a time": (drop_by_drop(OK + b"\r\n", b"x"), "did not arrive within 1 s"),
    "headers a byte at a time": (drop_by_drop(OK + b"X-A: ", b"x"), "did not arrive within 1 s"),
    "headers without an end": (endless(OK + b"X-A: "), "LineTooLong|got more than|header line"),
    "nothing at all": (silent, "did not arrive within 1 s"),
    "sent on without an end": (endless(LOOP + b"\r\n"), "sends on more than 5 times"),
    "sent on for ever": (moved("/a"), "sends on more than 5 times"),
    "sent on to a file": (moved("file:///etc/hostname"), "no http or https address"),
    "sent on to ftp": (moved("ftp://127.0.0.1/a"), "no http or https address"),
    "sent on to data": (moved("data:text/plain,x"), "no http or https address"),
    "a part of it": (plain(b"HTTP/1.1 206 Partial Content\r\n"), "answers 206"),
    "an error with the right body": (plain(b"HTTP/1.1 404 Not Found\r\n"), "answers 404"),
    "cut short": (
        lambda c, host: c.sendall(OK + b"Content-Length: 8600\r\n\r\n" + GOOD[:-9]),
        "IncompleteRead",
    ),
    "not http": (lambda c, host: c.sendall(b"\x00\x01\x02\r\n\r\n" * 50), "."),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_hostile_host_is_bounded_and_leaves_nothing(host, folder, promise, monkeypatch, kind):
    answer, words = BAD[kind]
    if "did not arrive" in words:
        monkeypatch.setattr(fetch, "PATIENCE", 1.0)
    with pytest.raises(data.DataError, match=words):
        promise(host(answer).url)
    assert files(folder) == []
    assert [path for path in folder.rglob("*") if path.name.startswith(".")] == []


@pytest.mark.parametrize("kind", ["without an end", "a byte at a time", "sent on to a file"])
def test_a_good_mirror_after_a_hostile_host_is_used(host, folder, promise, monkeypatch, kind):
    monkeypatch.setattr(fetch, "PATIENCE", 2.0)
    assert promise(host(BAD[kind][0]).url, host(plain(OK)).url) == GOOD.decode()
    assert files(folder) == [folder / "sub" / "a.txt"]


def test_bytes_are_kept_as_they_are_sent(host, folder, promise):
    content = gzip.compress(GOOD)
    facts = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    with pytest.raises(UnicodeDecodeError):  # the reader of texts, after the file was accepted
        promise(host(plain(OK + b"Content-Encoding: x-gzip\r\n", content)).url, **facts)
    assert (folder / "sub" / "a.txt").read_bytes() == content


def test_a_host_is_followed_to_another_path(host, folder, promise):
    def answer(connection, host):
        (plain(OK) if host.asked > 1 else moved("/b/../c"))(connection, host)

    assert promise(host(answer).url) == GOOD.decode()


def test_wrong_content_is_not_asked_for_again_but_a_break_is(host, folder, promise):
    wrong, broken = host(plain(OK, GOOD[::-1])), host(BAD["cut short"][0])
    with pytest.raises(data.DataError):
        promise(wrong.url, broken.url)
    assert (wrong.asked, broken.asked) == (1, 2)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/a", "/etc/hostname"])
def test_only_web_addresses_are_fetched(folder, promise, url):
    with pytest.raises(data.DataError, match="no http or https address"):
        promise(url)
    assert files(folder) == []


@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling", "device"])
def test_what_stands_in_the_place_of_a_file_is_named_and_left(host, folder, promise, kind):
    there = folder / "sub" / "a.txt"
    there.parent.mkdir(parents=True)
    {
        "pipe": lambda: os.mkfifo(there),
        "folder": there.mkdir,
        "dangling": lambda: there.symlink_to(folder / "nowhere"),
        "device": lambda: there.symlink_to("/dev/zero"),
    }[kind]()
    before, good = there.lstat(), host(plain(OK))
    with pytest.raises(data.ChecksumError, match=r"not a plain file|cannot be read") as error:
        promise(good.url)
    assert str(there) in str(error.value)
    assert there.lstat() == before
    assert good.asked == 0


def test_a_good_file_behind_a_link_is_used_and_left(folder, promise, tmp_path):
    (tmp_path / "elsewhere").write_bytes(GOOD)
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.txt").symlink_to(tmp_path / "elsewhere")
    assert promise() == GOOD.decode()
    assert (folder / "sub" / "a.txt").is_symlink()


@pytest.mark.parametrize("path", ["/etc/a", "../a", "a/../../b", "", "a\\..\\b"])
def test_a_manifest_cannot_lead_out_of_the_data_directory(path):
    with pytest.raises(ValueError, match="inside the data directory"):
        manifest.File(path, sha256="0" * 64, bytes=1)


def test_a_manifest_must_bound_every_file():
    with pytest.raises(ValueError, match="above 0"):
        manifest.File("a", content="0" * 64)


# ------------------------------------------------------------------- archives


def sound(samples):
    made = io.BytesIO()
    with wave.open(made, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(np.asarray(samples, "<i2").tobytes())
    return made.getvalue()


def archive(*members, kinds=()):
    """A packed archive of (name, content) pairs; for the names in `kinds`, (name, type)."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if name not in kinds:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = content, "/etc/hostname"
                tar.addfile(member)
    return made.getvalue()


ONE = ("d/recordings/7_theo_2.wav", sound([1, 2, 3]))
TWO = "d/recordings/8_theo_2.wav"
ARCHIVES = {
    "a bomb beside them": (archive(ONE, ("d/zeros", bytes(3_000_000))), "unpacks to more"),
    "a bomb as a recording": (archive(ONE, (TWO, bytes(3_000_000))), "unpacks to more"),
    "a bomb without an end mark": (gzip.compress(bytes(3_000_000)), "."),
    "twice": (archive(ONE, ONE), r"7_theo_2\.wav is there twice"),
    "a link": (archive(ONE, (TWO, tarfile.SYMTYPE), kinds=[TWO]), "8_theo_2.wav is no plain file"),
    "a hard link": (archive(ONE, (TWO, tarfile.LNKTYPE), kinds=[TWO]), "no plain file"),
    "a pipe": (archive(ONE, (TWO, tarfile.FIFOTYPE), kinds=[TWO]), "no plain file"),
    "a device": (archive(ONE, (TWO, tarfile.CHRTYPE), kinds=[TWO]), "no plain file"),
    "cut": (archive(ONE)[:-20], "not a readable archive"),
    "other numbers": (archive((ONE[0], sound([3, 2, 1]))), "content sha256 is"),
    "outside": (archive(("../../x/recordings/7_theo_2.wav", sound([5]))), "content"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_hostile_archive_is_refused_whole(host, folder, promise, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(readers, "UNPACKED", 1_000_000)
    (tmp_path / "good.tar.gz").write_bytes(archive(ONE))
    digest = content_digest(readers.fsdd_tar([tmp_path / "good.tar.gz"]))
    packing, words = ARCHIVES[kind]
    facts = {"reader": "fsdd_tar", "content": digest, "most": 100_000}
    before = {path for path in tmp_path.rglob("*") if not path.is_dir()}
    with pytest.raises(data.ChecksumError, match=words):
        promise(host(plain(OK, packing)).url, **facts)
    assert {path for path in tmp_path.rglob("*") if not path.is_dir()} == before
    assert promise(host(plain(OK, archive(ONE))).url, **facts).digit.tolist() == [7]


def tls_drop_by_drop(connection, host):
    """The head of a long handshake record, and then hardly anything of it."""
    drop_by_drop(b"\x16\x03\x03\x40\x00", b"x")(connection, host)


DRAWN_OUT = {
    "its headers": ("http", drop_by_drop(OK + b"X-A: ", b"x")),
    "its body": ("http", drop_by_drop(OK + b"\r\n", b"x")),
    "its handshake": ("https", tls_drop_by_drop),
    "nothing": ("http", silent),
}


@pytest.mark.parametrize("proxy", [False, True])
@pytest.mark.parametrize("what", DRAWN_OUT)
def test_nothing_goes_on_after_the_time(host, tmp_path, monkeypatch, what, proxy):
    scheme, answer = DRAWN_OUT[what]
    url = host(answer).url.replace("http", scheme, 1)
    if proxy:
        monkeypatch.setenv("http_proxy", url.replace("https", "http"))
        monkeypatch.setenv("https_proxy", url.replace("https", "http"))
        monkeypatch.setenv("no_proxy", "")
        url = f"{scheme}://nowhere.invalid/a"
    before = {*threading.enumerate()}
    with pytest.raises(fetch.TooSlow):
        fetch.fetch(url, tmp_path / "a", 10_000, 0.3)
    left = [t for t in threading.enumerate() if t not in before and "(work)" in t.name]
    for thread in left:
        thread.join(5)
    assert not any(thread.is_alive() for thread in left)


def test_a_connection_that_is_made_too_late_is_cut(host):
    lines = fetch.Lines()
    lines.cut()
    one = host(silent)
    with socket.create_connection(one.socket.getsockname()) as made:
        lines.keep(made)
        made.settimeout(5)
        assert made.recv(1) == b""
