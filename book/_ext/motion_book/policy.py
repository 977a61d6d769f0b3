"""A content security policy in every page: what it needs to run, and nothing else.

Scripts lie beside the pages. The few inside a page, put there by the theme, are allowed one by one
by their digests. A script or a handler in a chapter's own text gets none: it would be a way to run
something for whoever can write into an output, so the build warns of it and browsers refuse it.
"""

from __future__ import annotations

import base64
import hashlib
import html
from html.parser import HTMLParser
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

from toolkit.core.io import write_text

LOG = logging.getLogger(__name__)
META = '<meta http-equiv="Content-Security-Policy" content="'
# formulas and tables carry styles of their own; pictures and sounds of outputs stand in the page
RULES = (
    "default-src 'none'; script-src 'self'{scripts}; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; media-src data:; font-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'"
)
# of the theme, on every page: the search reads the other pages, buttons and all
BUTTONS = ("window.print()", "toggleFullScreen()")
LINKS = ("href", "src", "action", "formaction", "xlink:href")
RUN = ("", "text/javascript", "application/javascript", "module", "importmap", "speculationrules")


def setup(app: Sphinx) -> None:
    """Register what takes the live-code settings out, and what writes the policies at the end."""
    app.connect("doctree-resolved", _drop_thebe, priority=900)
    app.connect("build-finished", _protect, priority=900)  # after the first page is written


class Inline(HTMLParser):
    """Scripts and handlers that stand in a page.

    Attributes:
        scripts, handlers: those of the theme, as written.
        foreign: those inside the text of a chapter.
    """

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.scripts: dict[str, None] = {}
        self.handlers: dict[str, None] = {}
        self.foreign: list[str] = []
        self._article = 0
        self._script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        facts = {name: value or "" for name, value in attrs}
        self._article += tag == "article"
        self._script = (
            tag == "script" and "src" not in facts and facts.get("type", "").strip().lower() in RUN
        )
        for name, value in facts.items():
            if name.startswith("on"):
                self._note(self.handlers, value)
        if any(facts.get(name, "").strip().lower().startswith("javascript:") for name in LINKS):
            self.foreign.append(self.get_starttag_text() or tag)

    def handle_endtag(self, tag: str) -> None:
        self._article -= tag == "article"
        self._script = False

    def handle_data(self, data: str) -> None:
        if self._script:
            self._note(self.scripts, data)

    def _note(self, kept: dict[str, None], words: str) -> None:
        if self._article > 0:
            self.foreign.append(words)
        else:
            kept[words] = None


def policy(found: Inline) -> str:
    """The policy of a page with these scripts."""
    handlers = dict.fromkeys((*BUTTONS, *found.handlers))
    digests = [*map(_digest, found.scripts), "'unsafe-hashes'", *map(_digest, handlers)]
    return RULES.format(scripts="".join(f" {one}" for one in digests))


def _digest(words: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(words.encode()).digest()).decode()}'"


def protect(page: Path) -> list[str]:
    """Write the policy into a page that has none; returns the scripts that it refuses."""
    with page.open(encoding="utf-8", newline="") as file:  # a digest counts line ends as they are
        text = file.read()
    if META in text:
        return []
    found = Inline()
    found.feed(text)
    found.close()
    meta = f'{META}{html.escape(policy(found))}" />'
    # behind the encoding, which browsers look for in the first 1,024 bytes; before any script
    for mark in ('<meta charset="utf-8" />', "<head>"):
        before, there, after = text.partition(mark)
        if there:
            write_text(page, f"{before}{there}\n    {meta}{after}")
            return found.foreign
    write_text(page, f"{meta}\n{text}")  # a page without a head: where this stands is one
    return found.foreign


def _protect(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    for page in sorted(Path(app.outdir).rglob("*.html")):
        name = page.relative_to(app.outdir)
        if name.parts[0] in ("_static", "_sources"):
            continue
        for words in protect(page):
            LOG.warning("%s: a script in the text will not run: %.60r", name, words)


def _drop_thebe(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Leave out the settings of live code, whose scripts no page has."""
    for raw in list(doctree.findall(nodes.raw)):
        text = raw.astext().strip()
        if "text/x-thebe-config" in text or text.startswith("<script>kernelName ="):
            raw.parent.remove(raw)
