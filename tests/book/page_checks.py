"""What every rendered page must satisfy, as functions that return what is wrong."""

from __future__ import annotations

import contextlib
import functools
import http.server
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WIDTHS = (1280, 390)
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # what is not on this machine has no address: nothing leaves it, and nothing waits
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)
# What a page is, read in the browser. A hidden copy of the title exists for print only.
FACTS = """() => {
  const seen = (e) => e.checkVisibility({visibilityProperty: true, opacityProperty: true});
  const wide = [...document.querySelectorAll("body *")].filter((e) => {
    if (!seen(e) || e.getBoundingClientRect().right <= innerWidth + 1) return false;
    for (let p = e.parentElement; p; p = p.parentElement)
      if (getComputedStyle(p).overflowX !== "visible") return false;
    return true;
  });
  return {
    titles: [...document.querySelectorAll("h1")].filter(seen).length,
    unnamed: [...document.images].filter((i) => !(i.getAttribute("alt") || "").trim())
      .map((i) => i.src.slice(0, 80)),
    broken: [...document.images].filter((i) => i.complete && i.naturalWidth === 0)
      .map((i) => i.src.slice(0, 80)),
    overflow: document.scrollingElement.scrollWidth - innerWidth,
    wide: wide.slice(0, 3).map((e) => e.tagName + "." + e.className),
    formulas: document.querySelectorAll(".bd-article .math").length,
    drawn: document.querySelectorAll(".bd-article .math mjx-container").length,
    faulty: document.querySelectorAll("mjx-merror, [data-mjx-error]").length,
    explorers: [...document.querySelectorAll(".explorer")].map((e) => e.dataset.state || "none"),
    cut: [...document.querySelectorAll(".explorer-chart svg text")].filter(seen).filter((e) => {
      const [own, svg] = [e, e.ownerSVGElement].map((part) => part.getBoundingClientRect());
      return own.left < svg.left - 2 || own.right > svg.right + 2 || own.top < svg.top - 2
        || own.bottom > svg.bottom + 2;
    }).map((e) => e.textContent),
  };
}"""


# the marks of an explorer, not its legend
MARKS = """(block) => [...block.querySelectorAll(".explorer-chart svg .role-mark")]
  .map((e) => e.innerHTML).join("")"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: tests have their own report."""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine and yield its address, ending in a slash."""
    handler = functools.partial(_Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class Visit:
    """A page in the browser with everything it did wrong."""

    page: Any
    outside: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def resize(self, width: int) -> None:
        """Make the window this wide, and wait until what moves has come to rest."""
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.evaluate(
            "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
            ".then(() => Promise.allSettled(document.getAnimations().map((a) => a.finished)))"
            ".then(() => true)"
        )

    def problems(self) -> list[str]:
        """Everything wrong with the page, in words; an empty list for a good one."""
        found = [f"asks another site: {url}" for url in self.outside]
        found += [f"request failed: {url}" for url in self.failed]
        found += [f"console: {text}" for text in self.console]
        found += [f"script error: {text}" for text in self.errors]
        facts = self.page.evaluate(FACTS)
        if facts["titles"] != 1:
            found.append(f"has {facts['titles']} visible h1 headings instead of one")
        found += [f"image without alt text: {source}" for source in facts["unnamed"]]
        found += [f"image does not load: {source}" for source in facts["broken"]]
        if facts["overflow"] > 0 or facts["wide"]:
            found.append(f"wider than the window by {facts['overflow']} px: {facts['wide']}")
        if facts["drawn"] < facts["formulas"] or facts["faulty"]:
            found.append(
                f"{facts['drawn']} of {facts['formulas']} formulas drawn, "
                f"{facts['faulty']} with errors"
            )
        found += [f"explorer is {state}" for state in facts["explorers"] if state != "drawn"]
        found += [f"text is cut in a chart: {words!r}" for words in facts["cut"]]
        return found


@contextlib.contextmanager
def visit(
    browser: Any,
    origin: str,
    path: str,
    width: int = 1280,
    *,
    scripts: bool = True,
    block: str = "",
) -> Iterator[Visit]:
    """Open a page; a request that leaves ``origin`` is recorded, and finds nobody.

    Args:
        browser: A running browser.
        origin: The site's address, ending in a slash.
        path: The page below it.
        width: Width of the window in pixels.
        scripts: Whether JavaScript runs.
        block: Part of an address that is refused, to see what the page does without it.
    """
    page = _page(browser, scripts)
    page.set_viewport_size({"width": width, "height": 900})
    seen = Visit(page)
    own = (origin, "data:", "blob:")
    begun: set[Any] = set()
    ended: set[Any] = set()

    def begins(request: Any) -> None:
        begun.add(request)
        if not request.url.startswith(own):
            seen.outside.append(request.url)

    def fails(request: Any) -> None:
        ended.add(request)
        if request in begun and request.url.startswith(own):  # not one of the page before
            seen.failed.append(request.url)

    listeners = {
        "request": begins,
        "requestfinished": lambda request: ended.add(request),
        "requestfailed": fails,
        "console": lambda m: m.type in ("error", "warning") and seen.console.append(m.text),
        "pageerror": lambda error: seen.errors.append(str(error)),
        "response": lambda r: r.status >= 400 and seen.failed.append(f"{r.status} {r.url}"),
    }
    if block:
        page.route(re.compile(re.escape(origin) + ".*" + re.escape(block)), lambda r: r.abort())
    if "#" in path:  # from the same page it would be a jump, not a visit
        page.goto("about:blank")
    for event, listener in listeners.items():
        page.on(event, listener)
    try:
        page.goto(origin + path, wait_until="load")
        if scripts:
            page.wait_for_function(
                "() => !window.MathJax || !MathJax.startup || !MathJax.startup.promise"
                " || MathJax.startup.promise.then(() => true)"
            )
            page.wait_for_function(
                "() => [...document.querySelectorAll('.explorer')]"
                ".every((e) => ['drawn', 'failed'].includes(e.dataset.state))"
            )
            _settle(page, lambda: begun - ended)
        yield seen
    finally:
        for event, listener in listeners.items():
            page.remove_listener(event, listener)
        page.unroute_all()


def _page(browser: Any, scripts: bool) -> Any:
    """The one page for all visits: a new one costs a process and compiles every script anew."""
    kept = browser.__dict__.setdefault("pages_of_visits", {})
    if scripts not in kept:
        kept[scripts] = browser.new_context(java_script_enabled=scripts).new_page()
    return kept[scripts]


def _settle(page: Any, open_requests: Callable[[], set[Any]], rounds: int = 500) -> None:
    """Wait until no request is open and none begins while two frames are drawn."""
    quiet = 0
    for _ in range(rounds):
        page.evaluate(
            "() => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 10)))"
        )
        quiet = 0 if open_requests() else quiet + 1
        if quiet == 3:
            return
    raise AssertionError(f"requests that never end: {[r.url for r in open_requests()]}")


def changes(block: Any, press: Callable[[], None]) -> bool:
    """Whether what ``press`` does changes the drawing of an explorer within 60 ms.

    The drawing is compared in the page, as it is large.
    """
    block.evaluate("(e) => { e.drawnBefore = (" + MARKS + ")(e); }")
    press()
    return block.evaluate(
        "async (e) => { const end = performance.now() + 60;"
        "  for (;;) {"
        "    if ((" + MARKS + ")(e) !== e.drawnBefore) return true;"
        "    if (performance.now() > end) return false;"
        "    await new Promise((done) => setTimeout(done, 5)); } }"
    )


def drawing(block: Any) -> str:
    """The marks of an explorer as drawn, so that a change of the chart is seen as one."""
    return block.evaluate(MARKS)


def moved_by_every_control(block: Any) -> list[str]:
    """Names of controls that do not change the chart, by keyboard."""
    still = []
    for control in block.locator("input[type=range], select").all():
        name = control.evaluate("e => e.closest('label') ? e.closest('label').innerText : ''")
        control.focus()
        for key in (
            ("ArrowRight", "ArrowLeft", "ArrowLeft")
            if control.evaluate("e => e.type === 'range'")
            else ("ArrowDown", "ArrowUp", "ArrowUp")
        ):
            if changes(block, functools.partial(control.press, key)):
                break
        else:
            still.append(name or "a control without a label")
    return still


def opens(details: Any) -> bool:
    """Whether a closed box opens by keyboard and shows more than its heading."""
    if details.evaluate("e => e.open"):
        return False
    inner = details.locator("pre").first
    hidden = not inner.is_visible()
    details.locator("summary").first.focus()
    details.page.keyboard.press("Enter")
    return hidden and details.evaluate("e => e.open") and inner.is_visible()
