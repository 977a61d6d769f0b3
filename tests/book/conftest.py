"""A browser, the built book on a local port, and a toy book to try the checks on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from tests.book.page_checks import ARGUMENTS, served

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SOURCES = ("_config.yml", "_toc.yml", "pyproject.toml", "book", "toolkit")


@pytest.fixture(scope="module")
def browser():
    """A headless browser; tests are skipped only where none is installed.

    One for each module: its driver keeps an event loop running in this thread, in which tests of
    other modules could not start their own.
    """
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(NAMES)})")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=found, args=list(ARGUMENTS))
        yield running
        running.close()


@pytest.fixture(scope="session")
def site():
    """Address of the book itself, rendered anew if a source is newer than the pages."""
    pages, stamp = ROOT / "_build" / "html", ROOT / "_build" / ".pages-rendered"
    # the map is written at every rendering, by `make book` as well
    written = [f.stat().st_mtime for f in (stamp, pages / "book" / "map.html") if f.is_file()]
    if not pages.is_dir() or _newest() > max(written, default=0.0):
        begun = _newest()
        done = subprocess.run(
            [sys.executable, "-m", "book.engine", "render"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=280,
        )
        if done.returncode:
            pytest.fail(f"rendering the book failed:\n{(done.stdout + done.stderr)[-4000:]}")
        stamp.touch()
        if _newest() > begun:  # a source changed meanwhile: the next run renders again
            stamp.unlink()
    with served(pages) as origin:
        yield origin


def _newest() -> float:
    files = [ROOT / name for name in SOURCES if (ROOT / name).is_file()]
    for name in SOURCES:
        files += [
            p for p in (ROOT / name).rglob("*") if p.is_file() and "__pycache__" not in p.parts
        ]
    return max(file.stat().st_mtime for file in files)


@pytest.fixture
def unrendered(monkeypatch):
    """Builds leave jupyter-book out, which takes seconds: test_engine_site.py tests rendering."""
    from book.engine import site

    def render(project, say, *, everything=False):
        return site.site(project) / "book" / "intro.html"

    monkeypatch.setattr(site, "render", render)


@pytest.fixture(scope="session")
def toy_pages(tmp_path_factory):
    """Folder of the toy book's pages, built once for all processes of a run."""
    from tests.book import site_toy

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of one process; the next one up is the run's
    root, done = shared / "toy", shared / "toy.built"
    with filelock.FileLock(shared / "toy.lock"):
        if not done.is_file():
            shutil.rmtree(root, ignore_errors=True)  # a build that failed in another process
            site_toy.build(site_toy.make(root))
            done.touch()
    return root / "_build" / "html"


@pytest.fixture(scope="session")
def toy(toy_pages):
    """Address of the toy book."""
    with served(toy_pages) as origin:
        yield origin
