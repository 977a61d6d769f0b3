"""The limits of a chapter's form, as functions that return what exceeds them."""

from __future__ import annotations

import html
import itertools
import json
import re
from typing import Any

from nbformat import NotebookNode

from book.engine.source import Source, tags

HIDDEN = {"remove-cell", "remove-input", "hide-input", "hide-cell"}
CODE_LINES, CELL_LINES, WIDTH, SOURCE_LINES, FIGURES = 150, 25, 88, 700, 7
SCREENS, WORDS, FILLED = 15, 2000, 0.4
WINDOW = (1400, 900)
SPEC = re.compile(r'<script type="application/json" class="explorer-spec">(.*?)</script>', re.S)
SHOWN = re.compile(r'class="(house-figure|explorer|house-table)"|<table border="1"|<style type=')
SENTENCE_IF = re.compile(r"(?:^|[.!?]\s+)If\s", re.MULTILINE)


def of_source(source: Source, text: str) -> list[str]:
    """What of a chapter's source is too long or too wide."""
    visible = [c.source for c in source.code if not HIDDEN & set(tags(c))]
    lines = [line for code in visible for line in code.splitlines()]
    found = []
    if len(lines) > CODE_LINES:
        found.append(f"{len(lines)} visible lines of code, {CODE_LINES} at most")
    found += [f"a line of {len(x)} characters: {x.strip()[:40]}" for x in lines if len(x) > WIDTH]
    long = [code for code in visible if len(code.splitlines()) > CELL_LINES]
    found += [f"a visible cell of {len(code.splitlines())} lines: {code[:40]!r}" for code in long]
    if len(text.splitlines()) >= SOURCE_LINES:
        found.append(f"{len(text.splitlines())} lines of source, fewer than {SOURCE_LINES} wanted")
    for cell in source.run:
        if cell.cell_type == "markdown" and "### Exercise" not in cell.source:
            found += [f"begins with If: {m[0].strip()}" for m in SENTENCE_IF.finditer(cell.source)]
    return found


def of_page(notebook: NotebookNode) -> list[str]:
    """What of a recorded page is too much, unanswered or unclear."""
    found, figures = [], 0
    cells = notebook.cells
    for cell, after in itertools.pairwise([*cells, None]):
        shown = _html(cell)
        kinds = SHOWN.findall(shown)
        figures += len(re.findall(r'class="(?:house-figure|explorer)"', shown))
        found += [f"begins with If: {words[:60]}" for words in _answers(shown) if _if(words)]
        if kinds and 'class="card-first"' not in shown and not _answers_it(after):
            found.append(f"no answer below: {_first_words(cell)}")
        for spec in map(json.loads, SPEC.findall(shown)):
            found += of_explorer(spec)
    if figures > FIGURES:
        found.append(f"{figures} figures, {FIGURES} at most")
    return found


def _html(cell: NotebookNode) -> str:
    parts = [o.get("data", {}).get("text/html", "") for o in cell.get("outputs", [])]
    return "".join("".join(part) for part in parts)


def _answers(shown: str) -> list[str]:
    return [html.unescape(part) for part in re.findall(r'<p class="answer">(.*?)</p>', shown, re.S)]


def _if(words: str) -> bool:
    return bool(SENTENCE_IF.search(words))


def _answers_it(cell: NotebookNode | None) -> bool:
    if cell is None:
        return False
    if cell.cell_type == "markdown":
        return not cell.source.lstrip().startswith("#")
    return bool(_answers(_html(cell)))


def _first_words(cell: NotebookNode) -> str:
    return cell.source.strip().splitlines()[-1][:60]


def of_explorer(spec: dict[str, Any]) -> list[str]:
    """Settings that leave most of the axis empty, and series that hide each other at first."""
    rows = spec["data"]["values"]
    title = spec["description"][:40]
    layer = spec.get("spec", spec)["layer"][0]["encoding"]
    channels = (layer[axis].get("scale", {}) for axis in "yx")  # bars may lie on their side
    scale = next(channel for channel in channels if "domain" in channel)
    low, high = scale["domain"]
    log = scale.get("type") == "log"
    controls = sorted({key for key in rows[0] if re.fullmatch(r"c\d+", key)})
    first = {p["name"].removeprefix("p_"): p["value"] for p in spec["params"]}
    found = []
    for place in sorted({tuple(row[c] for c in controls) for row in rows}, key=str):
        here = [row for row in rows if tuple(row[c] for c in controls) == place]
        if _filled([row["y"] for row in here], low, high, log) < FILLED:
            found.append(f"{title}: {place} fills less than {FILLED:.0%} of the axis")
    here = [r for r in rows if all(_near(r[c], first.get(c, r[c])) for c in controls)]
    series: dict[Any, dict[Any, float]] = {}
    for row in here:
        series.setdefault(row.get("series"), {})[row.get("panel"), row["x"]] = row["y"]
    for (a, one), (b, two) in itertools.combinations(series.items(), 2):
        common = one.keys() & two.keys()
        if common and all(abs(one[x] - two[x]) < 0.01 * (high - low) for x in common):
            found.append(f"{title}: {a} and {b} lie upon each other in the first view")
    return found


def _near(a: Any, b: Any) -> bool:
    return a == b or (not isinstance(a, str) and not isinstance(b, str) and abs(a - b) < 1e-9)


def _filled(values: list[float], low: float, high: float, log: bool) -> float:
    import math

    if log:
        values, low, high = [math.log(v) for v in values], math.log(low), math.log(high)
    return (max(values) - min(values)) / (high - low)


SEEN = """() => {
  const article = document.querySelector("article.bd-article") || document.body;
  const card = article.querySelector(".card-first");
  const out = "pre, .explorer-table, script, style";
  const words = (node) => {
    if (node.nodeType === 3) return (node.textContent.match(/[\\p{L}\\p{N}]+/gu) || []).length;
    if (node.nodeType !== 1 || node.matches(out) || node.matches("mjx-container, svg")) return 0;
    if (node.matches("details:not([open])")) return 0;
    return [...node.childNodes].reduce((sum, child) => sum + words(child), 0);
  };
  const tables = [...article.querySelectorAll("table")].filter((t) => t.checkVisibility());
  return {
    height: article.getBoundingClientRect().height,
    words: words(article),
    card: card ? card.getBoundingClientRect().bottom + scrollY : null,
    long: [...article.querySelectorAll("mjx-container[display='true']")]
      .map((e) => e.scrollWidth - e.clientWidth).filter((more) => more > 2),
    wide: tables.filter((t) => {
      const box = t.closest(".output, .table-scroll, section, article") || article;
      return t.getBoundingClientRect().width > box.getBoundingClientRect().width + 1
        || t.scrollWidth > t.clientWidth + 1;
    }).map((t) => t.innerText.slice(0, 40)),
  };
}"""


def of_screen(page: Any, phone: bool = False) -> list[str]:
    """What a reader's window shows that is too long, too low or too wide.

    Args:
        page: a page in the browser, its window of the size :data:`WINDOW`, or a phone's.
        phone: whether it is a phone, on which only widths count, of tables and formulas.
    """
    seen = page.evaluate(SEEN)
    found = [f"a table is wider than its column: {words!r}" for words in seen["wide"]]
    found += [f"a formula is {more} px wider than its column" for more in seen["long"]]
    if phone:
        return found
    screens = seen["height"] / WINDOW[1]
    if screens > SCREENS:
        found.append(f"{screens:.1f} screens, {SCREENS} at most")
    if seen["words"] > WORDS:
        found.append(f"{seen['words']} words, {WORDS} at most")
    if seen["card"] is None:
        found.append("no card")
    elif seen["card"] > WINDOW[1]:
        found.append(f"the card ends at {seen['card']:.0f} px, below the first screen")
    return found
