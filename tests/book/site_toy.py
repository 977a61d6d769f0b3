"""A small book with one page of everything, to prove that the page checks can fail."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.book import ledger_toy
from toolkit.core import evidence, show
from toolkit.core.show.live import controls

ROOT = Path(__file__).resolve().parents[2]
BUILD = "import sys; from jupyter_book.cli.main import main; sys.exit(main())"

HOME = """# A toy book

Formulas such as $W = W_0 + BA$ stand in the text, and alone:

$$
\\Delta W = P \\Lambda Q, \\qquad P \\in \\mathbb{R}^{m \\times r},\\quad
Q \\in \\mathbb{R}^{r \\times n},\\quad \\Lambda = \\mathrm{diag}(\\lambda_1, \\dots, \\lambda_r)
$$

````{exercise}
:label: toy-exercise
What is the rank of $BA$?
````

````{solution} toy-exercise
:class: dropdown
At most the inner dimension.
````
"""


def grid() -> pd.DataFrame:
    """Results over a slider (budget), a drop-down (score), series and x."""
    rows = []
    places = itertools.product(
        [2, 4, 6, 8], ["sensitivity", "magnitude"], ["lora", "adalora", "random"], [1, 2, 4, 8]
    )
    for budget, score, method, rank in places:
        accuracy = 0.5 + 0.03 * budget + 0.01 * rank * (method == "adalora")
        accuracy -= 0.1 * (score == "magnitude")
        rows.append(
            {
                "budget": budget,
                "score": score,
                "method": method,
                "rank": rank,
                "accuracy": accuracy,
                "low": accuracy - 0.02,
                "high": accuracy + 0.02,
            }
        )
    return pd.DataFrame(rows)


def explorer() -> show.Explorer:
    """The explorer of the toy page."""
    return show.explorer(
        grid(),
        "rank",
        "accuracy",
        "method",
        ["budget", "score"],
        log_x=True,
        band=("low", "high"),
        title="Accuracy against rank",
        labels={"budget": "final budget", "score": "score type", "accuracy": "test accuracy"},
        alt="One line per method. AdaLoRA rises with rank; the others stay level.",
    )


def claims() -> list[evidence.Judged]:
    """Four claims, one for each of four verdicts."""
    words = ("holds", "direction only", "open", "refuted here")
    return [ledger_toy.judged(word, seed) for seed, word in enumerate(words)]


def results(scale: str) -> dict:
    """A results file with these claims."""
    made = [one.record() for one in claims()]
    return {"schema": 2, "slug": "lora", "scale": scale, "claims": made, "facts": []}


def curve(rank: int, rate: float):
    """A figure for the toy controls."""
    import matplotlib.pyplot as plt

    show.style()
    fig, ax = plt.subplots()
    ax.plot([0, 1, 2], [0, rank, rate], **show.look("lora"))
    ax.set(xlabel="step", ylabel="value")
    ax.legend()
    return fig


def notebook() -> nbformat.NotebookNode:
    """A recorded notebook: outputs as a kernel would have stored them, and no kernel needed."""
    moving = controls(
        None,
        curve,
        ranges={"rank": (1, 8), "rate": (0.1, 1.0)},
        alt="A bent line that follows the sliders.",
    )
    wide = pd.DataFrame({f"a_rather_long_column_{i}": [i / 7] * 3 for i in range(14)})
    code = "print('a long line: ' + ', '.join(str(i) for i in range(200)))"

    def cell(source: str, *bundles: dict) -> nbformat.NotebookNode:
        outputs = [new_output("display_data", data=bundle) for bundle in bundles]
        return new_code_cell(source, outputs=outputs, execution_count=1)

    def page(thing) -> dict:
        return {"text/html": thing, "text/plain": "[html]"}

    return new_notebook(
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        },
        cells=[
            new_markdown_cell("# A chapter\n\nThe weight $W \\in \\mathbb{R}^{m \\times n}$."),
            new_code_cell(
                code,
                execution_count=1,
                outputs=[new_output("stream", text=", ".join(map(str, range(200))) + "\n")],
            ),
            new_markdown_cell("## Claims"),
            cell("display(claims.table())", page(evidence.ClaimsTable(claims())._repr_html_())),
            cell("display(wide)", page(wide.to_html())),
            new_markdown_cell("## Play"),
            cell("display(moving)", moving._repr_mimebundle_()),
            cell("display(explorer)", page(explorer().html)),
        ],
    )


def make(root: Path, home: str = HOME) -> Path:
    """Write the toy book's sources to ``root``.

    Args:
        root: An empty folder.
        home: Text of the first page.

    Returns:
        ``root``.
    """
    for part in ("_ext", "_static"):
        shutil.copytree(
            ROOT / "book" / part, root / "book" / part, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("_config.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    book = root / "book"
    (book / "references.bib").write_text("")
    (book / "intro.md").write_text(home)
    (book / "map.md").write_text("# The map\n\n```{method-map}\n```\n")
    (book / "ledger.md").write_text("# The ledger\n\n```{claims-ledger}\n```\n")
    (book / "notebooks" / "lowrank").mkdir(parents=True)
    nbformat.write(notebook(), book / "notebooks" / "lowrank" / "lora.ipynb")
    (book / "results").mkdir()
    for scale in ("ci", "gpu"):
        (book / "results" / f"lora.{scale}.json").write_text(json.dumps(results(scale)))
    ledger_toy.write(book / "many", book / "chapters")
    (book / "many.md").write_text(
        "# A full ledger\n\n```{claims-ledger}\n:folder: book/many\n```\n"
    )
    (root / "_toc.yml").write_text(
        "format: jb-book\nroot: book/intro\nchapters:\n- file: book/map\n- file: book/ledger\n"
        "- file: book/many\n"
        "- file: book/notebooks/lowrank/lora\n"
    )
    return root


def build(root: Path) -> Path:
    """Build a book as the engine does and return the folder of its pages.

    Raises:
        RuntimeError: If the build fails or warns, with its log.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, "build", ".", "--path-output", ".", "-q"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    log = done.stdout + done.stderr
    if done.returncode or "WARNING" in log or "ERROR" in log:
        raise RuntimeError(f"jupyter-book answered {done.returncode}:\n{log[-20000:]}")
    return root / "_build" / "html"
