"""Choices of weights at equal counts: each trains its budget; forgetting is told at one gain."""

from __future__ import annotations

import pandas as pd
import pytest

from toolkit.labs.select import which_weights as lab
from toolkit.labs.select.choices.draws import draw
from toolkit.labs.select.choices.run import dress, equal, run


@pytest.mark.parametrize("choice", ["random", "largest", "smallest", "gradient", "fisher"])
@pytest.mark.parametrize("budget", lab.BUDGETS)
def test_a_share_gives_exactly_the_budget(choice: str, budget: int) -> None:
    adapted = dress(draw("digits", 0, "ci"), choice, budget, 0, 2, 32)
    assert adapted.costs()["trained"] == budget


@pytest.mark.parametrize("task", lab.PAIR)
def test_biases_and_lora_have_as_many_numbers(task: str) -> None:
    wanted = equal(draw(task, 0, "ci"))
    for choice in ("biases", "lora", "random"):
        assert dress(draw(task, 0, "ci"), choice, 0, 0, 2, 8).costs()["trained"] == wanted


@pytest.mark.parametrize("choice", ["id3", "static", "fisher"])
def test_no_more_entries_change_than_the_budget(choice: str) -> None:
    record = run(choice, "digits", choice, 85, 0.1, 0, "ci", "test")
    assert 0 < record["changed"] <= record["trained"] == 85
    assert len(record["targets"]) == len(record["sources"]) > 1


def test_doing_nothing_forgets_nothing() -> None:
    record = run("nothing", "digits", "nothing", 0, 1.0, 0, "ci", "test")
    assert record["changed"] == 0
    assert len(record["sources"]) == 1


class Runs(dict):
    """What a lab measured, of one seed."""

    def __init__(self, table):
        super().__init__(images=table)

    def blocks(self, task):
        return [[0]]


def test_forgetting_is_read_at_the_loss_that_both_arms_reach() -> None:
    rows = [
        {"arm": "a", "seed": 0, "targets": [4.0, 2.0, 1.0], "sources": [0.0, 1.0, 2.0]},
        {"arm": "b", "seed": 0, "targets": [4.0, 3.0, 2.0], "sources": [0.0, 2.0, 3.0]},
        {"arm": "full", "seed": 0, "targets": [4.0, 0.0], "sources": [0.0, 5.0]},
    ]
    one, other = lab.forgotten(Runs(pd.DataFrame(rows)), "images", "a", "b")
    assert one == {
        0: pytest.approx(20.0)
    }  # at a target loss of 2, of five that full training loses
    assert other == {0: pytest.approx(60.0)}
