"""The lab of the three regimes: its data, its lanes, and how a batch size is chosen."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from toolkit.labs.diagnose import three_regime as lab

TINY = {"bed": "pairs", "axis": "batch", "values": [32, 8], "densities": [0.1, 0.6], "copies": 2,
        "steps": 3, "count": 64, "batch": 32, "small": True}  # fmt: skip


def test_seeds_side_by_side_are_the_runs_of_each_alone():
    both = lab.grid_run(**TINY, seeds=[0, 1])
    for place, seed in enumerate([0, 1]):
        alone = lab.grid_run(**TINY, seeds=[seed])
        for name in ("test", "lmc", "cka", "dense_loss", "cut"):
            found, wanted = np.array(both[name][place]), np.array(alone[name][0])
            np.testing.assert_allclose(found, wanted, atol=2e-3, err_msg=name)


def test_checkpoints_and_schedules_end_alike_where_they_are_as_long():
    runs = {
        axis: lab.grid_run(**(TINY | {"axis": axis, "values": [3, 2]}), seeds=[0])
        for axis in ("checkpoint", "schedule")
    }
    ends = [np.array(run["dense_loss"][0]) for run in runs.values()]
    np.testing.assert_allclose(ends[0][0], ends[1][0], atol=1e-5)
    assert not np.allclose(ends[0][1], ends[1][1], atol=1e-6)  # a drop of the rate came earlier


@pytest.mark.parametrize("bed", list(lab.BEDS))
def test_training_held_out_and_test_examples_are_apart(bed):
    sets = lab.task(bed, 0, 128, True)
    assert [len(sets[part][1]) >= 128 for part in ("train", "validation", "test")] == [True] * 3
    seen = {part: {tuple(row) for row in x.tolist()} for part, (x, _) in sets.items()}
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    other = lab.task(bed, 1, 128, True)["train"]
    assert not torch.equal(sets["train"][0], other[0])


def made(lmc, errors):
    """A table of one seed and density, from cold to hot; two copies a cell: the first is better."""
    return pd.DataFrame({
        "seed": 0, "density": 0.1, "temperature": range(5), "value": lab.BATCHES, "lmc": lmc,
        "copies": [[(e, e), (e + 0.1, e + 0.1)] for e in errors],
    })  # fmt: skip


def chosen(table):
    return lab.policies(table).set_index("policy")


def test_the_rule_ends_at_the_coldest_connected_batch_and_counts_its_copies():
    errors = [0.5, 0.3, 0.1, 0.2, 0.4]
    found = chosen(made([-0.4, 0.0, 0.0, 0.0, 0.0], errors))
    assert found.batch["rule"] == 64
    assert found.retrained["rule"] == 6  # 32, 64, and 256, where the advice turns
    assert found.error["rule"] == pytest.approx(30)
    assert found.batch["held-out"] == 32
    assert found.retrained["held-out"] == 5
    assert found.error["batch 256"] == pytest.approx(50)
    assert found.error["random"] == pytest.approx(30)
    hot = chosen(made([-0.4, -0.4, -0.4, -0.1, 0.0], errors))
    assert hot.batch["rule"] == 8
    assert hot.retrained["rule"] == 6
    assert chosen(made([0.0] * 5, errors)).batch["rule"] == 256


def test_the_kept_copy_is_best_on_held_out_data_not_on_test_data():
    copies = [(0.3, 0.1), (0.2, 0.4), (0.1, 0.5)]
    assert lab.best_of(copies, 2) == 0.4
    assert lab.best_of(copies) == 0.5


def test_the_family_is_chosen_by_similarity_or_by_held_out_error():
    table = made([-0.4, 0.0, 0.0, 0.0, 0.0], [0.5, 0.3, 0.1, 0.2, 0.4])
    table["cka"] = [1.0, 0.7, 0.9, 0.8, 0.6]
    table["test_error"] = [0.5, 0.3, 0.1, 0.2, 0.4]
    for name in ("dense_test", "dense_loss", "sharpness"):
        table[name] = [1.0, 2.0, 3.0, 4.0, 5.0]
    table["dense_validation"] = [0.2, 0.1, 0.3, 0.3, 0.3]
    picks = lab.family(table).set_index("policy").model
    assert (picks["rule"], picks["dense_error"], picks["sharpness"]) == (32, 64, 256)
