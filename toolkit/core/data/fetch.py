"""One file from one address: never more bytes, never longer, never from elsewhere than promised.

Hosts are not trusted: they may send without end, a byte a second, packed, or send on to other
kinds of addresses. Whatever they do, a call ends in bounded time with the file or with an error.
"""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urljoin, urlsplit

TIMEOUT = 30  # seconds without a byte
PATIENCE = 30.0  # seconds for a file, and more for each byte:
SLOWEST = 30_000  # bytes a second
REDIRECTS = 5
BLOCK = 4096  # a read waits for a whole block, so a slow host must not be asked for much


class Refused(ValueError):
    """A host sends something else than was promised; asking again would not help."""


class TooSlow(Refused):
    """The file did not arrive within its time."""


class Unreachable(RuntimeError):
    """A host does not answer, or breaks off; asking again may help."""


def fetch(url: str, target: Path, most: int, seconds: float, progress: bool = False) -> None:
    """Write what an address holds to a file.

    Args:
        url: of kind http or https.
        target: is written, and may hold a part after an error.
        most: bytes; a longer answer is refused.
        seconds: for all of it.
        progress: show a bar, if tqdm is installed.

    Raises:
        Refused: too long, or sent on to where nothing is fetched from.
        TooSlow: the time is over.
        Unreachable: no answer, an error of the host, or cut short.
        OSError: the file cannot be written.
    """
    lines, ended = Lines(), threading.Event()
    trouble: list[BaseException] = []

    def work() -> None:
        try:
            _stream(url, target, most, lines, progress)
        except BaseException as error:  # handed over to the thread that waits
            trouble.append(error)
        finally:
            ended.set()

    # A host can draw out every single read, also that of its headers. So another thread reads,
    # which ends when its connections are cut.
    threading.Thread(target=work, daemon=True).start()
    try:
        if not ended.wait(max(seconds, 0.0)):
            raise TooSlow(f"did not arrive within {seconds:.0f} s")
    finally:
        lines.cut()
    if trouble:
        raise trouble[0]


class Lines:
    """The connections of one download, which end together when it is over."""

    def __init__(self) -> None:
        self.over = False
        self._sockets: list[socket.socket] = []

    def keep(self, made: socket.socket) -> None:
        """Remember a connection that was made, or cut it if all is over by now."""
        # a second handle of the same connection: TLS takes the first one over
        self._sockets.append(made.dup())
        if self.over:
            self.cut()

    def cut(self) -> None:
        """End every connection, so that whoever reads from one goes on at once."""
        self.over = True
        while self._sockets:
            with contextlib.suppress(IndexError, OSError), self._sockets.pop() as line:
                line.shutdown(socket.SHUT_RDWR)


def time_for(size: int) -> float:
    """Seconds that a file of so many bytes may take."""
    return PATIENCE + size / SLOWEST


def _stream(url: str, target: Path, most: int, lines: Lines, progress: bool) -> None:
    import requests
    import urllib3

    try:
        with _answer(url, lines) as answer:
            announced = answer.headers.get("Content-Length", "")
            if announced.isdecimal() and int(announced[:20]) > most:
                raise Refused(f"too long: announces {int(announced[:20]):,} bytes, not {most:,}")
            # as it was sent: unpacked it could be of any length
            blocks = answer.raw.stream(BLOCK, decode_content=False)
            with target.open("wb") as file, _bar(most, progress) as bar:
                for block in blocks:
                    if lines.over:
                        return
                    if file.tell() + len(block) > most:
                        raise Refused(f"too long: sends more than {most:,} bytes")
                    file.write(block)
                    bar.update(len(block))
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise Unreachable(_short(error)) from error


def _session(lines: Lines) -> Any:
    """A session of requests that tells of every connection it makes."""
    import requests

    class Session(requests.Session):
        def get_redirect_target(self, resp: Any) -> None:
            """None, or requests would first read the whole body of a redirection."""

    class Adapter(requests.adapters.HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            _tell(self.poolmanager, lines)

        def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
            known = proxy in self.proxy_manager
            manager = super().proxy_manager_for(proxy, **kwargs)
            return manager if known else _tell(manager, lines)

    session = Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, Adapter())
    return session


def _tell(manager: Any, lines: Lines) -> Any:
    """Let a pool manager of urllib3 keep a line of each connection; returns it."""

    def telling(pool: Any) -> Any:
        class Connection(pool.ConnectionCls):
            def _new_conn(self) -> socket.socket:
                made = super()._new_conn()
                lines.keep(made)
                return made

        return type(pool.__name__, (pool,), {"ConnectionCls": Connection})

    pools: Mapping[str, Any] = manager.pool_classes_by_scheme
    manager.pool_classes_by_scheme = {scheme: telling(pool) for scheme, pool in pools.items()}
    return manager


def _answer(url: str, lines: Lines) -> Any:
    """The answer of a host after its redirections, each looked at before it is followed."""
    session = _session(lines)
    for _ in range(REDIRECTS + 1):
        if urlsplit(url).scheme not in ("http", "https"):
            raise Refused(f"{url[:80]!r} is no http or https address")
        answer = session.get(
            url, stream=True, allow_redirects=False, timeout=TIMEOUT,
            headers={"Accept-Encoding": "identity"},
        )  # fmt: skip
        if answer.is_redirect:
            before, url = url, urljoin(url, answer.headers["Location"])
            answer.close()  # its body is of no use and may have no end
            if urlsplit(before).scheme == "https" and urlsplit(url).scheme == "http":
                raise Refused(f"sends on from https to {url[:80]!r}")
            continue
        if answer.status_code != 200:
            answer.close()
            raise Unreachable(f"answers {answer.status_code} {answer.reason[:60]}")
        return answer
    raise Refused(f"sends on more than {REDIRECTS} times")


def _bar(total: int, progress: bool) -> Any:
    if progress and importlib.util.find_spec("tqdm") is not None:
        from tqdm import tqdm

        return tqdm(total=total, unit="B", unit_scale=True)
    return contextlib.nullcontext(SimpleNamespace(update=lambda count: None))


def _short(error: Exception) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:160]}{'...' if len(words) > 160 else ''}"
