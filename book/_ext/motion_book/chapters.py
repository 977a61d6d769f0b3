"""What generated pages must know of a chapter: its part, its title, its page, its place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

BOOK = "book"


def part_and_title(root: Path, slug: str) -> tuple[str, str]:
    """The folder that a chapter lies in, "other" for none, and its title.

    Args:
        root: the project's folder.
        slug: the chapter's.
    """
    book = root / BOOK
    found = sorted(book.glob(f"chapters/*/{slug}.md"))
    found += sorted(book.glob(f"notebooks/*/{slug}.ipynb"))
    return (found[0].parent.name if found else "other"), _title(slug, found)


def _title(slug: str, sources: Sequence[Path]) -> str:
    """The first heading of the chapter's source, else the method's name in the catalogue."""
    from toolkit.core.declare.catalogue import catalogue

    for source in sources:
        if source.suffix == ".md":
            heading = re.search(r"^# (.+)$", source.read_text(encoding="utf-8"), re.MULTILINE)
            if heading:
                return heading[1].strip()
    return next((entry.title for entry in catalogue() if entry.slug == slug), slug)


def address(env: Any, part: str, slug: str, page: str) -> str | None:
    """The address of a chapter's page, seen from another page; None if the book lacks it.

    Args:
        env: Sphinx's environment.
        part, slug: the chapter's.
        page: the name of the page that links there.
    """
    target = f"{BOOK}/notebooks/{part}/{slug}"
    if target not in env.found_docs:
        return None
    return env.app.builder.get_relative_uri(page, target)


def part_title(root: Path, part: str) -> str:
    """What the table of contents calls a part; its folder's name where it lists none of it.

    Args:
        root: the project's folder.
        part: the folder of its chapters.
    """
    file = root / "_toc.yml"
    contents = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for group in contents.get("parts", ()):
        names = [chapter.get("file", "") for chapter in group.get("chapters", ())]
        if any(name.startswith(f"{BOOK}/notebooks/{part}/") for name in names):
            return str(group.get("caption", part))
    return part


def place(env: Any, page: str) -> tuple[int, str]:
    """Where a page stands in the table of contents, to sort by; what is not in it comes last.

    Args:
        env: Sphinx's environment.
        page: the page's name, as the table of contents has it.
    """
    file = Path(env.srcdir) / "_toc.yml"
    contents = file.read_text(encoding="utf-8") if file.is_file() else ""
    there = page in env.found_docs and page in contents
    return (contents.find(page) if there else len(contents), page)
