"""What pages can do and that each check of pages can fail, in a browser on a toy book."""

from __future__ import annotations

import re

import pytest

from tests.book import page_checks, site_toy
from tests.book.page_checks import WIDTHS, drawing, moved_by_every_control, served, visit

pytestmark = pytest.mark.browser

CHAPTER = "book/notebooks/lowrank/lora.html"
TOY_PAGES = ("book/intro.html", "book/map.html", "book/ledger.html", "book/many.html", CHAPTER)


@pytest.mark.parametrize("path", TOY_PAGES)
def test_toy_pages_are_clean_wide_and_on_a_phone(browser, toy, path):
    with visit(browser, toy, path, max(WIDTHS)) as seen:
        assert seen.problems() == []
        seen.resize(min(WIDTHS))
        assert seen.problems() == []


def test_explorer_answers_to_keyboard_mouse_and_list(browser, toy):
    with visit(browser, toy, CHAPTER) as seen:
        page, block = seen.page, seen.page.locator(".explorer")
        slider = page.get_by_label("final budget")
        choice = page.get_by_label("score type")
        first = drawing(block)
        # three methods: four points, line and band; and a pale band under a covered line
        assert first.count("graphics-symbol") == 19
        slider.focus()
        outline = slider.evaluate("e => getComputedStyle(e).outlineStyle")
        assert outline == "solid"
        slider.press("ArrowRight")
        page.wait_for_timeout(100)
        second = drawing(block)
        box = slider.bounding_box()
        page.mouse.click(box["x"] + 3, box["y"] + box["height"] / 2)
        page.wait_for_timeout(100)
        third = drawing(block)
        assert slider.input_value() == "2"
        choice.select_option("sensitivity")
        page.wait_for_timeout(100)
        assert len({first, second, third, drawing(block)}) == 4
        assert moved_by_every_control(block) == []
        assert not block.locator("table").is_visible()
        block.locator("summary").click()
        assert block.locator("table").is_visible()


def test_explorer_fits_a_phone_and_follows_the_window(browser, toy):
    with visit(browser, toy, CHAPTER, 390) as seen:
        page = seen.page

        def width() -> float:
            return page.locator(".explorer-chart svg").bounding_box()["width"]

        assert 300 <= width() <= 390
        sizes = page.locator(".explorer-chart svg text").evaluate_all(
            "found => found.map((e) => parseFloat(getComputedStyle(e).fontSize))"
        )
        assert min(sizes) >= 12
        page.set_viewport_size({"width": 800, "height": 900})
        page.wait_for_function(
            "() => document.querySelector('.explorer-chart svg').clientWidth > 500"
        )


def test_without_javascript_the_table_stands_open(browser, toy):
    with visit(browser, toy, CHAPTER, scripts=False) as seen:
        assert seen.page.locator(".explorer table").is_visible()
        assert seen.page.locator(".explorer tbody tr").count() == len(site_toy.grid())
        assert seen.page.locator(".explorer-chart").inner_text() == ""


def test_without_its_runtime_the_explorer_says_so_and_keeps_the_table(browser, toy):
    with visit(browser, toy, CHAPTER, block="vega-runtime.js") as seen:
        assert "could not be drawn" in seen.page.locator(".explorer-chart").inner_text()
        assert seen.page.locator(".explorer table").is_visible()
        assert "explorer is failed" in seen.problems()


def test_a_live_notebook_draws_the_explorer_with_no_network(browser, tmp_path, monkeypatch):
    monkeypatch.delenv("TOOLKIT_RESULTS", raising=False)
    block = site_toy.explorer()._repr_html_()
    (tmp_path / "live.html").write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><link rel="icon" href="data:,"><h1>Live</h1>{block}'
    )
    with served(tmp_path) as origin, visit(browser, origin, "live.html") as seen:
        assert seen.problems() == []
        assert moved_by_every_control(seen.page.locator(".explorer")) == []


def test_controls_show_their_figure_without_a_kernel(browser, toy):
    with visit(browser, toy, CHAPTER) as seen:
        still = seen.page.locator(".controls-static")
        assert still.locator("img").get_attribute("alt") == "A bent line that follows the sliders."
        assert "rank = 4" in still.inner_text()
        assert seen.page.locator("script[type*=widget]").count() == 0


def test_map_lists_the_catalogue_and_links_its_chapters(browser, toy):
    from toolkit.core.declare.catalogue import catalogue

    with visit(browser, toy, "book/map.html") as seen:
        rows = seen.page.locator(".method-map tbody tr")
        shown = [entry for entry in catalogue() if entry.chapter]  # baselines have none
        assert rows.count() == len(shown)
        text = " ".join(seen.page.locator(".method-map").all_inner_texts())
        assert all(entry.title in text for entry in shown)
        seen.page.get_by_role("link", name="LoRA", exact=True).click()
        seen.page.wait_for_url(f"**/{CHAPTER}")


def test_on_a_phone_the_map_is_cards_whose_labels_are_the_heads(browser, toy):
    told = """() => {
      const table = document.querySelector(".method-map table");
      const cells = [...table.querySelector("tbody tr").cells];
      return {
        over: table.scrollWidth - table.parentElement.clientWidth,
        heads: [...table.querySelectorAll("thead th")].map(h => h.textContent.trim()),
        labels: cells.map(c => getComputedStyle(c, "::before").content),
      };
    }"""
    with visit(browser, toy, "book/map.html", 390) as seen:
        found = seen.page.evaluate(told)
    assert found["over"] <= 0
    assert found["labels"] == ["none", *(f'"{name}"' for name in found["heads"][1:])]


def test_on_a_wide_screen_no_part_of_the_map_is_cut_off(browser, toy):
    over = """() => [...document.querySelectorAll(".method-map table")].map(
      (table) => table.scrollWidth - table.parentElement.clientWidth)"""
    with visit(browser, toy, "book/map.html", 1400) as seen:
        found = seen.page.evaluate(over)
    assert max(found) <= 0, found


def test_launch_buttons_follow_the_repository_address(browser, toy):
    with visit(browser, toy, CHAPTER) as seen:
        for host, place in (("colab.research", "/blob/main/"), ("mybinder.org", "/main?urlpath=")):
            found = seen.page.locator(f"a[href*='{host}']").first.get_attribute("href")
            assert place in found
            assert found.endswith("book/notebooks/lowrank/lora.ipynb")


def test_solution_boxes_open(browser, toy):
    with visit(browser, toy, "book/intro.html") as seen:
        answer = seen.page.get_by_text("At most the inner dimension.")
        assert not answer.is_visible()
        seen.page.locator(".solution.dropdown button.toggle-button").click()
        answer.wait_for(state="visible")


def test_dark_theme_keeps_text_readable(browser, toy):
    with visit(browser, toy, CHAPTER) as seen:
        seen.page.evaluate("document.documentElement.dataset.theme = 'dark'")
        looks = seen.page.evaluate("""() => [".explorer p", ".explorer summary",
            ".explorer label", "table.claims caption", "table.claims td", ".verdict",
            ".controls-static small"].map((name) => {
          const e = document.querySelector(name);
          const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map((v) => {
              v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
          let back = e;
          while (/, 0\\)$|transparent/.test(getComputedStyle(back).backgroundColor)
                 && back.parentElement) back = back.parentElement;
          const [a, b] = [light(getComputedStyle(e).color),
                          light(getComputedStyle(back).backgroundColor)].sort((x, y) => y - x);
          return [name, (a + 0.05) / (b + 0.05)];
        })""")
        assert [look for look in looks if look[1] < 4.5] == []


POLICY = re.compile('<meta http-equiv="Content-Security-Policy"[^>]*>')
# ---------------------------------------------------------------- each check can fail
FAULTS = {
    "asks another site": '<img alt="x" src="https://example.org/picture.png">',
    "console": '<script>console.error("a seeded error")</script>',
    "script error": "<script>undefined_name()</script>",
    "request failed": '<link rel="stylesheet" href="missing.css">',
    "h1 headings": "<h1>Another title</h1>",
    "without alt": '<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">',
    "does not load": '<img alt="x" src="data:image/gif;base64,AAAA">',
    "wider than the window": '<div style="width:3000px">wide</div>',
    "formulas drawn": '<p class="math">never drawn</p>',
    "explorer is failed": '<div class="explorer"><div class="explorer-chart"></div>'
    '<details class="explorer-table"></details></div>',
    "text is cut": '<div class="explorer" data-state="drawn"><div class="explorer-chart">'
    '<svg width="50" height="20"><text y="15">a name that is too long</text></svg></div></div>',
}


def test_seeded_faults_are_caught_and_nothing_else(browser, toy, toy_pages):
    """All on one page, as loading it takes most of the time; each has words of its own."""
    whole = (toy_pages / "book" / "intro.html").read_text(encoding="utf-8")
    clean = POLICY.sub("", whole)  # which refuses some of the faults before they can happen
    assert clean != whole
    faulty = clean.replace("</article>", f"{''.join(FAULTS.values())}</article>", 1)
    assert faulty != clean
    (toy_pages / "book" / "faulty.html").write_text(faulty, encoding="utf-8")
    with visit(browser, toy, "book/faulty.html") as seen:
        problems = seen.problems()
    found = {p: [words for words in FAULTS if words in p] for p in problems}
    assert {words for several in found.values() for words in several} == set(FAULTS)
    assert [p for p, words in found.items() if not words] == []


def test_a_faulty_source_fails_the_toy_build_and_is_named(tmp_path):
    site_toy.make(tmp_path, home="# Home\n\n```{no-such-directive}\n```\n")
    (tmp_path / "book" / "results" / "lora.cpu.json").write_text("{")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    with pytest.raises(RuntimeError) as failure:
        site_toy.build(tmp_path)
    log = str(failure.value)
    assert "no-such-directive" in log
    assert "lora.cpu.json is not readable JSON" in log
    assert "pyproject.toml names no [project.urls] Repository" in log


def test_a_control_that_does_nothing_is_named(browser, toy):
    with visit(browser, toy, CHAPTER) as seen:
        block = seen.page.locator(".explorer")
        block.evaluate(
            "e => e.querySelector('.explorer-controls').insertAdjacentHTML("
            "'beforeend', '<label>idle <select><option>a<option>b</select></label>')"
        )
        assert [name.split()[0] for name in moved_by_every_control(block)] == ["idle"]


def test_launch_arguments_keep_the_browser_off_the_network():
    assert "--disable-background-networking" in page_checks.ARGUMENTS
