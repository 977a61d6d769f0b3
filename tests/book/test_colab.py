"""The wheel, installed without its dependencies beside what Colab has anyway, runs a chapter.

The environment is made without a network: a fresh virtual environment that sees links to chosen
packages of the running one, and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
COLAB = (
    "torch",
    "numpy",
    "pandas",
    "scipy",
    "scikit-learn",
    "matplotlib",
    "seaborn",
    "joblib",
    "tqdm",
    "safetensors",
    "ipywidgets",
    "pooch",
    "ipython",
)
ABSENT = ("jupyter_book", "papermill", "jupytext", "nbval", "transformers", "peft", "vl_convert")
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)^```\s*$", re.DOTALL | re.MULTILINE)

# after the chapter: what it forgot to import must not have been imported for it
PROGRAM = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for number, code in enumerate(json.load(open(sys.argv[1], encoding="utf-8")), 1):
    result = shell.run_cell(code)
    if not result.success:
        sys.exit(f"code cell {number} failed: {result.error_before_exec or result.error_in_exec!r}")
print("ran", number, "cells")

import importlib, importlib.util, pkgutil
import toolkit
for module in pkgutil.walk_packages(toolkit.__path__, "toolkit."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from toolkit.core import data
print(json.dumps({
    "home": toolkit.__file__,
    "slugs": [entry.slug for entry in toolkit.catalogue()],
    "data": list(data.available()),
    "seen": [name for name in sys.argv[2:] if importlib.util.find_spec(name)],
}))
"""
CHAPTER = ROOT / "book" / "chapters" / "lowrank" / "lora.md"


def closure(names: tuple[str, ...]) -> dict[str, metadata.Distribution]:
    """These distributions and all they need, by canonical name."""
    found: dict[str, metadata.Distribution] = {}
    todo = list(names)
    while todo:
        name = canonicalize_name(todo.pop())
        if name in found:
            continue
        found[name] = metadata.distribution(name)
        for word in found[name].requires or []:
            need = Requirement(word)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                todo.append(need.name)
    return found


def expose(distributions: dict[str, metadata.Distribution], folder: Path) -> None:
    """Link the top-level files and folders of these distributions into one folder."""
    for name, distribution in distributions.items():
        assert distribution.files, f"{name} does not list its files"
        tops = {file.parts[0] for file in distribution.files}
        for top in sorted(tops - {"..", "__pycache__"}):
            link = folder / top
            if not link.is_symlink() and not top.endswith(".pth"):
                link.symlink_to(distribution.locate_file(top))


@pytest.fixture(scope="module")
def colab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a Colab-like environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("colab")
    (folder / "packages").mkdir()
    expose(closure(COLAB), folder / "packages")
    venv.create(folder / "env", symlinks=True, with_pip=False)
    python = folder / "env" / "bin" / "python"
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    (site / "colab.pth").write_text(f"{folder / 'packages'}\n", encoding="utf-8")
    for command in (
        ["-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        ["-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "-q", folder],
    ):
        if command[1] == "pip":
            (command[-1],) = folder.glob("*.whl")
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return python


@pytest.fixture(scope="module")
def said(colab: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What it prints there, line by line; nothing of the caller's environment reaches it."""
    folder = tmp_path_factory.mktemp("home")
    file = folder / "cells.json"
    file.write_text(json.dumps(code_cells(CHAPTER.read_text(encoding="utf-8"))), encoding="utf-8")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TOOLKIT_", "PYTHON"))}
    env = {**kept, "HOME": str(folder), "IPYTHONDIR": str(folder / "ipython"), "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [colab, "-I", "-c", PROGRAM, file, *ABSENT],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout.splitlines()


def code_cells(source: str) -> list[str]:
    """Code of a chapter's cells, known wrong answers left out, read without jupytext."""
    found = []
    for body in CELL.findall(source):
        header, code = "", body
        if body.startswith("---\n"):
            header, _, code = body[4:].partition("---\n")
        else:
            option = re.match(r"(?:^:[\w-]+:.*\n)+", body, re.MULTILINE)
            if option:
                header = "".join(line[1:] + "\n" for line in option[0].splitlines())
                code = body[option.end() :]
        if "wrong" not in (yaml.safe_load(header) or {}).get("tags", []):
            found.append(code)
    return found


def test_the_cells_of_a_chapter_are_read() -> None:
    source = (
        "# T\n\n```{code-cell} python\n:tags: [setup]\n\na = 1\n```\n\n```{code-cell} python\n"
        "---\ntags: [wrong]\n---\nb\n```\n\n```python\nno cell\n```\n\n```{code-cell}\nc\n```\n"
    )
    assert [code.strip() for code in code_cells(source)] == ["a = 1", "c"]


@pytest.mark.slow
def test_the_wheel_alone_runs_the_lora_chapter(said: list[str]) -> None:
    cells = code_cells(CHAPTER.read_text(encoding="utf-8"))
    assert len(cells) > 5
    assert any(re.search(r'^SCALE = "ci"', code, re.MULTILINE) for code in cells)
    assert f"ran {len(cells)} cells" in said


def test_the_wheel_alone_lists_methods_and_data(said: list[str], colab: Path) -> None:
    found = json.loads(said[-1])
    assert found["seen"] == [], "the environment is not Colab-like"
    assert Path(found["home"]).is_relative_to(colab.parents[1])
    assert {"lora", "adalora"} <= set(found["slugs"])
    assert {"digits", "sst2"} <= set(found["data"])
