"""What the book found, as cards: ``{findings}`` reads results and recorded pages.

Each line of the directive names a chapter, one of its claims, and which of its figures to show,
counted from 1: ``lora behind-nats 2``. Words, verdict, number and picture come from the recorded
run, so a card says what its chapter says.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

BOOK = "book"
FIGURE = re.compile(r"<figure[^>]*house-figure.*?<img\s[^>]*?>", re.DOTALL)
ATTRIBUTE = re.compile(r'\b(src|alt)="([^"]*)"')


def setup(app: Sphinx) -> None:
    """Register the directive."""
    app.add_directive("findings", Findings)


class Findings(SphinxDirective):
    """One card for each line: chapter, verdict, the claim in words, its number, a picture."""

    has_content = True
    option_spec: ClassVar = {"folder": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Return the cards as HTML."""
        from toolkit.core import evidence

        self.env.note_reread()
        root = Path(self.env.srcdir)
        folder = root / self.options.get("folder", f"{BOOK}/results")
        try:
            results = {result["slug"]: result for result in evidence.load_results(folder)}
            cards = [self._card(root, results, line) for line in self.content if line.strip()]
        except (LookupError, ValueError) as error:
            raise self.error(f"findings: {error}") from error
        return [nodes.raw("", f'<div class="findings">{"".join(cards)}</div>', format="html")]

    def _card(self, root: Path, results: Mapping[str, Any], line: str) -> str:
        slug, name, number = line.split()
        if slug not in results:
            raise LookupError(f"{slug!r} has no results; there are {sorted(results)}")
        claims = {claim["id"]: claim for claim in results[slug]["claims"]}
        if name not in claims:
            raise LookupError(f"{slug} has no claim {name!r}; there are {sorted(claims)}")
        found = sorted((root / BOOK / "notebooks").glob(f"*/{slug}.ipynb"))
        if not found:
            raise LookupError(f"{slug} has no recorded page")
        pages = list(figures(found[0]))
        if not 0 < int(number) <= len(pages):
            raise LookupError(f"{slug} has {len(pages)} figures, not {number}")
        source, words = pages[int(number) - 1]
        target = found[0].relative_to(root).with_suffix("").as_posix()
        uri = self.env.app.builder.get_relative_uri(self.env.docname, target)
        return card_html(title(found[0]), uri, claims[name], source, words)


def figures(notebook: Path) -> Iterator[tuple[str, str]]:
    """Source and alternative text of each figure that a recorded page shows, in order."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", ()):
            shown = "".join(output.get("data", {}).get("text/html", ""))
            for figure in FIGURE.findall(shown):
                found = dict(ATTRIBUTE.findall(figure[figure.rindex("<img") :]))
                yield found["src"], html.unescape(found.get("alt", ""))


def title(notebook: Path) -> str:
    """The first heading of a recorded page."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        heading = re.search(r"^# (.+)$", "".join(cell["source"]), re.MULTILINE)
        if cell["cell_type"] == "markdown" and heading:
            return heading[1].strip()
    raise LookupError(f"{notebook.name} has no heading")


def card_html(name: str, uri: str, claim: Mapping[str, Any], source: str, words: str) -> str:
    """One card.

    Args:
        name, uri: of the chapter.
        claim: as the results hold it, judged.
        source: of the picture, as data.
        words: its alternative text.
    """
    from toolkit.core.evidence.table import verdict_html
    from toolkit.core.show.card import number_text

    return (
        f'<section class="finding"><h3><a href="{html.escape(uri)}">{html.escape(name)}</a></h3>'
        f'<img src="{source}" alt="{html.escape(words)}">'
        f"<p>{verdict_html(claim['verdict'])} {html.escape(claim['text'])} "
        f'<span class="card-number">{html.escape(number_text(claim))}</span></p></section>'
    )
