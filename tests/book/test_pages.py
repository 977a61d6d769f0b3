"""Every page of the book in a browser, wide and on a phone, with the network off.

That each check can fail is proved on a toy book, in test_toy_pages.py, and of each limit in
test_limits.py. A chapter is loaded once for all of it, as loading takes most of the time.
"""

from __future__ import annotations

import io
import re
import urllib.request
from pathlib import Path

import pytest
import yaml
from sphinx.util.inventory import InventoryFile

from tests.book import limits
from tests.book.page_checks import WIDTHS, moved_by_every_control, opens, visit
from tests.book.test_reference import public

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[2]
PHONE = min(WIDTHS)


def toc(node) -> list[str]:
    """Every file a table of contents names, in order."""
    if isinstance(node, list):
        return [name for part in node for name in toc(part)]
    own = [node[key] for key in ("root", "file") if key in node]
    nested = [toc(node[key]) for key in ("parts", "chapters", "sections") if key in node]
    return [*own, *(name for part in nested for name in part)]


def pages() -> list[str]:
    """The book's pages as addresses below its root."""
    table = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    return [f"{Path(name).with_suffix('')}.html" for name in toc(table)]


def notes() -> list[str]:
    """The pages of lab notes, which stand in no table of contents."""
    found = sorted((ROOT / "book" / "results").glob("*.cpu.json"))
    return [f"book/notes/{path.name.removesuffix('.cpu.json')}.html" for path in found]


INDICES = ["genindex.html", "py-modindex.html"]


@pytest.mark.parametrize("path", [*(p for p in pages() if "/notebooks/" not in p), *INDICES])
def test_page_wide_and_on_a_phone(browser, site, path):
    with visit(browser, site, path) as seen:
        assert seen.problems() == []
        seen.resize(PHONE)
        assert seen.problems() == []


@pytest.mark.parametrize("path", notes())
def test_lab_notes_wide_and_on_a_phone_with_every_table_open(browser, site, path):
    with visit(browser, site, path) as seen:
        seen.page.evaluate("document.querySelectorAll('details').forEach((e) => e.open = true)")
        assert seen.problems() == []
        seen.resize(PHONE)
        assert seen.problems() == []
        boxes = seen.page.locator(".notes-table").evaluate_all(
            "found => found.filter((e) => e.scrollWidth > e.parentElement.clientWidth).length"
        )
        assert boxes == 0  # on a phone rows are cards, and none is cut


def test_the_first_address_leads_to_the_first_page(browser, site):
    with visit(browser, site, "index.html") as seen:
        seen.page.wait_for_url(f"**/{pages()[0]}")


@pytest.mark.parametrize("path", [p for p in pages() if "/notebooks/" in p])
def test_chapter_keeps_its_limits_wide_and_on_a_phone_and_all_in_it_answers_and_opens(
    browser, site, path
):
    with visit(browser, site, path) as seen:
        assert seen.problems() == []
        seen.resize(limits.WINDOW[0])
        assert limits.of_screen(seen.page) == []
        seen.resize(PHONE)
        assert seen.problems() == []
        assert limits.of_screen(seen.page, phone=True) == []
        blocks = seen.page.locator(".explorer")
        assert blocks.count() or seen.page.locator(".card-first .house-figure").count() == 1
        for i in range(blocks.count()):
            assert moved_by_every_control(blocks.nth(i)) == []
            numbers = blocks.nth(i).locator(".role-axis-label text").all_text_contents()
            assert not [n for n in numbers if re.fullmatch(r"\W?[\d.]+(\.0|e\W?\d+)", n)]
        solutions = seen.page.locator("div.cell.tag_hide-cell details")
        assert solutions.count() >= 2
        for i in range(solutions.count()):
            assert opens(solutions.nth(i))
    with visit(browser, site, path, scripts=False) as seen:
        tables = seen.page.locator(".explorer table")
        assert tables.count() == seen.page.locator(".explorer").count()
        assert all(tables.nth(i).is_visible() for i in range(tables.count()))


def test_the_rendered_reference_tells_every_public_module_and_rendering_warned_of_nothing(site):
    listing = io.BytesIO(urllib.request.urlopen(f"{site}objects.inv", timeout=10).read())
    found = InventoryFile.load(listing, "", lambda base, name: name)
    assert sorted(set(public(ROOT)) - set(found["py:module"])) == []
    log = ROOT / "_build" / "engine" / "render.log"
    assert "WARNING" not in log.read_text(encoding="utf-8", errors="replace")


def test_search_finds_a_method_offline(browser, site):
    with visit(browser, site, "search.html?q=AdaLoRA") as seen:
        seen.page.wait_for_selector("#search-results li a")
        assert (seen.outside, seen.errors) == ([], [])
