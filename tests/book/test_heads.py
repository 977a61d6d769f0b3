"""Tables that Sphinx writes get scopes, and labels where they are wide."""

from __future__ import annotations

import pytest
from bs4 import BeautifulSoup

from tests.book.engine_toy import REPOSITORY


@pytest.fixture
def labelled(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "book" / "_ext"))
    from motion_book import heads

    return heads.labelled


def table(columns: int, head: str = "<th>") -> str:
    heads = "".join(f"{head}head {i}</th>" for i in range(columns))
    cells = "".join(f"<td><p>cell {i}</p></td>" for i in range(columns))
    rows = f"<thead><tr>{heads}</tr></thead><tbody><tr>{cells}</tr></tbody>"
    return f'<table class="table">{rows}</table>'


@pytest.mark.parametrize(("columns", "wide"), [(3, False), (4, True)])
def test_heads_get_scopes_and_cells_of_wide_tables_labels(labelled, columns, wide):
    soup = BeautifulSoup(labelled(table(columns)), "html.parser")
    assert [th["scope"] for th in soup.find_all("th")] == ["col"] * columns
    labels = [td.get("data-label") for td in soup.find_all("td")]
    assert labels == ([f"head {i}" for i in range(columns)] if wide else [None] * columns)
    assert soup.table["class"] == (["table", "stacks"] if wide else ["table"])


def test_the_first_column_may_be_heads_of_rows(labelled):
    text = table(3).replace("<td><p>cell 0</p></td>", "<th>row</th>")
    soup = BeautifulSoup(labelled(text), "html.parser")
    assert soup.tbody.th["scope"] == "row"


@pytest.mark.parametrize("head", ['<th scope="col">', '<th colspan="2">'])
def test_tables_that_say_more_themselves_stay_as_they_are(labelled, head):
    assert labelled(table(4, head)) == table(4, head)


def test_a_table_without_heads_stays_as_it_is(labelled):
    text = "<table><tbody><tr><td>x</td></tr></tbody></table>"
    assert labelled(text) == text
