"""The book's own Sphinx extension: everything a page needs lies beside it, and tables that
write themselves.

- :mod:`motion_book.assets`: page scripts, styles, the chart runtime and MathJax, all local.
- :mod:`motion_book.light`: what no page uses, left out.
- :mod:`motion_book.policy`: what a page may run and load, in the page itself.
- :mod:`motion_book.repository`: the repository's address, read from ``pyproject.toml``.
- :mod:`motion_book.marks`: a line on pages whose numbers were measured with earlier code.
- :mod:`motion_book.practice`: buttons that lead to a chapter's practice notebook.
- :mod:`motion_book.chapters`: what these ask of a chapter: title, part, address, place.
- :mod:`motion_book.tables`: the directive ``method-map``.
- :mod:`motion_book.heads`: scopes and labels in the tables that Sphinx writes.
- :mod:`motion_book.ledger`: the directive ``claims-ledger``.
- :mod:`motion_book.beds`: the directive ``bed-tables``.
- :mod:`motion_book.findings`: the directive ``findings``.
- :mod:`motion_book.times`: the directive ``reading-times``.
- :mod:`motion_book.notes`: a page of lab notes for each lab, and the directive ``lab-notes``.
- :mod:`motion_book.reference`: the directive ``module-reference``.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    if importlib.util.find_spec("toolkit") is None:  # a checkout whose toolkit is not installed
        sys.path.insert(0, str(app.srcdir))
    from motion_book import (
        assets,
        beds,
        findings,
        heads,
        ledger,
        light,
        marks,
        notes,
        policy,
        practice,
        reference,
        repository,
        tables,
        times,
    )

    assets.setup(app)
    marks.setup(app)
    practice.setup(app)
    repository.setup(app)
    tables.setup(app)
    heads.setup(app)
    ledger.setup(app)
    light.setup(app)
    beds.setup(app)
    findings.setup(app)
    times.setup(app)
    notes.setup(app)
    reference.setup(app)
    policy.setup(app)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
