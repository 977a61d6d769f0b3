"""The buttons of a chapter lead to its practice notebook, where there is one.

The theme would open the recorded page on Colab or Binder, with solutions and outputs.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

PAGES, PRACTICE = "book/notebooks/", "book/practice/"


def setup(app: Sphinx) -> None:
    """Register the change of the buttons, after the theme has made them, and the copies."""
    app.connect("html-page-context", _lead, priority=950)
    app.connect("build-finished", _copy)


def _lead(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: Any) -> None:
    name = pagename.replace(PAGES, PRACTICE, 1)
    if not pagename.startswith(PAGES) or not (Path(app.srcdir) / f"{name}.ipynb").is_file():
        return
    for button in _buttons(context.get("header_buttons", [])):
        url = str(button.get("url", ""))
        if "colab.research.google.com" in url or "mybinder.org" in url:
            button["url"] = url.replace(PAGES, PRACTICE, 1)
        elif url.endswith(f"{pagename}.ipynb"):  # the download of the source
            up = "../" * pagename.count("/")
            button["url"] = f"{up}{name}.ipynb"


def _buttons(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All buttons, those inside groups too."""
    inner = [b for button in found for b in _buttons(button.get("buttons", []))]
    return found + inner


def _copy(app: Sphinx, error: Exception | None) -> None:
    source = Path(app.srcdir) / PRACTICE
    if error is None and app.builder.format == "html" and source.is_dir():
        shutil.copytree(source, Path(app.outdir) / PRACTICE, dirs_exist_ok=True)
