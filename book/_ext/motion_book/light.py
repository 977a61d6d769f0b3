"""Lighter pages: what no page of the book uses is left out of fonts, styles and scripts.

The theme brings every icon twice (as a font, and as a script that replaces the font), the styles of
every component it knows, and the search index on every page though the search has a page of its
own. All of that is megabytes that a reader on a telephone would wait for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from toolkit.core.io import write_bytes, write_text

# the icons are in a font already; the index and its tools are on the search page
SCRIPTS = re.compile(
    r"\s*<script[^>]*\bsrc=\"[^\"]*(?:scripts/fontawesome|/searchtools|^searchtools|language_data|"
    r"searchindex)\.js[^\"]*\"[^>]*></script>"
)
STYLES = ("pydata-sphinx-theme.css", "sphinx-book-theme.css", "sphinx-design.min.css")
CLASS = re.compile(r"\.(-?[A-Za-z_](?:[\w-]|\\.)*)")
USED = re.compile(r"class=\"([^\"]*)\"")
WORD = re.compile(r"[A-Za-z_][\w-]*")
ICON = re.compile(r"[\ue000-\uf8ff]")


def setup(app: Sphinx) -> None:
    """Register the step at the end of a build, before the policies count what scripts are there."""
    app.connect("build-finished", _lighten, priority=800)


def _lighten(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    out = Path(app.outdir)
    pages = [p for p in sorted(out.rglob("*.html")) if p.relative_to(out).parts[0] != "_static"]
    used: set[str] = set()
    for page in pages:
        with page.open(encoding="utf-8", newline="") as file:
            text = file.read()
        lighter = text if page.name == "search.html" else SCRIPTS.sub("", text)
        if lighter != text:
            write_text(page, lighter)
        for names in USED.findall(lighter):
            used.update(names.split())
    static = out / "_static"
    for script in static.rglob("*.js"):
        if "mathjax" not in script.parts and "fontawesome" not in script.name:
            used.update(WORD.findall(script.read_text(encoding="utf-8")))
    icons: set[str] = set()
    for style in STYLES:
        for file in static.rglob(style):
            text = pruned(file.read_text(encoding="utf-8"), used)
            write_text(file, text)
            icons.update(ICON.findall(text))
    for font in (static / "vendor" / "fontawesome").rglob("*.woff2"):
        write_bytes(font, subset(font, icons))


def pruned(style: str, used: set[str]) -> str:
    """A style sheet without the rules of classes that nothing uses.

    Args:
        style: CSS.
        used: class names of the pages, and words of the scripts, which may set classes.
    """
    import tinycss2

    return "".join(_kept(tinycss2.parse_stylesheet(style, skip_whitespace=True), used))


def _kept(rules: Iterable[Any], used: set[str]) -> Iterable[str]:
    import tinycss2

    for rule in rules:
        if rule.type == "qualified-rule":
            selectors = _split(tinycss2.serialize(rule.prelude))
            left = [s for s in selectors if _names(s) <= used]
            if left:
                yield f"{','.join(left)}{{{tinycss2.serialize(rule.content)}}}"
        elif rule.type == "at-rule" and rule.lower_at_keyword in ("media", "supports"):
            inner = tinycss2.parse_rule_list(rule.content, skip_whitespace=True)
            body = "".join(_kept(inner, used))
            if body:
                yield f"@{rule.at_keyword}{tinycss2.serialize(rule.prelude)}{{{body}}}"
        elif rule.type != "comment":
            yield rule.serialize()


def _split(selectors: str) -> list[str]:
    """The selectors of a list; commas inside brackets do not part them."""
    found, depth, start = [], 0, 0
    for at, sign in enumerate(selectors):
        depth += (sign in "([") - (sign in ")]")
        if sign == "," and depth == 0:
            found.append(selectors[start:at])
            start = at + 1
    return [*found, selectors[start:]]


def _names(selector: str) -> set[str]:
    """Classes that an element must have; those in brackets, as in ``:not(.a)``, may be missing."""
    outside = re.sub(r"\([^()]*(?:\([^()]*\)[^()]*)*\)|\[[^\]]*\]", "", selector)
    return {re.sub(r"\\(.)", r"\1", name) for name in CLASS.findall(outside)}


def subset(font: Path, icons: Iterable[str]) -> bytes:
    """A web font with these characters only."""
    import io
    import logging

    from fontTools import subset as tools

    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it tells of every table
    options = tools.Options(flavor="woff2", layout_features=[], notdef_outline=True)
    loaded = tools.load_font(str(font), options)
    cutter = tools.Subsetter(options)
    cutter.populate(text="".join(sorted(icons)))
    cutter.subset(loaded)
    made = io.BytesIO()
    tools.save_font(loaded, made, options)
    return made.getvalue()
