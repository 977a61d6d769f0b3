"""The content security policy: every page has one, runs under it, and runs nothing else."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.book.page_checks import visit

sys.path.append(str(Path(__file__).resolve().parents[2] / "book" / "_ext"))

from motion_book import policy

CHAPTER = "book/notebooks/lowrank/lora.html"
PAGE = """<!DOCTYPE html>
<html><head>
    <meta charset="utf-8" />
    <script>first()</script><script type="application/json">{{"a": 1}}</script>
    <script src="a.js"></script></head>
<body><button onclick="press('x')">b</button><article>{}</article>
<script>last()</script></body></html>
"""


def written(tmp_path, text):
    page = tmp_path / "a.html"
    page.write_bytes(text.encode())
    refused = policy.protect(page)
    text = page.read_bytes().decode()
    rules = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    return text, rules.replace("&#x27;", "'"), refused


def test_scripts_of_the_theme_are_allowed_one_by_one(tmp_path):
    text, rules, refused = written(tmp_path, PAGE.format("words"))
    assert refused == []
    assert rules.count("sha256-") == 5  # two scripts and three handlers; data needs none
    assert "'sha256-fDYmfWjvur9AxjhDbjHe6RvExc05MbXhhrbgz2vvy/A='" in rules  # of first()
    assert "'unsafe-hashes'" in rules
    scripts = re.search(r"script-src ([^;]*);", rules)[1]
    assert "unsafe-inline" not in scripts
    assert "unsafe-eval" not in rules
    assert (
        text.index('charset="utf-8"')
        < text.index("Content-Security-Policy")
        < text.index("<script")
    )


@pytest.mark.parametrize(
    "harm",
    ["<script>harm()</script>", "<SCRIPT>harm()</SCRIPT>", '<script type="module">harm()</script>',
     "<img src=x onerror='harm()'>", "<svg onload=harm()>", "<a href=' JavaScript:harm()'>a</a>"],
)  # fmt: skip
def test_what_stands_in_a_chapter_is_refused_and_named(tmp_path, harm):
    _, clean, _ = written(tmp_path, PAGE.format("words"))
    _, rules, refused = written(tmp_path, PAGE.format(harm))
    assert rules == clean
    assert len(refused) == 1
    assert "harm()" in refused[0]


@pytest.mark.parametrize("text", ["<h1>bare</h1>", "<head></head>", "<html>\r\n<head>\r\n</head>"])
def test_odd_pages_get_one_too_and_only_one(tmp_path, text):
    first, _, _ = written(tmp_path, text)
    assert policy.protect(tmp_path / "a.html") == []
    assert (tmp_path / "a.html").read_bytes().decode() == first


@pytest.mark.browser
def test_every_page_has_a_policy_before_its_first_script(toy, toy_pages):
    folder = toy_pages
    pages = [p for p in folder.rglob("*.html") if p.relative_to(folder).parts[0] != "_static"]
    pages = [p for p in pages if not p.name.startswith("faulty")]
    assert len(pages) > 5
    assert folder / "index.html" in pages
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert text.count(policy.META) == 1, page
        before = text.partition(policy.META)[0]
        assert "<script" not in before, page
        assert "thebe-config" not in text, page


ATTACKS = {
    "script": "<script>window.harmed = 1</script>",
    "handler": '<img alt="x" src="data:," onerror="window.harmed = 1">',
    "script from elsewhere": '<script src="https://example.org/a.js"></script>',
    "script in its address": '<script src="data:text/javascript,window.harmed=1"></script>',
    "style from elsewhere": '<link rel="stylesheet" href="https://example.org/a.css">',
    "picture from elsewhere": '<img alt="x" src="https://example.org/a.png">',
    "frame": '<iframe title="x" src="book/map.html"></iframe>',
    "frame with a text": '<iframe title="x" srcdoc="<script>top.harmed = 1</script>"></iframe>',
    "object": '<object data="data:text/html,<script>1</script>"></object>',
    "base": '<base href="https://example.org/">',
}


@pytest.mark.browser
@pytest.mark.parametrize("kind", ATTACKS)
def test_the_policy_holds(browser, toy, toy_pages, kind):
    folder = toy_pages
    clean = (folder / "book" / "intro.html").read_text(encoding="utf-8")
    name = f"book/faulty_policy_{list(ATTACKS).index(kind)}.html"
    attacked = clean.replace("</article>", f"{ATTACKS[kind]}</article>", 1)
    (folder / name).write_text(attacked, encoding="utf-8")
    with visit(browser, toy, name) as seen:
        assert any("Content Security Policy" in words for words in seen.console)
        assert seen.page.evaluate("window.harmed") is None


CALLS = {
    "text as code": "try { Function('window.harmed = 1')() } catch (e) {}",
    "a request": "fetch('https://example.org/').catch(() => 0)",
    "a beacon": "navigator.sendBeacon('https://example.org/', 'x')",
    "a form": "const f = document.createElement('form'); f.action = 'https://example.org/';"
    "document.body.append(f); f.submit()",
    "a link of code": "const a = document.createElement('a');"
    "a.href = 'javascript:window.harmed=1';"
    "document.body.append(a); a.click()",
    "a worker": "try { new Worker('data:text/javascript,1') } catch (e) {}",
}


@pytest.mark.browser
def test_scripts_of_the_page_are_bound_too(browser, toy):
    with visit(browser, toy, "book/intro.html") as seen:
        seen.page.evaluate(
            "() => document.addEventListener('securitypolicyviolation', (e) => {"
            " window.stopped = e.effectiveDirective; })"
        )
        for kind, call in CALLS.items():
            seen.page.evaluate("() => { window.stopped = null; }")
            # as a script of the page would, not as the browser's driver may
            seen.page.evaluate(
                f"() => new Promise((done) => setTimeout(() => {{ {call}; done() }}))"
            )
            for _ in range(100):
                if seen.page.evaluate("window.stopped"):
                    break
                seen.page.wait_for_timeout(20)
            assert seen.page.evaluate("window.stopped"), kind
            assert seen.page.evaluate("window.harmed") is None, kind


@pytest.mark.browser
def test_the_search_and_the_buttons_of_the_theme_work(browser, toy):
    with visit(browser, toy, "search.html?q=rank") as seen:
        seen.page.locator("#search-results li a").first.wait_for()
        assert seen.problems() == []
    with visit(browser, toy, "book/intro.html") as seen:
        seen.page.evaluate("() => { window.print = () => { window.printed = 1; }; }")
        seen.page.evaluate("() => document.querySelector('[onclick=\"window.print()\"]').click()")
        assert seen.page.evaluate("window.printed") == 1
        assert seen.problems() == []


@pytest.mark.browser
def test_pages_work_from_a_folder_as_well(browser, toy, toy_pages):
    origin = toy_pages.as_uri() + "/"
    for name in ("book/intro.html", CHAPTER):
        with visit(browser, origin, name) as seen:
            assert seen.problems() == []
