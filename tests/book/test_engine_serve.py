"""What `serve` answers, and what it refuses by name."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from book.engine import serve
from book.engine.project import EngineError, Project
from tests.book.engine_toy import until


@pytest.fixture
def running(tmp_path):
    """A server of a small site; ask it with `ask`."""
    pages = tmp_path / "_build" / "html"
    for name, text in {
        "index.html": "the first page",
        "book/index.html": "a folder's page",
        "book/a b.html": "a b",
        "folder/one.txt": "one",
        ".hidden": "hidden",
        ".git/config": "hidden",
        "book/.buildinfo": "no",
    }.items():
        (pages / name).parent.mkdir(parents=True, exist_ok=True)
        (pages / name).write_text(text)
    (tmp_path / "secret.txt").write_text("a secret")
    (pages / "out.txt").symlink_to(tmp_path / "secret.txt")
    (pages / "up").symlink_to(tmp_path)
    (pages / "circle").symlink_to(pages / "circle")
    (pages / "in.txt").symlink_to(pages / ".hidden")
    (pages / "same.txt").symlink_to(pages / "folder" / "one.txt")
    os.mkfifo(pages / "pipe")
    with serve.server(Project(tmp_path), 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def raw(server, request: bytes) -> bytes:
    with socket.create_connection(server.server_address, timeout=10) as connection:
        connection.sendall(request)
        answer = b""
        while block := connection.recv(65536):
            answer += block
        return answer


def ask(server, path="/", method="GET", host=None, more="") -> tuple[int, bytes, bytes]:
    """Status, headers and body."""
    name = f"127.0.0.1:{server.server_address[1]}" if host is None else host
    lines = [f"{method} {path} HTTP/1.1", *([f"Host: {name}"] if name else []), more]
    answer = raw(server, "\r\n".join(filter(None, lines)).encode() + b"\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), head, body


def test_it_listens_on_this_machine_only(running):
    assert running.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/", b"the first page"),
        ("/index.html", b"the first page"),
        ("/?a=/../..", b"the first page"),
        ("/book/", b"a folder's page"),
        ("/book/a%20b.html", b"a b"),
        ("//folder//one.txt", b"one"),
        ("/same.txt", b"one"),
        ("/folder/one.txt?v=1#x", b"one"),
    ],
)
def test_pages_are_answered(running, path, body):
    status, head, found = ask(running, path)
    assert (status, found) == (200, body)
    for name, value in serve.HEADERS.items():
        assert f"{name}: {value}".encode() in head
    status, head, found = ask(running, path, method="HEAD")
    assert (status, found) == (200, b"")
    assert f"Content-Length: {len(body)}".encode() in head


def test_a_folder_without_its_slash_is_sent_on_within_the_site(running):
    for path in ("/book", "//book", "/book?x=//elsewhere.org/"):
        status, head, _ = ask(running, path)
        assert status == 301
        assert b"\r\nLocation: /book/\r\n" in head + b"\r\n"


CLOSED = [
    "/.hidden", "/%2ehidden", "/.git/config", "/book/.buildinfo", "/in.txt", "/folder/", "/folder",
    "/out.txt", "/up/secret.txt", "/up/", "/circle", "/pipe", "/missing", "/index.html/x",
    "/../secret.txt", "/..%2fsecret.txt", "/..%2F..%2fsecret.txt", "/book/%2e%2e/%2e%2e/secret.txt",
    "/..%5csecret.txt", "/..\\secret.txt", "/%252e%252e/secret.txt", "/index.html%00", "/%00",
    "/a%00/../index.html", "/" + "a" * 1500, "/%ff%fe", "/folder/one.txt%00.html", "/./index.html",
    "//etc/passwd", "/" + "a/" * 900,
]  # fmt: skip


@pytest.mark.parametrize("path", CLOSED)
def test_nothing_but_the_files_of_the_site_is_shown(running, path):
    status, _, body = ask(running, path)
    assert status == 404
    assert b"The site has no such page or file" in body
    assert b"secret" not in body
    assert b"one.txt" not in body


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{}", "127.0.0.1", "127.0.0.1:1", "127.0.0.1:{}.evil.example", "",
     "localhost", "localhost:{}@evil.example", "0.0.0.0:{}", "127.1:{}", "127.0.0.1:{}, evil:{}"],
)  # fmt: skip
def test_foreign_hosts_are_refused(running, host):
    port = running.server_address[1]
    status, _, body = ask(running, host=host.replace("{}", str(port)))
    assert status == 421
    assert f"known as 127.0.0.1:{port}".encode() in body
    assert b"the first page" not in body


def test_two_hosts_are_one_too_many_and_localhost_is_fine(running):
    port = running.server_address[1]
    assert ask(running, more="Host: evil.example")[0] == 421
    assert ask(running, host=f"localhost:{port}")[0] == 200
    assert raw(running, b"GET / HTTP/1.0\r\n\r\n").split()[1] == b"421"


@pytest.mark.parametrize(
    "method",
    ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PATCH", "PROPFIND", "get", "X" * 500],
)
def test_other_methods_are_refused(running, method):
    status, head, _ = ask(running, method=method)
    assert status == 405
    assert b"Allow: GET, HEAD" in head


@pytest.mark.parametrize(
    ("path", "status"),
    [("/" + "a" * 5000, 414), ("/" + "a" * 70_000, 414), ("/?" + "a" * 5000, 414),
     ("http://evil.example/", 400), ("*", 400), ("index.html", 400)],
)  # fmt: skip
def test_odd_addresses_are_refused(running, path, status):
    assert ask(running, path)[0] == status


def test_many_headers_and_garbage_are_refused(running):
    assert ask(running, more="\r\n".join(f"X-{i}: 1" for i in range(200)))[0] == 431
    assert ask(running, more="X: " + "a" * 70_000)[0] == 431
    assert b"the first page" not in raw(running, b"\x00\x01\x02\r\n\r\n")
    assert ask(running)[0] == 200


def test_connections_are_bounded_and_freed(running, monkeypatch, capfd):
    until(lambda: running._free._value == serve.CONNECTIONS)  # a thread of the test before may end
    monkeypatch.setattr(running, "_free", threading.BoundedSemaphore(2))
    idle = [socket.create_connection(running.server_address, timeout=10) for _ in range(2)]
    port = running.server_address[1]
    request = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
    refused = socket.create_connection(running.server_address, timeout=10)
    with refused:
        assert refused.recv(10) == b""
    for connection in idle:
        connection.sendall(request)
        assert connection.recv(65536).startswith(b"HTTP/1.0 200")
        connection.close()
    until(lambda: running._free._value == 2)
    assert ask(running)[0] == 200
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("port", [-1, 70_000])
def test_a_port_that_does_not_exist_is_refused_by_name(running, tmp_path, port):
    with pytest.raises(EngineError, match=f"port {port} cannot be used"):
        serve.server(Project(tmp_path), port)
