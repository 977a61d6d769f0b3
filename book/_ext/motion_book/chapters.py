"""What generated pages must know of a chapter: its part, its title, its page, its place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    """The method's name in the catalogue, else the first heading of the chapter's source."""
    from toolkit.core.declare.catalogue import catalogue

    entry = next((e for e in catalogue() if e.slug == slug), None)
    if entry:
        return entry.title
    for source in sources:
        if source.suffix == ".md":
            heading = re.search(r"^# (.+)$", source.read_text(encoding="utf-8"), re.MULTILINE)
            if heading:
                return heading[1].strip()
    return slug


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
