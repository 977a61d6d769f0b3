"""The regime rule and the three case studies, on grids whose answers are known."""

import numpy as np
import pandas as pd
import pytest

from toolkit.core import evidence
from toolkit.diagnose.three_regime.rule import depth, noise, normalised, regimes
from toolkit.labs.diagnose.cases import best_of_family, radius_per_density, summary, up_or_down

POOR, GOOD = -0.3, 0.0


def grid(columns, seed=0, axis="temperature"):
    """Cells of one seed from {density: [(test_error, lmc, cka), ...] from cold to hot}."""
    rows = [
        {"seed": seed, axis: float(t), "density": d, "test_error": e, "lmc": m, "cka": k}
        for d, column in columns.items()
        for t, (e, m, k) in enumerate(column)
    ]
    return pd.DataFrame(rows)


def two_densities(seed=0):
    """Sparse: disconnected in the cold, best where connectivity begins. Dense: best in the cold."""
    sparse = [(0.4, POOR, 0.8), (0.3, POOR, 0.8), (0.1, GOOD, 0.9), (0.2, GOOD, 0.85)]
    full = [(0.1, GOOD, 0.99), (0.2, GOOD, 0.97), (0.3, GOOD, 0.95), (0.4, GOOD, 0.91)]
    return grid({0.05: sparse, 0.8: full}, seed)


def random_grid(rng, temperatures=5, densities=4, seeds=2):
    cells = pd.DataFrame(
        [
            {"seed": s, "temperature": t, "density": d}
            for s in range(seeds)
            for t in range(temperatures)
            for d in np.linspace(0.1, 1.0, densities)
        ]
    )
    n = len(cells)
    return cells.assign(
        test_error=rng.uniform(0, 1, n), lmc=rng.uniform(-0.2, 0.1, n), cka=rng.uniform(0, 1, n)
    )


# ---- the rule


def test_regimes_by_hand():
    found = regimes(two_densities())
    assert found.xs(0.05, level="density").tolist() == ["I", "I", "II-B", "II-A"]
    assert found.xs(0.8, level="density").tolist() == ["II-B", "II-B", "II-B", "II-A"]
    user = regimes(two_densities(), cka=0.98)
    assert user.xs(0.8, level="density").tolist() == ["II-B", "II-A", "II-A", "II-A"]


@pytest.mark.parametrize("seed", range(5))
def test_rule_partitions_the_grid(seed):
    cells = random_grid(np.random.default_rng(seed))
    for options in ({}, {"cka": 0.5}, {"epsilon": 1.0, "in_noise_units": True}):
        found = regimes(cells, **options)
        assert len(found) == 20
        assert found.isin(["I", "II-A", "II-B"]).all()
        mean = cells.groupby(["temperature", "density"])["lmc"].mean()
        limit = depth(cells, options.get("epsilon", 0.05), "in_noise_units" in options)
        assert ((found == "I") == (mean < -limit)).all()
    for _, column in regimes(cells).groupby(level="density"):  # the best connected cell is II-B
        assert (column == "I").all() or (column == "II-B").any()


def test_one_connected_cell_or_equal_cka_is_two_b():
    one = grid({0.1: [(0.2, POOR, 0.9), (0.1, GOOD, 0.2)]})
    assert regimes(one).tolist() == ["I", "II-B"]
    equal = grid({0.1: [(0.2, GOOD, 0.1 + 0.2), (0.1, GOOD, 0.3)]})
    assert regimes(equal).tolist() == ["II-B", "II-B"]
    none = grid({0.1: [(0.2, POOR, 0.9), (0.1, POOR, 0.2)]})
    assert regimes(none).tolist() == ["I", "I"]


def test_threshold_itself_is_connected():
    cells = grid({0.1: [(0.2, -0.05, 0.9), (0.1, -(0.1 + 0.2) / 6, 0.9), (0.1, -0.0501, 0.9)]})
    assert regimes(cells).tolist() == ["II-B", "II-B", "I"]


def test_noise_is_pooled_over_cells():
    cells = pd.concat(
        [
            grid({0.1: [(0.1, -0.1, 0.9), (0.1, 0.00, 0.9)]}, seed=0),
            grid({0.1: [(0.1, -0.3, 0.9), (0.1, 0.02, 0.9)]}, seed=1),
        ]
    )
    wanted = np.sqrt((2 * 0.1**2 + 2 * 0.01**2) / 2)
    assert noise(cells) == pytest.approx(wanted)
    assert depth(cells, 5, in_noise_units=True) == pytest.approx(5 * wanted)
    assert regimes(cells, epsilon=1.0, in_noise_units=True).tolist() == ["I", "II-B"]
    assert regimes(cells, epsilon=5.0, in_noise_units=True).tolist() == ["II-B", "II-B"]


def test_noise_from_pairs_of_copies():
    cells = two_densities()
    pairs = pd.DataFrame({"temperature": 0.0, "density": 0.05, "lmc": [-0.28, -0.30, -0.32]})
    assert noise(cells, pairs) == pytest.approx(0.02)
    assert noise(cells, pairs.assign(seed=0)) == pytest.approx(0.02)
    assert regimes(cells, 5, True, pairs=pairs).eq("I").sum() == 2
    with pytest.raises(ValueError, match="pairs lacks the columns"):
        noise(cells, pairs.drop(columns="density"))
    with pytest.raises(ValueError, match="not finite"):
        noise(cells, pairs.assign(lmc=np.nan))


def test_normalised_error_has_minimum_zero_per_column():
    cells = random_grid(np.random.default_rng(0)).sample(frac=1, random_state=0)
    cells["normalised"] = normalised(cells)
    assert (cells.groupby(["seed", "density"])["normalised"].min() == 0).all()
    assert (cells["normalised"] >= 0).all()
    best = cells.groupby(["seed", "density"])["test_error"].transform("min")
    assert np.allclose(cells["normalised"] + best, cells["test_error"])
    alone = normalised(two_densities().drop(columns="seed"))
    assert alone.tolist() == pytest.approx([0.3, 0.2, 0.0, 0.1, 0.0, 0.1, 0.2, 0.3])


# ---- case 1


def test_up_or_down_by_hand():
    found = summary(up_or_down(two_densities()), by=("policy",))
    wanted = {  # moves, off grid, success, regret
        "rule": (7, 1, 6 / 7, 0.0),
        "cold": (6, 2, 4 / 6, 0.15),
        "hot": (6, 2, 2 / 6, 0.2),
        "opposite": (5, 3, 0.0, (0.3 + 0.3 + 0.1 + 0.1 + 4 * 0.3) / 8),
        "random": (6, 2, 3 / 6, 0.175),
        "oracle": (8, 0, 6 / 8, 0.0),
    }
    for policy, numbers in wanted.items():
        row = found.loc[policy, ["moves", "off_grid", "success", "regret"]]
        assert row.tolist() == pytest.approx(numbers), policy
    assert found.loc["stay", "regret"] == pytest.approx(0.15)
    assert np.isnan(found.loc["stay", "success"])
    assert found.loc["rule", "gain"] == pytest.approx((0.1 + 0.2 - 0.2 + 0.1 + 3 * 0.1) / 7)


def test_same_starts_for_every_policy():
    found = summary(up_or_down(two_densities()), by=("policy",), interior=True)
    assert found["moves"].drop("stay").tolist() == [4] * 6
    wanted = {"rule": 3 / 4, "cold": 2 / 4, "hot": 1 / 4, "opposite": 0, "random": 3 / 8}
    assert found["success"][list(wanted)].to_dict() == pytest.approx(wanted)


def test_ends_of_the_walk():
    walks = up_or_down(two_densities()).query("policy == 'rule'")
    assert walks.query("density == 0.05")["end"].tolist() == [2.0] * 4
    assert walks.query("density == 0.05")["measured"].tolist() == [3, 2, 2, 3]
    assert walks.query("density == 0.8")["end"].tolist() == [0.0] * 4
    nowhere = up_or_down(grid({0.1: [(0.3, POOR, 0.9), (0.2, POOR, 0.9), (0.1, POOR, 0.9)]}))
    assert nowhere.query("policy == 'rule'")["end"].tolist() == [2.0] * 3  # the hottest reached


def test_advice_that_always_succeeds_and_one_that_never_does():
    good = [(0.3, POOR, 0.9), (0.2, POOR, 0.9), (0.1, GOOD, 0.9)]
    assert summary(up_or_down(grid({0.1: good})), ["policy"]).loc["rule", "regret"] == 0
    falls = [(0.1, GOOD, 0.9), (0.2, GOOD, 0.9), (0.3, GOOD, 0.9)]
    rises = [(0.3, GOOD, 0.9), (0.2, GOOD, 0.9), (0.1, GOOD, 0.9)]
    right = summary(up_or_down(grid({0.1: falls})), ["policy"])
    wrong = summary(up_or_down(grid({0.1: rises})), ["policy"])
    assert right.loc["rule", "success"] == 1
    assert wrong.loc["rule", "success"] == 0
    assert wrong.loc["opposite", "success"] == 1
    assert wrong.loc["rule", "regret"] == pytest.approx(0.2)


def test_a_tie_is_no_success():
    flat = summary(up_or_down(grid({0.1: [(0.1, GOOD, 0.9)] * 3})), ["policy"])
    assert (flat["success"].dropna() == 0).all()
    assert (flat["regret"] == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_walks_stop_inside_the_grid(seed):
    cells = random_grid(np.random.default_rng(seed))
    found = up_or_down(cells)
    ends = found[found["end"].notna()]
    assert set(ends["end"]) <= set(cells["temperature"])
    assert (found["regret"] >= 0).all()
    assert (found.query("policy == 'oracle'")["regret"] == 0).all()
    walk = found.query("policy == 'rule'").merge(
        cells, left_on=["seed", "density", "end"], right_on=["seed", "density", "temperature"]
    )
    assert ((walk["lmc"] >= -0.05) | (walk["end"] == 4)).all()  # connected, or the hottest
    rates = summary(found, ["policy"])["success"]
    assert rates["random"] == pytest.approx((rates["cold"] + rates["hot"]) / 2)
    inner = summary(found, ["policy"], interior=True)["success"].drop("stay")
    assert (inner["oracle"] >= inner).all()


def test_order_of_rows_does_not_matter():
    cells = random_grid(np.random.default_rng(1))
    shuffled = cells.sample(frac=1, random_state=3)
    pd.testing.assert_frame_equal(up_or_down(cells), up_or_down(shuffled))


def test_summary_feeds_paired_intervals():
    cells = pd.concat([two_densities(s) for s in range(3)], ignore_index=True)
    cells["test_error"] += np.random.default_rng(0).uniform(0, 0.01, len(cells))
    found = summary(up_or_down(cells))
    gap = evidence.paired(found.loc["cold", "regret"], found.loc["rule", "regret"])
    assert gap.n == 3
    assert gap.low > 0.1
    by_density = summary(up_or_down(cells), ("policy", "density"))
    assert by_density.loc[("cold", 0.8), "regret"] == pytest.approx(0, abs=0.01)


# ---- case 2


def family(**changes):
    table = pd.DataFrame(
        {
            "seed": 0,
            "model": ["a", "b", "c", "d"],
            "density": 0.1,
            "lmc": [-0.4, -0.2, 0.0, -0.01],
            "cka": [0.99, 0.95, 0.9, 0.8],
            "dense_test_error": [0.05, 0.06, 0.07, 0.08],
            "dense_train_loss": [0.2, 0.1, 0.3, 0.4],
            "sharpness": [9.0, 8.0, 7.0, 6.0],
            "test_error": [0.4, 0.3, 0.1, 0.2],
        }
    )
    return table.assign(**changes)


def test_best_of_family_by_hand():
    found = best_of_family(family(trace=[5.0, 1.0, 2.0, 3.0])).set_index("policy")
    assert found["model"].drop("random").to_dict() == {
        "rule": "c",
        "dense_error": "a",
        "dense_loss": "b",
        "sharpness": "d",
        "trace": "b",
        "oracle": "c",
    }
    assert found.loc["random", "model"] is None or pd.isna(found.loc["random", "model"])
    wanted = {"rule": 0, "dense_error": 0.3, "dense_loss": 0.2, "sharpness": 0.1, "random": 0.15}
    assert found["regret"][list(wanted)].to_dict() == pytest.approx(wanted)
    assert found.loc["oracle", "regret"] == 0
    assert not found["all_poor"].any()


def test_a_wholly_poor_family_falls_back_to_lmc():
    found = best_of_family(family(lmc=[-0.4, -0.2, -0.3, -0.5])).set_index("policy")
    assert found.loc["rule", "model"] == "b"
    assert found["all_poor"].all()
    assert best_of_family(family(), epsilon=0.5).set_index("policy").loc["rule", "model"] == "a"


def test_ties_go_to_the_first_row():
    tied = family(cka=0.9, sharpness=1.0, lmc=0.0).iloc[::-1]
    found = best_of_family(tied).set_index("policy")
    assert found.loc["rule", "model"] == "d"
    assert found.loc["sharpness", "model"] == "d"


def test_family_summary_by_seed():
    models = pd.concat([family(), family(seed=1)])
    found = summary(best_of_family(models))
    assert found.loc["dense_error", "regret"].to_dict() == pytest.approx({0: 0.3, 1: 0.3})
    with pytest.raises(ValueError, match="interior"):
        summary(best_of_family(models), interior=True)


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (family().drop(columns="sharpness"), r"models lacks the columns \['sharpness'\]"),
        (family(trace=[1.0, np.nan, 1.0, 1.0]), "trace = nan at seed 0, model b"),
        (family().iloc[:1], "1 value of model: a choice needs at least 2"),
        (family(model="a"), "two rows for seed 0, model a"),
        (pd.concat([family(), family(density=0.2).iloc[1:]]), "such as seed 0, model a, dens"),
    ],
)
def test_bad_families_are_refused(models, words):
    with pytest.raises(ValueError, match=words):
        best_of_family(models)


# ---- case 3


def radii():
    cells = grid(
        {
            0.05: [(0.4, POOR, 0.9), (0.3, POOR, 0.9), (0.2, GOOD, 0.9), (0.25, GOOD, 0.9)],
            0.8: [(0.10, GOOD, 0.9), (0.14, GOOD, 0.9), (0.3, GOOD, 0.9), (0.4, GOOD, 0.9)],
        },
        axis="rho",
    )
    dense = pd.DataFrame({"seed": 0, "rho": range(4), "dense_test_error": [0.3, 0.1, 0.2, 0.4]})
    return cells, dense


def test_radius_per_density_by_hand():
    found = radius_per_density(*radii()).set_index(["policy", "density"])
    chosen = {"rule": (2, 0), "dense": (1, 1), "fixed": (1, 1), "oracle": (2, 0)}
    for policy, (sparse, full) in chosen.items():
        assert found.loc[policy, "rho"].to_dict() == {0.05: sparse, 0.8: full}, policy
    assert found.loc["dense", "regret"].to_dict() == pytest.approx({0.05: 0.1, 0.8: 0.04})
    assert (found.loc["oracle", "regret"] == 0).all()
    assert found.loc["rule", "measured"].to_dict() == {0.05: 2, 0.8: 2}
    assert summary(radius_per_density(*radii()), ["policy"]).loc["rule", "regret"] == 0


def test_radius_start_and_validation_error():
    cells, dense = radii()
    far = radius_per_density(cells, dense, start=3).query("policy == 'rule'")
    assert far["rho"].tolist() == [2, 0]
    assert far["measured"].tolist() == [3, 4]
    held_out = dense.assign(dense_valid_error=[0.1, 0.2, 0.3, 0.4])
    assert set(radius_per_density(cells, held_out).query("policy == 'dense'")["rho"]) == {0.0}
    whole = cells.merge(dense, on=["seed", "rho"])  # the dense errors may stand in the cells
    pd.testing.assert_frame_equal(radius_per_density(cells, whole), radius_per_density(*radii()))


def test_bad_radii_are_refused():
    cells, dense = radii()
    with pytest.raises(ValueError, match=r"start = 1\.5: choose one of the radii"):
        radius_per_density(cells, dense, start=1.5)
    with pytest.raises(ValueError, match="give the same ones"):
        radius_per_density(cells, dense.iloc[:3])
    with pytest.raises(ValueError, match="dense lacks the columns"):
        radius_per_density(cells, dense.drop(columns="dense_test_error"))
    with pytest.raises(ValueError, match=r"cells lacks the columns \['rho'\]"):
        radius_per_density(cells.rename(columns={"rho": "radius"}), dense)
    with pytest.raises(TypeError, match="dense is a list"):
        radius_per_density(cells, [0.1])


# ---- bad input


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (two_densities().drop(columns="lmc"), r"cells lacks the columns \['lmc'\]: measure them"),
        (two_densities().iloc[:0], "cells is empty"),
        (two_densities().query("temperature == 0"), "1 value of temperature: a choice needs at"),
        (two_densities().drop(index=2), "seed 0, temperature 2.0, density 0.05: run it"),
        (two_densities().assign(density=5.0), r"share of weights kept, in \(0, 1\]"),
        (two_densities().assign(density=0.0), "density = 0.0 at seed 0, temperature 0.0"),
        (pd.concat([two_densities()] * 2), "two rows for seed 0, temperature 0.0, density 0.05"),
        (two_densities().assign(test_error=12.5), "divide a percentage by 100"),
        (two_densities().assign(lmc=np.nan), "lmc = nan at .*: give a finite number"),
        (two_densities().assign(lmc="deep"), "lmc = deep"),
        (two_densities().assign(lmc=-60), "LMC is a difference of error shares"),
    ],
)
def test_bad_cells_are_refused(cells, words):
    with pytest.raises(ValueError, match=words):
        up_or_down(cells)


def test_other_bad_arguments():
    cells = two_densities()
    with pytest.raises(TypeError, match="cells is a dict: give a pandas DataFrame"):
        regimes({})
    with pytest.raises(ValueError, match="CKA lies in"):
        regimes(cells.assign(cka=1.1))
    assert len(regimes(cells.assign(cka=1 + 1e-6)))  # single precision
    with pytest.raises(ValueError, match="epsilon = -1"):
        regimes(cells, epsilon=-1)
    with pytest.raises(ValueError, match="epsilon = nan"):
        up_or_down(cells, epsilon=float("nan"))
    with pytest.raises(ValueError, match="Give a multiple such as 5"):
        regimes(cells, in_noise_units=True)
    with pytest.raises(ValueError, match="no cell is repeated"):
        regimes(cells, epsilon=5, in_noise_units=True)
    with pytest.raises(ValueError, match=r"cka = 2: the cut lies in \[0, 1\]"):
        regimes(cells, cka=2)
    with pytest.raises(ValueError, match=r"frame lacks the columns \['colour'\]"):
        summary(up_or_down(cells), ["colour"])
    two = up_or_down(cells.query("temperature < 2"))
    with pytest.raises(ValueError, match="needs 3 temperatures"):
        summary(two, interior=True)
