"""Making a page: the source's cells, the outputs of a run, and where they come from."""

from __future__ import annotations

import datetime
import json
import os
import re
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from book.engine.pictures import lighten
from book.engine.project import Chapter, EngineError, Project
from book.engine.source import TITLE, TOKEN, Source, tags, with_scale

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
SIZE_LIMIT = 900_000  # bytes of a page: larger ones load badly on a phone and swell the repository
WIDGET = "application/vnd.jupyter.widget-view+json"
LIVE = (
    '<p class="live-only">This control moves when a kernel runs: open the chapter on Colab or in '
    "JupyterLab.</p>"
)
PROVENANCE = "@PROVENANCE@"  # in a source, stands for the line that tells of the recorded run
LINKS = "@LINKS@"  # and this for the links to practice notebook, paper and code
COLAB = "https://colab.research.google.com/github"
CELL_FILE = re.compile(r"[^\s\"'<>]*ipykernel_\d+/\d+\.py")


def prepared(source: Source, repository: str) -> NotebookNode:
    """The notebook to execute: the page's cells, code cells numbered from 1."""
    notebook = page(source, "ci", [[] for _ in source.code], None, repository)
    number = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            number += 1
            cell.metadata["number"] = number
    return notebook


def page(
    source: Source,
    scale: str,
    outputs: Sequence[Sequence[Mapping[str, Any]]],
    provenance: Mapping[str, Any] | None,
    repository: str,
) -> NotebookNode:
    """A chapter's notebook from its source and the outputs of its code cells.

    Args:
        source: the chapter as read.
        scale: what the parameters cell shows.
        outputs: one list of outputs per code cell, in order.
        provenance: what the run was, for the line under the title; None for no line.
        repository: address put where the source says ``@REPOSITORY@``.
    """
    if len(outputs) != len(source.code):
        raise ValueError(f"{len(outputs)} outputs for {len(source.code)} code cells")
    cells: list[NotebookNode] = []
    waiting = iter(outputs)
    count = 0
    card = any(PROVENANCE in cell.source for cell in source.run)
    for place, cell in enumerate(source.run):
        text = cell.source.replace(TOKEN, repository)
        kept = {k: v for k, v in cell.metadata.items() if k not in ("papermill", "execution")}
        if cell.cell_type == "code":
            count += 1
            if "parameters" in tags(cell):
                text = with_scale(text, scale)
            new = new_code_cell(text, metadata=kept, execution_count=count if provenance else None)
            new.outputs = [_numbered(output, count) for output in next(waiting)]
            cells.append(new)
        elif place == 0 and provenance is not None and not card:
            cells += _titled(source, text, kept, provenance, repository)
        else:
            cells += _told(source, text, kept, provenance, repository)
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number:03d}"  # the same in each run, so that diffs show changes only
    notebook = new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = dict(KERNEL)
    notebook.metadata["language_info"] = {"name": "python"}
    if provenance is not None:
        notebook.metadata["provenance"] = dict(provenance)
    return notebook


def _numbered(output: Mapping[str, Any], count: int) -> NotebookNode:
    new = nbformat.from_dict(dict(output))
    if new.output_type == "execute_result":
        new["execution_count"] = count
    return new


def _titled(
    source: Source, text: str, metadata: dict, provenance: Mapping[str, Any], repository: str
) -> list[NotebookNode]:
    """The first cell, cut after its title to take in where the page comes from."""
    end = TITLE.search(text).end()
    line = new_markdown_cell(
        provenance_text(source.chapter, provenance, repository), metadata={"tags": ["provenance"]}
    )
    cells = [new_markdown_cell(text[:end].strip(), metadata=metadata), line]
    if rest := text[end:].strip():
        cells.append(new_markdown_cell(rest, metadata=metadata))
    return cells


def _told(
    source: Source,
    text: str,
    metadata: dict,
    provenance: Mapping[str, Any] | None,
    repository: str,
) -> list[NotebookNode]:
    """A Markdown cell; where it says @LINKS@ or @PROVENANCE@ on a line, what belongs there."""
    before, mark, after = text.partition(PROVENANCE)
    links = _links(source.chapter, provenance or {}, repository)
    cells = []
    for part in (before, after):
        if words := part.replace(LINKS, links).strip():
            cells.append(new_markdown_cell(words, metadata=dict(metadata)))
    if mark and provenance is not None:
        line = new_markdown_cell(_run_line(provenance), metadata={"tags": ["provenance"]})
        cells.insert(1 if before.strip() else 0, line)
    return cells


def provenance_text(chapter: Chapter, provenance: Mapping[str, Any], repository: str) -> str:
    """Badges and one line: scale, device, versions, dates, duration and seeds."""
    badges = _links(chapter, provenance, repository)
    line = _run_line(provenance)
    return "\n\n".join([badges, line] if badges else [line])


def _links(chapter: Chapter, provenance: Mapping[str, Any], repository: str) -> str:
    """Where a reader goes from a page: to practise, to the paper, to the official code."""
    links = provenance.get("links", {})
    badges = []
    if paper := links.get("paper"):
        badges.append(f"[Paper: arXiv {paper}](https://arxiv.org/abs/{paper})")
    if code := links.get("code"):
        address = code if "://" in code else f"https://github.com/{code}"
        badges.append(f"[Official code]({address})")
    if repository.startswith("https://github.com/"):
        practice = chapter.practice.is_file()
        opened = chapter.practice if practice else chapter.page
        place = opened.relative_to(chapter.root).as_posix()
        colab = f"{COLAB}/{repository.removeprefix('https://github.com/')}/blob/main/{place}"
        if practice:  # what a reader does next comes first
            download = f"[Download the practice notebook]({repository}/raw/main/{place})"
            badges[:0] = [f"[Practise on Colab]({colab})", download]
        else:
            badges.append(f"[Open in Colab]({colab})")
    return " · ".join(badges)


def _run_line(provenance: Mapping[str, Any]) -> str:
    names = {"python": "Python", "torch": "PyTorch", "toolkit": "toolkit"}
    versions = [f"{names[k]} {v}" for k, v in provenance["versions"].items() if v]
    facts = [
        f"scale **{provenance['scale']}**",
        provenance["device_name"],
        ", ".join(versions),
        f"recorded on {provenance['date']}",
        f"verified on {provenance['verified']}" if provenance.get("verified") else "",
        _duration(provenance["seconds"]),
        _seeds(provenance.get("seeds") or []),
    ]
    return f"*Recorded run:* {' · '.join(filter(None, facts))}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _seeds(counts: int | Sequence[int]) -> str:
    """How many seeds, or from how many to how many where experiments differ."""
    known = [counts] if isinstance(counts, int) else counts
    if not any(known):
        return ""
    low, high = min(known), max(known)
    return f"{low} to {high} seeds" if low < high else f"{low} seed{'s' if low > 1 else ''}"


def seed_counts(results: Path | None) -> list[int]:
    """The fewest and the most seeds of an experiment in a results file; [] where none are told."""
    if results is None:
        return []
    seeds = json.loads(results.read_text(encoding="utf-8")).get("seeds", [])
    if isinstance(seeds, dict):  # by experiment, in blocks
        counts = [sum(_length(block) for block in blocks) for blocks in seeds.values()]
        return [min(counts), max(counts)] if counts else []
    return [_length(seeds) if isinstance(seeds, list) else int(seeds)]


def _length(block: Any) -> int:
    return len(block) if isinstance(block, list) else 1


def measured_dates(times: Path) -> dict[str, Any]:
    """When a lab's numbers were recorded and verified, and how long they took, where it is told."""
    if not times.is_file():
        return {}
    told = json.loads(times.read_text(encoding="utf-8"))
    names = {"recorded": "date", "verified": "verified", "seconds": "seconds"}
    return {name: told[key] for key, name in names.items() if told.get(key)}


def clean(outputs: list[list[dict]], project: Project, scratch: str) -> list[list[dict]]:
    """Outputs without widget references or paths of this machine, with lighter pictures."""
    places = {
        f"{scratch}/cwd": ".",
        scratch: ".",
        str(project.root): ".",
        sysconfig.get_path("purelib"): "[packages]",
        sys.prefix: "[python]",
        sys.base_prefix: "[python]",
        os.path.expanduser("~"): "~",
        tempfile.gettempdir(): "[temporary]",
    }
    places |= {os.path.realpath(path): word for path, word in places.items()}
    longest = sorted((p for p in places if len(p) > 1), key=len, reverse=True)

    def scrub(value: Any) -> Any:
        if isinstance(value, str):
            if "ipykernel_" in value:  # the search is quadratic in the length of an inline image
                value = CELL_FILE.sub("[cell]", value)
            for path in longest:
                value = re.sub(rf"(?<![\w.-]){re.escape(path)}(?![\w.-])", places[path], value)
            return lighten(value)
        if isinstance(value, list):
            return [scrub(item) for item in value]
        if isinstance(value, dict):
            same = ("image/png", "image/jpeg", "image/gif")  # base64, no words in them
            return {k: v if k in same else scrub(v) for k, v in value.items()}
        return value

    return [[scrub(_without_widget(output)) for output in cell] for cell in outputs]


def _without_widget(output: dict) -> dict:
    data = output.get("data", {})
    if WIDGET not in data:
        return output
    data = {k: v for k, v in data.items() if k != WIDGET}
    if "text/html" not in data:
        data = {"text/html": LIVE, "text/plain": "(a control that needs a kernel)"}
    return {**output, "data": data}


def recorded_outputs(chapter: Chapter) -> list[list[dict]]:
    """The outputs of a page's code cells, in order, with pictures as light as new ones."""
    notebook = nbformat.read(chapter.page, as_version=4)
    found = [list(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]
    for output in (output for cell in found for output in cell):
        data = output.get("data", {})
        if "text/html" in data:
            data["text/html"] = lighten(data["text/html"])
    return found


def text_of(notebook: NotebookNode) -> str:
    """The notebook as its file holds it.

    Raises:
        EngineError: it is not a valid notebook.
    """
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        raise EngineError(f"the page would not be a valid notebook: {error}") from error
    return nbformat.writes(notebook, version=4) + "\n"
