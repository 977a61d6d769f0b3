"""The directive ``bed-tables``: what the reference arms reached on a test bed, from its results.

``{bed-tables} characters`` reads ``book/results/beds/characters.cpu.json`` at every build; nobody
types the numbers. A bed that was not measured yet says so, with the command that measures it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def setup(app: Sphinx) -> None:
    """Register the directive."""
    app.add_directive("bed-tables", BedTables)


class BedTables(SphinxDirective):
    """Two tables for one bed: the arms, and the differences that 8 and 20 seeds settle."""

    required_arguments = 1
    option_spec: ClassVar = {"folder": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Return the tables, each in a container that scrolls when the page is narrow."""
        from toolkit.labs.beds import reference

        self.env.note_reread()
        name = self.arguments[0]
        if name not in reference.BEDS:
            raise self.error(f"no bed {name!r}; choose one of {', '.join(reference.BEDS)}")
        folder = Path(self.env.srcdir) / self.options.get("folder", "book/results/beds")
        path = folder / f"{name}.cpu.json"
        command = f"python -m toolkit.labs.beds {name} --scale cpu"
        if not path.is_file():
            words = nodes.Text("Not measured yet. ")
            return [nodes.paragraph("", "", words, nodes.literal("", command), nodes.Text("."))]
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            tables = [reference.table(found), reference.differences(found)]
            seeds = len(found["seeds"][name])
        except (ValueError, KeyError) as error:
            raise self.error(f"{path.name} is damaged ({error!r}); run `{command}`") from error
        told = nodes.paragraph("", f"Scale cpu, {seeds} seeds; measured by ")
        told += [nodes.literal("", command), nodes.Text(".")]
        # what is compared heads a row
        pairs = tables[1][["difference", *tables[1].columns.drop("difference")]]
        return [_table(tables[0].replace("", "–")), _table(pairs), told]


def _table(frame: Any) -> nodes.container:
    def row(cells: Any) -> nodes.row:
        return nodes.row("", *(nodes.entry("", nodes.paragraph("", str(c))) for c in cells))

    box = nodes.container(classes=["table-scroll"])
    table = nodes.table(classes=["bed-table"])
    group = nodes.tgroup(cols=frame.shape[1])
    group += [nodes.colspec(colwidth=1) for _ in frame.columns]
    group += nodes.thead("", row(frame.columns))
    group += nodes.tbody("", *(row(cells) for cells in frame.itertuples(index=False)))
    table += group
    box += table
    return box
