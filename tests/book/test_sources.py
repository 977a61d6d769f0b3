"""Rules that every chapter's source and every recorded page keeps."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output

from book.engine.project import Chapter, Project
from book.engine.record import SIZE_LIMIT
from book.engine.source import tags
from tests.book.engine_toy import REPOSITORY, read_once

PROJECT = Project(REPOSITORY)
FOLDER = REPOSITORY / "book"
SOURCES = [
    Chapter(p.parent.name, p.stem, REPOSITORY) for p in sorted((FOLDER / "chapters").glob("*/*.md"))
]
PAGES = sorted((FOLDER / "notebooks").glob("*/*.ipynb"))
BANNED = {
    r"@interact|\binteract(ive(_output)?|_manual)?\s*\(|\bimport\b.*\binteract": (
        "interact widgets hang headless runs"
    ),
    r"\bOutput\b\s*\(": "the Output widget hangs headless runs",
    r"(?<![\w.])input\s*\(": "a page cannot be asked",
    r"\bgetpass\b": "a page cannot be asked",
    r"drive\.mount|google\.colab import (drive|auth|userdata)": "no private drives or accounts",
    r"(?i)\b(hf|api|access|auth)_?(token|key)\b|\bhf_[A-Za-z0-9]{8,}|notebook_login": "no tokens",
    r"\btqdm\b": "progress bars print hundreds of lines into a page",
}
TOPS = {"home", "Users", "var", "opt", "usr"} | {p.name for p in Path("/").iterdir()}
MACHINE = re.compile(
    rf"(?<![\w.:/<-])/({'|'.join(map(re.escape, sorted(TOPS)))})/[\w.-]+"
    r"|[A-Z]:\\+Users|ipykernel_\d+|site-packages"
)
EMBEDDED = re.compile(r"base64,[A-Za-z0-9+/=]+")
LINES = 60


@pytest.fixture(params=SOURCES, ids=lambda chapter: chapter.slug)
def source(request: pytest.FixtureRequest) -> list[NotebookNode]:
    return read_once(request.param).cells


@pytest.fixture(params=PAGES, ids=lambda path: path.stem)
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def banned(code: str) -> list[str]:
    return [why for pattern, why in BANNED.items() if re.search(pattern, code, re.MULTILINE)]


def codes(cells: list[NotebookNode]) -> Iterator[str]:
    yield from (cell.source for cell in cells if cell.cell_type == "code")


def test_sources_hold_nothing_that_hangs_or_asks(source: list[NotebookNode]) -> None:
    for code in codes(source):
        assert banned(code) == [], code


@pytest.mark.parametrize(
    "code",
    [
        "@interact(x=3)",
        "interactive(f, x=3)",
        "from ipywidgets import interact, HTML",
        "widgets.Output()",
        "from google.colab import drive\ndrive.mount('/content')",
        "x = input('?')",
        "HF_TOKEN = 'x'",
        "login('hf_abcdefgh1234')",
        "for i in tqdm(range(3)): pass",
    ],
)
def test_the_ban_can_see(code: str) -> None:
    assert banned(code)


@pytest.mark.parametrize(
    "code",
    ["model.forward(input_ids)", "f(input=x)", "tokenizer(text)", "Outputs(3)", "interactions(2)"],
)
def test_the_ban_is_not_blind_to_meaning(code: str) -> None:
    assert banned(code) == []


def test_cells_are_short(source: list[NotebookNode]) -> None:
    for code in codes(source):
        assert len(code.splitlines()) < LINES, code[:200]


def test_the_address_stands_in_one_place(source: list[NotebookNode]) -> None:
    for cell in source:
        assert PROJECT.repository not in cell.source, "write @REPOSITORY@, the engine fills it in"


def test_parameters_and_set_up_come_first(source: list[NotebookNode]) -> None:
    tagged = [tags(cell) for cell in source if cell.cell_type == "code"]
    assert "setup" in tagged[0], "the first code cell installs on Colab"
    assert "parameters" in tagged[1], "the second holds SCALE and SEED"
    assert sum("parameters" in t for t in tagged) == 1
    assert sum("setup" in t for t in tagged) == 1


def test_every_chapter_has_its_page() -> None:
    missing = [chapter.name for chapter in SOURCES if not chapter.page.is_file()]
    assert missing == [], "record them: python -m book.engine record"


def test_every_page_has_its_source() -> None:
    assert PROJECT.orphans() == [] if (FOLDER / "chapters").is_dir() else PAGES == []


def test_every_result_belongs_to_a_page() -> None:
    provenance = [page["metadata"]["provenance"] for page in map(load, PAGES)]
    told = {(p["chapter"].split("/")[1], p["scale"]) for p in provenance}
    results = sorted((FOLDER / "results").glob("*.json"))
    assert {tuple(path.stem.rsplit(".", 1)) for path in results} <= told


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_pages_are_valid_and_small(page: Path) -> None:
    nbformat.validate(nbformat.read(page, as_version=4))
    assert page.stat().st_size < SIZE_LIMIT


def test_pages_say_where_they_come_from(page: Path) -> None:
    notebook = load(page)
    provenance = notebook["metadata"]["provenance"]
    assert provenance["chapter"] == f"{page.parent.name}/{page.stem}"
    line = [c for c in notebook["cells"] if "provenance" in c["metadata"].get("tags", [])]
    assert len(line) == 1
    assert f"scale **{provenance['scale']}**" in "".join(line[0]["source"])


def test_pages_hold_no_leftovers(page: Path) -> None:
    notebook = load(page)
    for word in ("widgets", "papermill"):
        assert word not in notebook["metadata"]
    for cell in notebook["cells"]:
        assert not {"papermill", "execution"} & set(cell["metadata"])
        assert not {"wrong", "injected-parameters"} & set(cell["metadata"].get("tags", []))
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error", "a recorded page shows an error"
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
    tagged = [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    assert f'SCALE = "{notebook["metadata"]["provenance"]["scale"]}"' in "".join(
        tagged[0]["source"]
    )


def machine_paths(notebook: dict) -> list[str]:
    """Paths of the recording machine in metadata and outputs."""
    texts = [json.dumps(notebook["metadata"])]
    for cell in notebook["cells"]:
        texts.append(json.dumps(cell["metadata"]))
        for output in cell.get("outputs", []):
            data = {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/p")}
            texts.append(json.dumps([data, output.get("text", ""), output.get("metadata", {})]))
    return [match[0] for text in texts for match in MACHINE.finditer(EMBEDDED.sub("", text))]


def test_pages_hold_no_paths_of_this_machine(page: Path) -> None:
    assert machine_paths(load(page)) == []


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("saved to /home/someone/adapter.safetensors\n", "/home/someone"),
        ("in packages/site-packages/torch\n", "site-packages"),
    ],
)
def test_a_machine_path_would_be_seen(text: str, seen: str) -> None:
    stream = new_output("stream", text=text)
    assert machine_paths(new_notebook(cells=[new_code_cell(outputs=[stream])])) == [seen]


IMAGE = re.compile(r"<img\b[^>]*>", re.IGNORECASE)
DRAWING = re.compile(r"<svg\b.*?</svg>", re.IGNORECASE | re.DOTALL)


def mute_figures(notebook: dict) -> list[str]:
    """Figures without words for those who cannot see them."""
    found = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            found += re.findall(r"!\[\s*\]\([^)]*\)", "".join(cell["source"]))
        described = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            html = "".join(data.get("text/html", ""))
            found += [i for i in IMAGE.findall(html) if not re.search(r'\balt="[^"]*\w', i)]
            for drawing in DRAWING.findall(html):
                opening = drawing.split(">")[0]
                words = re.search(r'aria-(label|labelledby|hidden)="[^"]*\w', opening)
                if not words and "<title" not in drawing:
                    found.append(opening)
            if any(kind.startswith("image/") for kind in data) and not (html or described):
                found.append("an image output: show it with toolkit.core.show.figure_html")
    return found


def test_every_figure_has_words(page: Path) -> None:
    assert mute_figures(load(page)) == []


@pytest.mark.parametrize(
    "data",
    [
        {"image/png": "iVBORw0KGgo="},
        {"text/html": '<img src="x.png">'},
        {"text/html": '<img src="x.png" alt="">'},
        {"text/html": "<svg width='3'><path d=''/></svg>"},
    ],
)
def test_a_mute_figure_would_be_seen(data: dict) -> None:
    cell = new_code_cell(outputs=[new_output("display_data", data=data)])
    assert mute_figures(new_notebook(cells=[cell]))


RESULTS = sorted((FOLDER / "results").rglob("times/**/*.json"))


@pytest.mark.parametrize("times", RESULTS, ids=lambda path: path.stem)
def test_durations_are_those_of_runs_that_are_there(times: Path) -> None:
    """Renewed code gives runs new names, and a duration under an old one belongs to nothing."""
    folder, name = FOLDER / "results", times.relative_to(FOLDER / "results" / "times")
    document = json.loads((folder / name).read_text())
    there = {job["check"] for e in document["experiments"].values() for job in e["jobs"]}
    took = json.loads(times.read_text())["jobs"]
    assert took
    assert took.keys() <= there
