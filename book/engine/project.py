"""Where everything lies in a project, and which chapters it has."""

from __future__ import annotations

import difflib
import re
import tempfile
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from toolkit.core import io

SCALES = ("ci", "cpu", "gpu")
PACKAGE = "toolkit"


class EngineError(Exception):
    """A mistake in the project or the command, told in words that say how to mend it."""


@dataclass(frozen=True, order=True)
class Chapter:
    """One chapter and its files.

    Args:
        part: folder under ``book/chapters``.
        slug: file name without suffix.
        root: the project's folder.
    """

    part: str
    slug: str
    root: Path

    @property
    def name(self) -> str:
        return f"{self.part}/{self.slug}"

    @property
    def source(self) -> Path:
        return self.root / "book" / "chapters" / self.part / f"{self.slug}.md"

    @property
    def page(self) -> Path:
        """The recorded notebook."""
        return self.root / "book" / "notebooks" / self.part / f"{self.slug}.ipynb"

    @property
    def practice(self) -> Path:
        """The notebook for readers: the exercises, without solutions or outputs."""
        return self.root / "book" / "practice" / self.part / f"{self.slug}.ipynb"

    def results(self, scale: str) -> Path:
        return self.root / "book" / "results" / f"{self.slug}.{scale}.json"

    def times(self, scale: str) -> Path:
        """When and how long the results were measured; beside them, since it is never the same."""
        return self.root / "book" / "results" / "times" / f"{self.slug}.{scale}.json"

    @property
    def lab(self) -> Path | None:
        """The file that measures what the chapter tells; None when the chapter itself measures."""
        folder = self.root / PACKAGE / "labs" / self.part
        files = (folder / f"{self.slug}.py", folder / self.slug / "__init__.py")
        return next((file for file in files if file.is_file()), None)

    @property
    def scratch(self) -> Path:
        """Working folder of a run, owned by whoever holds the chapter's lock."""
        return self.root / "_build" / "engine" / self.part / self.slug

    @property
    def lock(self) -> Path:
        return self.root / "_build" / "engine" / "locks" / f"{self.part}.{self.slug}.lock"


@dataclass(frozen=True)
class Project:
    """A folder with ``book/chapters``, and usually ``toolkit`` and ``pyproject.toml``."""

    root: Path

    @cached_property
    def chapters(self) -> dict[str, Chapter]:
        """Every chapter by slug, ordered by part and slug.

        Raises:
            EngineError: no chapters folder, or one slug in two parts.
        """
        folder = self.root / "book" / "chapters"
        if not folder.is_dir():
            raise EngineError(
                f"{self.root} has no folder book/chapters: run this from the project's folder or "
                "name it with --root"
            )
        found: dict[str, Chapter] = {}
        for path in sorted(folder.glob("*/*.md")):
            chapter = Chapter(path.parent.name, path.stem, self.root)
            if chapter.slug in found:
                raise EngineError(
                    f"two chapters are called {chapter.slug!r}: {found[chapter.slug].name} and "
                    f"{chapter.name}; results are kept by slug, so rename one"
                )
            found[chapter.slug] = chapter
        return found

    def select(self, names: Iterable[str]) -> list[Chapter]:
        """The chapters of these names (``slug`` or ``part/slug``); all of them for no names.

        Raises:
            EngineError: a name that is no chapter; the message suggests the nearest.
        """
        names = list(names)
        if not names:
            return list(self.chapters.values())
        known = {c.slug: c for c in self.chapters.values()}
        known |= {c.name: c for c in self.chapters.values()}
        chosen: dict[str, Chapter] = {}
        for name in names:
            if name not in known:
                raise EngineError(
                    f"there is no chapter {name!r}{suggest(name, known, sorted(self.chapters))}"
                )
            chosen[known[name].slug] = known[name]
        return list(chosen.values())

    def orphans(self) -> list[Path]:
        """Recorded notebooks whose source is gone."""
        pages = (self.root / "book" / "notebooks").glob("*/*.ipynb")
        known = {c.page for c in self.chapters.values()}
        return sorted(p for p in pages if p not in known and not p.name.startswith("."))

    @cached_property
    def _pyproject(self) -> dict:
        path = self.root / "pyproject.toml"
        if not path.is_file():
            return {}
        try:
            return tomllib.loads(path.read_text(encoding="utf-8")).get("project", {})
        except tomllib.TOMLDecodeError as error:
            raise EngineError(f"pyproject.toml cannot be read: {error}") from error

    @property
    def repository(self) -> str:
        """The address of the repository from pyproject.toml, '' when it has none."""
        return self._pyproject.get("urls", {}).get("Repository", "").rstrip("/")

    @property
    def version(self) -> str:
        """The toolkit's version: pyproject.toml's, or the package's own; '' when it has none."""
        if version := self._pyproject.get("version"):
            return version
        package = self.root / "toolkit" / "__init__.py"
        text = package.read_text(encoding="utf-8") if package.is_file() else ""
        match = re.search(r"""^__version__\s*=\s*["'](.+?)["']""", text, re.MULTILINE)
        return match[1] if match else ""


def suggest(word: str, near: Iterable[str], choices: Iterable[str]) -> str:
    """The end of an error message: the nearest known word, or all choices."""
    match = difflib.get_close_matches(word, list(near), n=1, cutoff=0.5)
    if match:
        return f"; did you mean {match[0]!r}?"
    listed = ", ".join(choices)
    return f"; there are: {listed}" if listed else "; there are none yet"


def check_scale(word: str) -> str:
    """Return ``word`` if it is a scale.

    Raises:
        EngineError: it is not; the message suggests the nearest.
    """
    if word not in SCALES:
        raise EngineError(
            f"SCALE {word!r} is not one of {', '.join(SCALES)}{suggest(word, SCALES, SCALES)}"
        )
    return word


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all: beside it first, then moved into place."""
    io.write_text(path, text)


def no_room(project: Project, error: BaseException | None = None) -> str:
    """Words on a full disk, if that is why something failed; '' if it is not.

    Args:
        project: whose folders, and the one for temporary files, are asked.
        error: what went wrong; left out where a program of its own failed.
    """
    if isinstance(error, io.DiskFull):
        return str(error)
    if error is not None and not io.is_full(project.root, error):
        return ""
    places = (project.root / "_build", project.root / "book", Path(tempfile.gettempdir()))
    full = [place for place in places if io.is_full(place)]
    if error is not None and not full:  # freed meanwhile, or a quota
        full = [Path(getattr(error, "filename", None) or places[0])]
    return str(io.DiskFull(full[0])) if full else ""
