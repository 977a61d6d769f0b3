"""The ledger in a browser: readable at forty methods, wide, on a phone, without scripts."""

from __future__ import annotations

import urllib.request

import pytest

from tests.book import ledger_toy
from tests.book.page_checks import visit
from toolkit.core import evidence

pytestmark = pytest.mark.browser

CHAPTER = "book/notebooks/lowrank/lora.html"
FEW, MANY = "book/ledger.html", "book/many.html"
METHODS = sum(len(slugs.split()) for slugs in ledger_toy.METHODS.values())
CLAIMS = 6 * METHODS


def rows(page):
    return page.locator(".ledger tbody tr:visible")


def choose(page, name, value):
    page.get_by_label(name, exact=True).select_option(value)


def said(page) -> str:
    return page.locator(".ledger output").inner_text()


def counts_and_errors(seen):
    """Counts, and the errors to expect, stand above."""
    page = seen.page
    numbers = [int(text.split()[1]) for text in page.locator(".ledger-counts li").all_inner_texts()]
    assert len(numbers) == len(evidence.CLAIM_VERDICTS)
    assert sum(numbers) == CLAIMS
    assert min(numbers) > 0
    words = page.locator(".ledger-errors").inner_text()
    assert "if every true difference were exactly 0" in words.replace("that is, ", "")
    assert f"of the {CLAIMS} claims" in words
    assert f"{numbers[-1]} unstable" in words
    assert "1 declared before measuring and dropped" in words
    assert f"{METHODS} facts" in words


def contrast(seen):
    """Dark text on each tint, in both themes."""
    for theme in ("light", "dark"):
        seen.page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        looks = seen.page.evaluate("""() => [...document.querySelectorAll(
          ".ledger-counts .verdict, .ledger-chapter summary, .ledger-filters button"
        )].map((e) => {
          const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map((v) => {
              v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
          let back = e;
          while (/, 0\\)$|transparent/.test(getComputedStyle(back).backgroundColor)
                 && back.parentElement) back = back.parentElement;
          const [a, b] = [light(getComputedStyle(e).color),
            light(getComputedStyle(back).backgroundColor)].sort((x, y) => y - x);
          return [e.innerText, (a + 0.05) / (b + 0.05)];
        })""")
        assert len(looks) > len(evidence.CLAIM_VERDICTS)
        assert [look for look in looks if look[1] < 4.5] == []


def cards(seen):
    """On a phone claims are cards, and nothing is cut."""
    page = seen.page
    assert page.evaluate("document.querySelector('.ledger').offsetHeight") < 8 * 844
    page.get_by_role("button", name="Open all").click()
    row = rows(page).first
    assert row.evaluate("e => getComputedStyle(e).display") == "flex"
    cells = row.locator("th:visible, td:visible").all()
    boxes = [cell.bounding_box() for cell in cells]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
    verdict, ours = row.locator("[data-label=Verdict]"), row.locator("[data-label=Ours]")
    assert verdict.bounding_box()["y"] < ours.bounding_box()["y"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    targets = page.locator(".ledger-chapter summary").evaluate_all(
        "found => found.map((e) => e.getBoundingClientRect().height)"
    )
    assert min(targets) >= 36


def test_forty_methods_are_boxes_by_part_below_their_counts(browser, toy):
    assert METHODS == 40
    with visit(browser, toy, MANY) as seen:
        page = seen.page
        boxes = page.locator(".ledger-chapter")
        assert boxes.count() == METHODS
        parts = page.locator(".ledger-part > h2").all_inner_texts()
        assert parts == list(ledger_toy.METHODS)
        assert rows(page).count() == 0
        assert page.evaluate("document.querySelector('.ledger').offsetHeight") < 5 * 900
        first = boxes.nth(0)
        assert "6 claims" in first.locator("summary").inner_text()
        assert "1 holds" in first.locator("summary").inner_text()
        first.locator("summary").focus()
        page.keyboard.press("Enter")
        assert rows(page).count() == 6
        assert first.locator(".facts").is_visible()
        first.locator("summary").click()
        counts_and_errors(seen)
        contrast(seen)


@pytest.mark.parametrize("width", [1280, 390])
def test_filters_narrow_open_and_count(browser, toy, width):
    with visit(browser, toy, MANY, width) as seen:
        page = seen.page
        assert said(page) == f"{CLAIMS} of {CLAIMS} claims, in {METHODS} chapters"
        choose(page, "Part", "merge")
        assert page.locator(".ledger-chapter:visible").count() == 4
        assert said(page) == f"24 of {CLAIMS} claims, in 4 chapters"
        assert rows(page).count() == 0  # too many to open them unasked
        page.get_by_role("button", name="Open all").click()
        assert rows(page).count() == 24
        choose(page, "Verdict", "refuted here")
        found = rows(page)
        assert 0 < found.count() <= 12
        texts = found.locator(".verdict").all_inner_texts()
        assert all("refuted here" in text for text in texts)
        choose(page, "Whose", "ours")
        assert rows(page).count() < 12
        assert all(
            "our own question" in text
            for text in rows(page).locator("[data-label=Whose]").all_inner_texts()
        )
        for name in ("Part", "Verdict", "Whose"):
            choose(page, name, "")
        assert said(page).startswith(f"{CLAIMS} of {CLAIMS}")
        assert rows(page).count() == 0
        if width == 390:
            cards(seen)


def test_a_table_whose_rows_are_all_filtered_leaves_no_heading(browser, toy):
    with visit(browser, toy, FEW) as seen:
        page = seen.page
        page.locator(".ledger-chapter summary").click()
        assert rows(page).count() == 8
        assert page.locator(".ledger table:visible").count() == 2
        choose(page, "Scale", "gpu")
        assert rows(page).count() == 4
        assert page.locator(".ledger table:visible").count() == 1
        choose(page, "Verdict", "refuted here")
        assert said(page) == "1 of 8 claims, in 1 chapter"
        page.locator(".ledger-chapter a").first.click()
        page.wait_for_url(f"**/{CHAPTER}")


def test_without_scripts_every_box_opens_and_there_are_no_dead_filters(browser, toy):
    with visit(browser, toy, MANY, scripts=False) as seen:
        page = seen.page
        assert page.locator(".ledger-chapter").count() == METHODS
        assert page.locator(".ledger select, .ledger button").count() == 0
        page.locator(".ledger-chapter summary").nth(3).click()
        assert rows(page).count() == 6


def test_no_built_page_says_that_a_source_gives_no_figure(toy):
    words = "gives no " + "figure"
    for path in (FEW, MANY, CHAPTER):
        with urllib.request.urlopen(toy + path) as answer:
            text = answer.read().decode()
        assert words not in text
        assert "our own question" in text
        assert path != MANY or "not read" in text
