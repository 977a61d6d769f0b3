"""Rendering the recorded pages to a site."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import yaml

from book.engine.project import EngineError, Project, no_room

PROGRAM = "import sys; from jupyter_book.cli.main import main; sys.exit(main())"


def site(project: Project) -> Path:
    return project.root / "_build" / "html"


def render(project: Project, say: Callable[[str], None], *, everything: bool = False) -> Path:
    """Build the site with jupyter-book and check that every page came out.

    Args:
        project: its ``_config.yml`` and ``_toc.yml`` lie in the root.
        say: prints one line.
        everything: build all pages anew, not only the changed ones.

    Returns:
        The site's first page.

    Raises:
        EngineError: jupyter-book failed, or a page of the table of contents is missing.
    """
    for name in ("_config.yml", "_toc.yml"):
        if not (project.root / name).is_file():
            raise EngineError(f"{project.root / name} does not exist: there is no book to render")
    folder = project.root / "_build" / "engine"
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    log = folder / "render.log"
    options = ["--path-output", ".", "-q", *(["--all"] if everything else [])]
    lock = filelock.FileLock(folder / "locks" / "render.lock")
    with lock, log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, "build", ".", *options],
            cwd=project.root,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    words = log.read_text(encoding="utf-8", errors="replace")
    missing = [page for page in toc_pages(project) if not (site(project) / page).is_file()]
    if (done.returncode or missing) and (full := no_room(project)):
        raise EngineError(f"the pages are not whole: {full}")
    if done.returncode:
        raise EngineError(f"jupyter-book failed:\n{words[-4000:].strip()}")
    if missing:
        raise EngineError(
            f"these pages of _toc.yml were not rendered: {', '.join(missing)}; see "
            f"{log.relative_to(project.root)}"
        )
    for line in words.splitlines():
        if "WARNING" in line or "ERROR" in line:
            say(line.replace(f"{project.root}/", ""))
    return site(project) / toc_pages(project)[0]


def toc_pages(project: Project) -> list[str]:
    """Every page the table of contents promises, as HTML files, the root first."""
    toc = yaml.safe_load((project.root / "_toc.yml").read_text(encoding="utf-8"))
    if not isinstance(toc, dict) or "root" not in toc:
        raise EngineError("_toc.yml must name its first page with `root:`")
    names = [toc["root"], *_files(toc)]
    return [f"{str(name).removesuffix('.md').removesuffix('.ipynb')}.html" for name in names]


def _files(node: Any) -> Iterator[str]:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if key == "file":
            yield value
        elif isinstance(value, (dict, list)):
            yield from _files(value)
