"""Downloads, from hosts on this machine; no chapter waits for one."""

import os
import socket
import threading
import time
from pathlib import Path

from toolkit.core.data import fetch

BODY = b"0123456789" * 900
ANSWERS = {
    "plain": [b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n" + BODY],
    "too long": [b"HTTP/1.1 200 OK\r\nContent-Length: 90000\r\n\r\n"],
    "without an end": [b"HTTP/1.1 200 OK\r\n\r\n" + BODY * 2],
    "missing": [b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"],
    "sent on": [b"HTTP/1.1 302 Found\r\nLocation: ftp://nowhere/a\r\n\r\n"],
    "drop by drop": [b"HTTP/1.1 200 OK\r\n\r\n", *[b"x"] * 40],
    "headers drop by drop": [b"HTTP/1.1 200 OK\r\nX-A: ", *[b"x"] * 40],
}


def host(parts: list[bytes]) -> str:
    """The address of a host that answers once, part by part."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listening.accept()
        with connection, listening:
            connection.recv(65536)
            try:
                for part in parts:
                    connection.sendall(part)
                    time.sleep(0.02)
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


def one(name: str, url: str) -> None:
    target = Path("downloaded")
    target.unlink(missing_ok=True)
    try:
        fetch.fetch(url, target, 9000, 0.3 if "drop" in name else 20.0)
    except (fetch.Refused, fetch.Unreachable) as error:
        print(name, type(error).__name__)
    else:
        print(name, target.read_bytes() == BODY)


def main() -> None:
    os.environ["no_proxy"] = "127.0.0.1"
    for name, parts in ANSWERS.items():
        one(name, f"{host(parts)}/a")
    os.environ["http_proxy"] = host(ANSWERS["plain"])
    one("by a proxy", "http://nowhere.invalid/a")
    time.sleep(0.3)  # whoever was cut off says so to nobody


main()
