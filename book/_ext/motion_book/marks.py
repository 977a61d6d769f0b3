"""A line under the title of a page whose numbers were measured with earlier code.

The engine writes what to say to ``_build/engine/marks.json`` before it renders.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the line, and what makes a page render anew when its line changes."""
    app.connect("env-get-outdated", _outdated)
    app.connect("doctree-read", _insert)
    app.connect("build-finished", _remember)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def _marks(file: Path) -> dict[str, str]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _now(app: Sphinx) -> dict[str, str]:
    return _marks(Path(app.srcdir) / "_build" / "engine" / "marks.json")


def _shown(app: Sphinx) -> Path:
    """The marks that the pages of the last build carry."""
    return Path(app.doctreedir) / "marks.json"


def _outdated(app: Sphinx, env: Any, added: set, changed: set, removed: set) -> list[str]:
    before, now = _marks(_shown(app)), _now(app)
    differ = {name for name in {*before, *now} if before.get(name) != now.get(name)}
    return sorted(differ & env.found_docs)


def _insert(app: Sphinx, doctree: nodes.document) -> None:
    words = _now(app).get(app.env.docname)
    title = next(doctree.findall(nodes.title), None)
    if words and title is not None:
        section = title.parent
        box = nodes.warning("", nodes.paragraph("", words), classes=["stale-numbers"])
        section.insert(section.index(title) + 1, box)


def _remember(app: Sphinx, error: Exception | None) -> None:
    if error is None:
        _shown(app).write_text(json.dumps(_now(app)), encoding="utf-8")
