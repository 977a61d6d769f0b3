"""Pictures on pages: kept as text, shown in rows, switched without a script."""

from __future__ import annotations

import re

import pytest
import torch

from tests.book.conftest import browser  # noqa: F401
from toolkit.labs.generate import film


def images(n: int = 4, side: int = 8, seed: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, side, side, generator=draws) * 2 - 1


def test_images_come_back_from_text_within_half_a_level():
    x = images()
    for levels in (2, 32, 256):
        back = film.decode(film.encode(x, levels))
        assert back.shape == x.shape
        assert float((back - x).abs().max()) <= 1 / (levels - 1) + 1e-6
    assert torch.equal(
        film.decode(film.encode(3 * x)), film.decode(film.encode((3 * x).clamp(-1, 1)))
    )
    again = film.decode(film.encode(x))
    assert film.encode(again) == film.encode(x)


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (lambda: film.encode(torch.zeros(4, 8, 8)), "images"),
        (lambda: film.encode(torch.full((1, 1, 2, 2), float("nan"))), "not finite"),
        (lambda: film.encode(torch.zeros(1, 1, 2, 2), 1), "levels"),
        (lambda: film.decode("2x8x8:32:AAAA"), "not a string that encode made"),
        (lambda: film.decode("nonsense"), "not a string that encode made"),
        (lambda: film.grid_html(images(), " "), "in words"),
        (lambda: film.strip({}, "words"), "rows"),
        (lambda: film.strip({"a": images(2), "b": images(3)}, "words"), "rows"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(bad, word):
    with pytest.raises(ValueError, match=word):
        bad()


def test_figures_carry_their_words_and_ask_nobody():
    one = film.grid_html(images(), "four <grey> squares", columns=2, caption="below")._repr_html_()
    assert one.count("<img") == 1
    assert 'alt="four &lt;grey&gt; squares"' in one
    assert "<figcaption>below" in one
    rows = film.strip({"first": images(3), "second": images(3, seed=1)}, "rows")._repr_html_()
    assert rows.count("<img") == 2
    assert rows.count('class="house-figure"') == 1
    for source in re.findall(r'src="([^"]*)"', one + rows):
        assert source.startswith("data:image/png;base64,")


SAID = {(a, b): f"{a} with {b}" for a in ("one", "two") for b in ("x", "y", "z")}
FRAMES = {key: images(3, seed=n) for n, key in enumerate(SAID)}


def switched(**more):
    given = {"title": "Which?", "alt": "Squares.", "said": SAID, "start": ("two", "y")} | more
    return film.flip(
        given.pop("frames", FRAMES), given.pop("controls", ["number", "letter"]), **given
    )


def test_a_flip_starts_where_it_is_told_and_every_setting_has_a_rule_of_its_own():
    shown = switched(fixed={"always": images(3)})._repr_html_()
    assert shown.count('class="flip-frame"') == 6
    assert shown.count(" checked>") == 2
    assert "<script" not in shown
    assert shown.index("two with y") < shown.index("one with x")  # what stays without rules
    rules = re.findall(r"#(\S+?):has\(#(\S+?):checked\):has\(#(\S+?):checked\) #(\S+?)\{", shown)
    assert len({rule[1:3] for rule in rules}) == len({rule[3] for rule in rules}) == 6
    known = set(re.findall(r'id="([^"]+)"', shown))
    assert {name for rule in rules for name in rule} <= known


@pytest.mark.parametrize(
    "change",
    [
        {"frames": {k: v for k, v in FRAMES.items() if k != ("one", "y")},
         "said": {k: v for k, v in SAID.items() if k != ("one", "y")}},
        {"said": {("one", "x"): "alone"}},
        {"start": ("three", "x")},
        {"controls": ["number"]},
        {"controls": []},
        {"title": ""},
    ],
)  # fmt: skip
def test_a_flip_that_could_not_answer_is_refused(change):
    with pytest.raises(ValueError, match=r"frames|words"):
        switched(**change)


@pytest.mark.browser
@pytest.mark.parametrize("width", [1400, 390])
def test_a_flip_answers_by_keyboard_without_scripts_and_fits_a_phone(browser, width):  # noqa: F811
    context = browser.new_context(
        viewport={"width": width, "height": 900}, java_script_enabled=False
    )
    page = context.new_page()
    try:
        page.set_content(f"<article>{switched()._repr_html_()}</article>")
        seen = page.locator(".flip-said:visible")
        assert seen.all_inner_texts() == ["two with y"]
        page.locator("input:checked").nth(1).focus()
        page.keyboard.press("ArrowRight")
        assert seen.all_inner_texts() == ["two with z"]
        page.get_by_label("one", exact=True).check()
        assert seen.all_inner_texts() == ["one with z"]
        assert page.locator("figure").bounding_box()["width"] <= width
    finally:
        context.close()
