"""The directive ``module-reference``: the public modules of a package, from their docstrings.

Written in reStructuredText, as docstrings are, so a page wraps it in ``eval-rst``. The modules are
found in the folder at every build: nobody keeps a list. One page's argument is one or more packages
or modules; whatever lies below them and bears no underscore is told, a package before its modules.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

OPTIONS = (":members:", ":ignore-module-all:", ":member-order: bysource")


def setup(app: Sphinx) -> None:
    """Register the directive, and have pages read again when there are other modules."""
    app.add_directive("module-reference", ModuleReference)
    app.connect("env-get-outdated", outdated)


def outdated(app: Sphinx, env: Any, *known: set[str]) -> list[str]:
    """Pages that tell other modules than there are now; of edited modules Sphinx knows itself."""
    return [
        page
        for page, facts in env.metadata.items()
        if "modules" in facts
        and any(
            facts["modules"][name] != listed(Path(app.srcdir), name) for name in facts["modules"]
        )
    ]


def listed(root: Path, name: str) -> list[str]:
    """The names that :func:`modules` gives; none if there is no such package."""
    try:
        return list(modules(root, name))
    except ValueError:
        return []


def modules(root: Path, name: str) -> dict[str, Path]:
    """Dotted name -> file, of a public package with all below it, or of one module.

    Args:
        root: the folder that holds the toolkit's.
        name: the dotted name, such as ``toolkit.core.adapt``.

    Raises:
        ValueError: there is no such package or module.
    """
    place = root.joinpath(*name.split("."))
    if place.with_suffix(".py").is_file():
        return {name: place.with_suffix(".py")}
    if not (place / "__init__.py").is_file():
        raise ValueError(f"there is no package or module {name}")
    found = {name: place / "__init__.py"}
    for file in sorted(place.iterdir()):
        if not file.stem.startswith("_") and (
            file.suffix == ".py" or (file / "__init__.py").is_file()
        ):
            found |= modules(root, f"{name}.{file.stem}")
    return found


def exported(file: Path) -> dict[str, str]:
    """Name -> module it comes from, of what a package's ``__all__`` hands on."""
    sources: dict[str, str] = {}
    names: list[str] = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            sources |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
    return {name: sources[name] for name in names if name in sources}


class ModuleReference(SphinxDirective):
    """One section per module: its docstring, then its public classes and functions in order."""

    required_arguments = 1
    optional_arguments = 100
    option_spec: ClassVar = {}

    def run(self) -> list[nodes.Node]:
        """Return the sections; the page is read again when a file of the package changes."""
        root = Path(self.env.srcdir)
        try:
            found = [modules(root, name) for name in self.arguments]
        except ValueError as error:
            raise self.error(str(error)) from error
        names = {name: list(group) for name, group in zip(self.arguments, found, strict=True)}
        self.env.metadata[self.env.docname]["modules"] = names
        made: list[nodes.Node] = []
        # below a page's own package, names are told from that package on
        alone = len(found) == 1 and len(found[0]) > 1
        short = f"{self.arguments[0].rpartition('.')[0]}." if alone else ""
        for group in found:
            for number, (name, file) in enumerate(group.items()):
                self.env.note_dependency(str(file))
                door = alone and number == 0
                made += self._told(name, file) if door else [self._section(name, file, short)]
        return made

    def _section(self, name: str, file: Path, short: str) -> nodes.section:
        made = nodes.section(ids=[nodes.make_id(f"reference-{name}")], names=[])
        made += nodes.title("", "", nodes.literal("", name.removeprefix(short)))
        made += self._told(name, file)
        return made

    def _told(self, name: str, file: Path) -> list[nodes.Node]:
        lines = [f".. automodule:: {name}", *(f"   {option}" for option in OPTIONS), ""]
        if names := exported(file):
            links = ", ".join(f":py:obj:`{own} <{whole}>`" for own, whole in names.items())
            lines += [f"To import from here: {links}.", ""]
        box = nodes.Element()
        self.state.nested_parse(StringList(lines, str(file)), self.content_offset, box)
        return box.children
