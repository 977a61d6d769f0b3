"""The pages tell the truth: examples run, links lead somewhere, named things exist."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

from toolkit import catalogue

ROOT = Path(__file__).resolve().parents[2]
BOOK = [*sorted((ROOT / "book").glob("*.md")), *sorted((ROOT / "book/reference").glob("*.md"))]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *BOOK]
NOTEBOOKS = sorted((ROOT / "book" / "notebooks").glob("*/*.ipynb"))
WITH_EXAMPLES = ("README.md", "book/intro.md", "book/compare.md", "book/house.md")

FENCE = re.compile(r"^(`{3,})(\S*)[^\n]*\n(.*?)^\1\s*$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]\[]*\]\(([^()\s]+)\)")
CITE = re.compile(r"\{cite(?::\w+)?\}`([^`]+)`")
GIVES = re.compile(r"^(?P<code>\S.*?)  # gives (?P<value>.+)$", re.MULTILINE)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str, *languages: str) -> list[str]:
    """Bodies of a page's fenced blocks in one of these languages."""
    return [body for _, language, body in FENCE.findall(text) if language in languages]


def prose(path: Path) -> str:
    """A page's Markdown without its fenced blocks, a notebook's Markdown cells."""
    if path.suffix == ".md":
        return FENCE.sub("", path.read_text(encoding="utf-8"))
    cells = nbformat.read(path, as_version=4).cells
    return FENCE.sub("", "\n\n".join(c.source for c in cells if c.cell_type == "markdown"))


def toc() -> list[str]:
    """Every page of the table of contents, the root first."""
    tree = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    parts = [chapter["file"] for part in tree["parts"] for chapter in part["chapters"]]
    return [tree["root"], *parts]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("page", WITH_EXAMPLES)
def test_examples_run_and_give_what_they_say(page: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = blocks((ROOT / page).read_text(encoding="utf-8"), "python")
    assert found, f"{page} has no python block"
    space: dict = {"__name__": "example"}
    monkeypatch.setitem(sys.modules, "example", type(sys)("example"))  # dataclasses look it up
    for number, block in enumerate(found, 1):
        body = GIVES.sub(lambda m: f"_said({m['value']!r}, {m['code']})", block)
        said: list[tuple[str, str]] = []
        space["_said"] = lambda text, value, said=said: said.append((text, repr(value)))
        program = compile(body, f"<{page}, block {number}>", "exec", dont_inherit=True)
        exec(program, space)
        wrong = [f"says {text}, gives {value}" for text, value in said if text != value]
        assert not wrong, f"{page}, block {number}: {wrong}"


def test_a_wrong_promise_in_an_example_would_be_seen() -> None:
    match = GIVES.search("x = 1\nlen([x])  # gives 1\n")
    assert match
    assert (match["code"], match["value"]) == ("len([x])", "1")


def test_every_page_is_in_the_table_of_contents_and_back() -> None:
    promised = toc()
    assert len(set(promised)) == len(promised)
    missing = [
        p for p in promised if not any((ROOT / f"{p}{s}").is_file() for s in (".md", ".ipynb"))
    ]
    assert not missing, f"_toc.yml promises pages that do not exist: {missing}"
    there = [name(p).rpartition(".")[0] for p in [*BOOK, *NOTEBOOKS]]
    assert sorted(there) == sorted(promised), "pages and _toc.yml differ"


def test_every_method_has_its_four_files() -> None:
    for entry in catalogue():
        if entry.part == "core":
            continue  # baselines have no chapters
        where = f"{entry.part}/{entry.slug}"
        package = (ROOT / "toolkit" / where).is_dir()
        for path in (
            f"toolkit/{where}/__init__.py" if package else f"toolkit/{where}.py",
            f"book/chapters/{where}.md",
            f"book/notebooks/{where}.ipynb",
            f"tests/{entry.part}/test_{entry.slug}.py",
        ):
            assert (ROOT / path).is_file(), f"method {entry.slug} has no {path}"
        assert f"book/{entry.chapter}" in toc(), f"{where} is not in _toc.yml"
        results = sorted((ROOT / "book" / "results").glob(f"{entry.slug}.*.json"))
        assert len(results) == 1, f"{entry.slug}: one results file expected, found {results}"


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=name)
def test_internal_links_lead_to_files(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if "://" in target or target.startswith(("#", "mailto:")):
            continue
        path = target.partition("#")[0]
        assert (page.parent / path).exists(), f"{name(page)} links to {target}, which is not there"


def test_colab_links_lead_to_the_recorded_notebooks() -> None:
    home = project()["urls"]["Repository"].removeprefix("https://github.com/")
    pattern = re.compile(
        r"colab\.research\.google\.com/github/([^/]+/[^/]+)/blob/main/([^)\s\"']+)"
    )
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        found = pattern.findall(prose(notebook))
        practice = name(notebook).replace("book/notebooks/", "book/practice/")
        opens = practice if (ROOT / practice).is_file() else name(notebook)
        assert (home, opens) in found, f"{name(notebook)} has no link to {opens} on Colab"
        for repository, path in found:
            assert repository == home
            assert (ROOT / path).is_file(), f"{name(notebook)}: Colab link to {path}"


def test_citations_are_in_the_bibliography_and_each_entry_has_an_address() -> None:
    text = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    entries = dict(re.findall(r"^@\w+\{([\w-]+),\n(.*?)^\}", text, re.DOTALL | re.MULTILINE))
    assert entries
    for page in [*PAGES, *NOTEBOOKS]:
        keys = {k.strip() for group in CITE.findall(prose(page)) for k in group.split(",")}
        assert keys <= entries.keys(), f"{name(page)} cites {sorted(keys - entries.keys())}"
    for key, body in entries.items():
        number = re.search(r"note\s*= \{arXiv (\d{4}\.\d{5})\}", body)
        assert number, f"{key} has no arXiv number"
        assert f"https://arxiv.org/abs/{number[1]}" in body, f"{key}: address and number differ"
    for entry in catalogue():
        assert any(entry.arxiv in body for body in entries.values()), f"{entry.slug} is not cited"


def code_words(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_and_names_in_code_type_exist(page: Path) -> None:
    tops = {"toolkit", "book", "tests", "data", "benchmarks", ".github"}
    for word in code_words(page):
        if re.fullmatch(r"[\w.]+(/[\w.-]+)+", word) and word.split("/")[0] in tops:
            assert (ROOT / word).exists(), f"{name(page)} names {word}, which is not there"
        elif re.fullmatch(r"\w+\.(toml|txt|yml|cff)|LICENSE(-docs)?|Makefile", word):
            assert (ROOT / word).is_file() or (ROOT / "data" / word).is_file(), (
                f"{word} is not there"
            )
        elif dotted := re.match(r"toolkit(\.\w+)+", word):
            resolve(dotted[0])


def resolve(dotted: str) -> object:
    """The module or attribute of that dotted name."""
    words = dotted.split(".")
    found = importlib.import_module(words[0])
    for place, word in enumerate(words[1:], 2):
        try:
            found = getattr(found, word)
        except AttributeError:
            found = importlib.import_module(".".join(words[:place]))
    return found


def commands(pattern: str) -> set[str]:
    """What the pages tell readers to type that starts like this."""
    found: set[str] = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line.partition("#")[0] for b in blocks(text, "bash") for line in b.splitlines()]
        typed = [line.strip() for line in [*lines, *code_words(page)]]
        found |= {line for line in typed if re.match(pattern, line) and "<" not in line}
    return found


def test_make_targets_that_the_pages_name_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+)\s*:(?!=)", makefile, re.MULTILINE))
    named = {line.split()[1] for line in commands(r"make [a-z]")}
    assert {"book", "test", "record", "try", "verify", "serve", "list", "bench", "clean"} <= named
    assert named <= targets, f"the Makefile has no {sorted(named - targets)}"


def test_command_lines_of_the_toolkit_and_the_engine_work(tmp_path) -> None:
    typed = commands(r"python -m (toolkit|book\.engine) ")
    assert {"python -m toolkit list", "python -m toolkit show adalora"} <= typed
    for line in sorted(typed):
        # a lab would measure for minutes: it is only asked what is stale
        asked = ["--stale", "--results", str(tmp_path)] if " lab " in line else []
        done = subprocess.run(
            [sys.executable, *shlex.split(line)[1:], *asked],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
        assert done.stdout.strip(), f"{line} prints nothing"


def test_environment_variables_that_the_pages_name_are_read_by_the_toolkit() -> None:
    code = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "toolkit").rglob("*.py"))
    named = {v for page in PAGES for v in re.findall(r"TOOLKIT_[A-Z]+", page.read_text("utf-8"))}
    assert {"TOOLKIT_DATA", "TOOLKIT_MODELS"} <= named
    unread = sorted(v for v in named if f'"{v}"' not in code)
    assert not unread, f"no code reads {unread}"


def test_readme_lists_the_extras_there_are() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("| extra | adds |")[2].partition("\n\n")[0]
    listed = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(listed) == sorted(project()["optional-dependencies"])


def test_the_house_page_tells_the_parts_of_the_key_and_the_limits() -> None:
    from book.engine.key import PARTS
    from book.engine.schedule import CELL_SECONDS, CHAPTER_SECONDS

    house = (ROOT / "book" / "house.md").read_text(encoding="utf-8")
    table = house.partition("| part | changes when |")[2].partition("\n\n")[0]
    listed = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(listed) == sorted(PARTS)
    flat = " ".join(house.split())
    assert (
        f"A cell may take {CELL_SECONDS['ci']} s at `ci` and {CELL_SECONDS['cpu']} s at the larger "
        f"scales, a chapter {CHAPTER_SECONDS['ci']} s and {CHAPTER_SECONDS['cpu']} s."
    ) in flat
