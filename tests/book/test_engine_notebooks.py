"""Today's chapters for nbval: the sources, with recorded outputs where the cell is the same."""

from __future__ import annotations

from pathlib import Path

import nbformat

from tests.book.engine_toy import Toy


def codes(path: Path) -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_sources_are_written_with_the_outputs_of_equal_cells(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    compared = "# NBVAL_CHECK_OUTPUT\nprint('same')"
    toy.chapter("one", compared, "# NBVAL_CHECK_OUTPUT\nprint('old')")
    toy.engine("record", "--scale", "cpu")
    kept = toy.text("one")
    toy.chapter("one", compared, "# NBVAL_CHECK_OUTPUT\nprint('new')", ":tags: [wrong]\n1 / 0")
    toy.chapter("two", ":tags: [nbval-check-output]\nprint('never recorded')")
    (toy.root / "_build/ci/alpha").mkdir(parents=True)
    (toy.root / "_build/ci/alpha/gone.ipynb").write_text("{}")

    toy.engine("notebooks")
    folder = toy.root / "_build/ci/alpha"
    assert sorted(path.name for path in folder.iterdir()) == ["one.ipynb", "two.ipynb"]
    parameters, same, new = codes(folder / "one.ipynb")
    assert parameters.source.startswith('SCALE = "ci"'), "the page's scale is not the source's"
    assert (same.source, same.outputs[0].text) == (compared, "same\n")
    assert same.execution_count, "nbval refuses outputs of a cell without a number"
    assert new.outputs == []
    assert "NBVAL_CHECK_OUTPUT" not in new.source, "there is nothing to compare with"
    (_, never) = codes(folder / "two.ipynb")
    assert never.metadata.get("tags", []) == []
    assert toy.text("one") == kept
