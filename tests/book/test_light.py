"""What is left out of a page: only what no page uses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx", reason="the extra book is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "book" / "_ext"))

from motion_book import light

MOST = 2.5e6
CHAPTER = "book/notebooks/lowrank/lora.html"
STYLE = """
.used{color:red} .never{color:red} p.used>.never{a:b} a,.never{c:d}
.used:not(.never){e:f} .x\\:y{g:h} [class*="never"]{i:j}
@media (max-width: 600px){.used{k:l} .never{m:n}} @media print{.never{o:p}}
@font-face{font-family:"Icons";src:url(a.woff2)} :root{--size:1em}
"""


def test_rules_of_unused_classes_go_and_all_others_stay():
    kept = light.pruned(STYLE, {"used", "x:y"})
    for rule in ("color:red", "e:f", "g:h", "i:j", "k:l", "--size:1em", "a.woff2"):
        assert rule in kept
    for rule in ("a:b", "m:n", "o:p", "print", ".never{c"):
        assert rule not in kept
    assert "a{c:d}" in kept.replace(" ", "")
    assert light.pruned(STYLE, {"used", "never", "x:y"}).count("never") == STYLE.count("never")


@pytest.mark.browser
def test_a_page_is_light_and_its_icons_are_drawn(browser, toy):
    from tests.book.page_checks import visit

    sizes: dict[str, int] = {}
    with visit(browser, toy, CHAPTER) as seen:
        page = seen.page
        page.on("response", lambda r: sizes.setdefault(r.url, len(r.body())))
        page.reload()
        page.wait_for_load_state("networkidle")
        assert 2e5 < sum(sizes.values()) < MOST, sorted(sizes.items(), key=lambda s: -s[1])[:5]
        wide = page.evaluate(
            """() => [...document.querySelectorAll('.article-header-buttons [class*="fa-"]')]
            .filter((e) => e.offsetParent).map((e) => e.getBoundingClientRect().width)"""
        )
    assert wide
    assert min(wide) > 8
