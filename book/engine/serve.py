"""The rendered site on a local port, for this machine and its reader only.

Any page of the web can make the reader's browser ask local ports, under names of its own. So only
requests for this very address are answered, only with files of the site, and only read.
"""

from __future__ import annotations

import functools
import http.server
import sys
import threading
import urllib.parse
from collections.abc import Callable
from http import HTTPStatus
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from book.engine.project import EngineError, Project
from book.engine.site import site

NAMES = ("127.0.0.1", "localhost")
LONGEST = 2000  # characters of an address
SECONDS = 30  # without a byte
CONNECTIONS = 64  # at once; a browser opens six
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}


class Handler(http.server.SimpleHTTPRequestHandler):
    """Answers GET and HEAD with plain files of one folder; writes no line for each of them."""

    timeout = SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the terminal for the address."""

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):  # whatever the method is called
            return self._refuse_method
        raise AttributeError(name)

    def _refuse_method(self) -> None:
        self.send_error(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET and HEAD are answered")

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if self.command not in ("GET", "HEAD"):
            self.send_header("Allow", "GET, HEAD")
        super().end_headers()

    def send_head(self) -> BytesIO | BinaryIO | None:
        """Check the request, then answer as the base class does."""
        port = self.server.server_address[1]
        hosts = self.headers.get_all("Host", [])
        if hosts not in [[f"{name}:{port}"] for name in NAMES] + (
            [[n] for n in NAMES if port == 80]
        ):
            words = f"This server is known as {NAMES[0]}:{port}; the request names another host"
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST, "Foreign host", words)
        elif len(self.path) > LONGEST:
            words = f"An address has at most {LONGEST} characters"
            self.send_error(HTTPStatus.REQUEST_URI_TOO_LONG, "Too long", words)
        elif not self.path.startswith("/"):
            self.send_error(HTTPStatus.BAD_REQUEST, "An address starts with a slash")
        elif (file := self._file()) is None:
            words = "The site has no such page or file; hidden ones and lists are not shown"
            self.send_error(HTTPStatus.NOT_FOUND, "Not found", words)
        elif file.name == "index.html" and not urllib.parse.urlsplit(self.path).path.endswith(
            ("/", "/index.html")
        ):
            self.send_response(HTTPStatus.MOVED_PERMANENTLY)
            relative = file.parent.relative_to(Path(self.directory).resolve())
            self.send_header("Location", f"/{urllib.parse.quote(relative.as_posix())}/")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.found = str(file)
            return super().send_head()
        return None

    def translate_path(self, path: str) -> str:
        """The file that :meth:`send_head` found, whatever the address says."""
        return self.found

    def _file(self) -> Path | None:
        """The plain file of the site that the address means, if there is one."""
        words = urllib.parse.unquote(self.path.partition("?")[0].partition("#")[0])
        parts = [part for part in words.split("/") if part]
        if any(part.startswith(".") or "\\" in part or "\0" in part for part in parts):
            return None
        root = Path(self.directory).resolve()
        try:
            file = root.joinpath(*parts).resolve()
            if file.is_dir():
                file = (file / "index.html").resolve()
            inside = file.relative_to(root)  # a link may lead out
            hidden = any(part.startswith(".") for part in inside.parts)
            return file if file.is_file() and not hidden else None
        except (OSError, ValueError, RuntimeError):  # a name no disk can have; links in a circle
            return None


class Server(http.server.ThreadingHTTPServer):
    """A thread for each connection, and no more than :data:`CONNECTIONS` of them."""

    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader who leaves before the end of a page is no error."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def server(project: Project, port: int) -> Server:
    """A server of the rendered site on this machine only; port 0 takes any free one.

    Raises:
        EngineError: nothing is rendered yet, or the port is taken.
    """
    if not (site(project) / "index.html").is_file():
        raise EngineError("nothing is rendered yet: run `python -m book.engine build` first")
    handler = functools.partial(Handler, directory=str(site(project)))
    try:
        return Server(("127.0.0.1", port), handler)
    except (OSError, OverflowError) as error:
        raise EngineError(
            f"port {port} cannot be used ({error}); choose another by --port"
        ) from error
