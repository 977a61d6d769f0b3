"""The diagnosis: its numbers against plain NumPy, its words against the numbers, and bad input."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.text import Text
from scipy import stats

from toolkit.core.evidence.intervals import interval
from toolkit.diagnose.longtail_bias.accuracy import cell_table, class_accuracy, group_table
from toolkit.diagnose.longtail_bias.adjustment import adjustment_left
from toolkit.diagnose.longtail_bias.diagnosis import Diagnosis
from toolkit.diagnose.longtail_bias.prior import estimate_prior
from toolkit.diagnose.longtail_bias.tails import longtail_counts

GROUPS = ["Many", "Medium", "Few"]


def gaussians(classes=6, each=300, width=4, spread=1.2, seed=0):
    """log p(x|k) up to a constant, exactly, for Gaussian classes; and balanced labels."""
    g = torch.Generator().manual_seed(seed)
    means = spread * torch.randn(classes, width, generator=g, dtype=torch.float64)
    labels = torch.arange(classes).repeat(each)
    x = means[labels] + torch.randn(len(labels), width, generator=g, dtype=torch.float64)
    return -torch.cdist(x, means).square() / 2, labels


def answers_with(right, tested=20):
    """Predictions with right[k] of `tested` right answers for class k."""
    classes = len(right)
    labels = np.repeat(np.arange(classes), tested)
    place = np.tile(np.arange(tested), classes)
    wrong = (labels + 1) % classes
    return np.where(place < np.asarray(right)[labels], labels, wrong), labels


COUNTS = np.array([300, 200, 150, 120, 60, 50, 40, 30, 12, 10, 8, 6])  # 4 in each group
# the parameter order is spread over the data groups: thirds are {0, 4, 8, 1}, {5, 9, 2, 6}, rest
PRIOR_ORDER = [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
PRIOR = np.empty(12)
PRIOR[PRIOR_ORDER] = np.arange(12, 0, -1) / 78
D_GAP = [19, 18, 19, 18, 14, 13, 12, 13, 4, 3, 4, 2]  # right answers of 20


@pytest.fixture(scope="module")
def diagnosis():
    return Diagnosis(*answers_with(D_GAP), COUNTS, prior=PRIOR)


# ---- tables


def test_class_accuracy_by_hand():
    found = class_accuracy(torch.tensor([0, 1, 1, 2, 0]), torch.tensor([0, 0, 1, 1, 1]), 4)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, [1 / 2, 1 / 3, np.nan, np.nan])


def test_class_accuracy_against_numpy():
    rng = np.random.default_rng(0)
    predictions, labels = rng.integers(0, 7, (2, 300))
    wanted = [(predictions[labels == k] == k).mean() for k in range(7)]
    np.testing.assert_allclose(class_accuracy(predictions, labels, 7), wanted)


def test_group_table():
    rng = np.random.default_rng(1)
    accuracy, groups = rng.random(40), rng.permutation(np.repeat([0, 1, 2], [20, 15, 5]))
    accuracy[np.flatnonzero(groups == 0)[:3]] = np.nan
    found = group_table(torch.tensor(accuracy), torch.tensor(groups), level=0.9)
    assert found.index.tolist() == GROUPS
    assert found.index.name == "group"
    assert found.columns.tolist() == ["classes", "accuracy", "low", "high"]
    assert found["classes"].tolist() == [17, 15, 5]
    assert found["classes"].dtype == int
    for g, name in enumerate(GROUPS):
        values = accuracy[(groups == g) & ~np.isnan(accuracy)]
        ends = interval(values, 0.9)
        np.testing.assert_allclose(found.loc[name].iloc[1:], [values.mean(), ends.low, ends.high])


def test_small_groups_have_no_interval():
    accuracy = torch.tensor([0.5, 0.7, 0.2, float("nan")])
    found = group_table(accuracy, torch.tensor([0, 0, 1, 2]))
    assert found["classes"].tolist() == [2, 1, 0]
    np.testing.assert_allclose(found["accuracy"], [0.6, 0.2, np.nan], rtol=1e-6)
    assert found["low"].isna().tolist() == [False, True, True]
    assert found["high"].isna().tolist() == [False, True, True]


def test_cell_table():
    rng = np.random.default_rng(2)
    accuracy, d, p = rng.random(60), rng.integers(0, 3, 60), rng.integers(0, 3, 60)
    p[(d == 1) & (p == 2)] = 0  # one empty cell
    found = cell_table(accuracy, d, p)
    assert found.columns.tolist() == ["data", "parameter", "classes", "accuracy", "low", "high"]
    assert found["classes"].sum() == 60
    for (_, row), (i, j) in zip(found.iterrows(), np.ndindex(3, 3), strict=True):
        assert (row["data"], row["parameter"]) == (GROUPS[i], GROUPS[j])
        values = accuracy[(d == i) & (p == j)]
        assert row["classes"] == len(values)
        if (i, j) == (1, 2):
            assert row[["accuracy", "low", "high"]].isna().all()
        else:
            ends = interval(values)
            np.testing.assert_allclose(
                row.iloc[3:].astype(float), [values.mean(), ends.low, ends.high]
            )


# ---- numbers of a diagnosis


def test_against_numpy():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(400, 12))
    labels = rng.permutation(
        np.repeat(np.arange(12), [90, 9, 50, 20, 80, 11, 30, 10, 70, 5, 15, 10])
    )
    logits[np.arange(400), labels] += 1.5
    d = Diagnosis(logits, labels, COUNTS, prior=PRIOR, level=0.8)
    right = logits.argmax(1) == labels
    each = np.array([right[labels == k].mean() for k in range(12)])
    data = np.where(COUNTS > 100, 0, np.where(COUNTS < 20, 2, 1))
    parameter = np.empty(12, int)
    parameter[PRIOR_ORDER] = np.repeat([0, 1, 2], 4)

    assert d.accuracy == pytest.approx(each.mean())
    assert d.micro == pytest.approx(right.mean())
    assert d.accuracy != pytest.approx(d.micro)  # or the two could be confused
    assert d.cut == "thresholds"
    assert d.d_groups.tolist() == data.tolist()
    assert d.p_groups.tolist() == parameter.tolist()
    for groups, table, gap, ends in (
        (data, d.data, d.data_gap, d.data_interval),
        (parameter, d.parameter, d.parameter_gap, d.parameter_interval),
    ):
        pd.testing.assert_frame_equal(table, group_table(each, groups, 0.8))
        many, few = each[groups == 0], each[groups == 2]
        assert gap == pytest.approx(many.mean() - few.mean())
        welch = stats.ttest_ind(many, few, equal_var=False).confidence_interval(0.8)
        np.testing.assert_allclose(ends, [welch.low, welch.high])
    pd.testing.assert_frame_equal(d.cells, cell_table(each, data, parameter, 0.8))
    assert d.tail_tail == pytest.approx(each[(data == 2) & (parameter == 2)].mean())
    assert d.rank_correlation == pytest.approx(stats.spearmanr(COUNTS, PRIOR).statistic)

    table = d.per_class
    assert table["class"].tolist() == [str(k) for k in range(12)]
    assert table["count"].tolist() == COUNTS.tolist()
    np.testing.assert_allclose(table["prior"], PRIOR)
    assert table["tested"].tolist() == np.bincount(labels, minlength=12).tolist()
    np.testing.assert_allclose(table["accuracy"], each)
    assert table["data"].tolist() == [GROUPS[g] for g in data]
    assert table["parameter"].tolist() == [GROUPS[g] for g in parameter]


def test_torch_numpy_logits_and_predictions_agree():
    logits, labels = gaussians(12, 20)
    one = Diagnosis(logits.float(), labels, torch.tensor(COUNTS), prior=torch.tensor(PRIOR))
    two = Diagnosis(logits.float().numpy()[::-1], labels.tolist()[::-1], COUNTS, prior=PRIOR)
    three = Diagnosis(logits.argmax(1).to(torch.int32), labels, COUNTS.tolist(), prior=PRIOR)
    pd.testing.assert_frame_equal(one.per_class, two.per_class)
    pd.testing.assert_frame_equal(one.per_class, three.per_class)
    pd.testing.assert_frame_equal(one.cells, three.cells)
    assert one.left == pytest.approx(two.left, abs=1e-4)
    assert three.left is None


def test_without_prior():
    d = Diagnosis(*answers_with(D_GAP), COUNTS)
    absent = ("prior", "p_groups", "parameter", "cells", "tail_tail", "parameter_gap")
    assert all(getattr(d, name) is None for name in (*absent, "rank_correlation"))
    assert "prior" not in d.per_class
    assert "Parameter imbalance: not looked at" in d.reading()
    assert "nine cells" not in d.reading()
    with pytest.raises(ValueError, match=r"cells need a prior.*zero_shot="):
        d.heat()
    with pytest.raises(ValueError, match="cells need a prior"):
        d.heat_alt()


def test_prior_from_zero_shot():
    likelihood, labels = gaussians(5, 600)
    q = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)
    zero_shot = likelihood + q.log()
    d = Diagnosis(labels, labels, [9, 8, 7, 6, 5], zero_shot=(zero_shot.numpy(), labels.numpy()))
    wanted = estimate_prior(zero_shot, labels, temperature="calibrate").prior
    torch.testing.assert_close(d.prior, wanted, atol=1e-6, rtol=0)
    assert d.prior.argsort(descending=True).tolist() == [0, 1, 2, 3, 4]

    # shares of the held-out labels do not turn the order of the prior: without weights, the more
    # examples of a class, the smaller its estimate
    keep = torch.cat([(labels == k).nonzero().flatten()[: 600 // 2**k] for k in range(5)])
    thin = Diagnosis(labels, labels, [9, 8, 7, 6, 5], zero_shot=(zero_shot[keep], labels[keep]))
    assert thin.prior.argsort(descending=True).tolist() == [0, 1, 2, 3, 4]
    naive = estimate_prior(zero_shot[keep], labels[keep], temperature="calibrate").prior
    assert naive.argsort(descending=True).tolist() != [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("counts", "groups", "cut"),
    [
        ([101, 100, 20, 19], [0, 1, 1, 2], "thresholds"),
        ([500, 400, 300, 200, 150, 101], [0, 0, 1, 1, 2, 2], "thirds"),  # all above 100
        ([0, 3, 1, 2, 5, 4], [2, 1, 2, 1, 0, 0], "thirds"),
    ],
)
def test_cut(counts, groups, cut):
    labels = np.arange(len(counts))
    d = Diagnosis(labels, labels, counts)
    assert d.d_groups.tolist() == groups
    assert d.cut == cut
    assert ("thirds by training count" in d.reading()) == (cut == "thirds")
    assert ("more than 100" in d.reading()) == (cut == "thresholds")


def test_given_groups():
    d = Diagnosis(*answers_with(D_GAP), COUNTS, d_groups=[2, 1, 0] * 4)
    assert d.cut == "given"
    assert d.data.loc["Few", "accuracy"] == pytest.approx(np.mean(D_GAP[::3]) / 20)
    assert "groups as given" in d.reading()
    assert "cut apart" not in d.reading()  # though Few has larger counts than Many


def test_classes_without_test_examples_are_left_out():
    predictions, labels = answers_with(D_GAP)
    keep = labels != 11
    d = Diagnosis(predictions[keep], labels[keep], COUNTS, prior=PRIOR)
    assert d.accuracy == pytest.approx(np.mean(D_GAP[:11]) / 20)
    assert d.data.loc["Few", "classes"] == 3
    assert d.data.loc["Few", "accuracy"] == pytest.approx(np.mean(D_GAP[8:11]) / 20)
    assert "mean over 11 classes" in d.reading()
    assert "1 class without test examples" in d.reading()
    none = Diagnosis(predictions[labels < 8], labels[labels < 8], COUNTS)
    assert np.isnan(none.data_gap)
    assert none.data_interval is None
    assert "there is no gap to speak of" in none.reading()


# ---- what is left of the training prior


LEFT_COUNTS = longtail_counts(6, 200, 30.0)


@pytest.mark.parametrize(
    ("times", "words", "step"),
    [
        (1, "subtract its logarithm (logit adjustment)", "logit_adjust)."),
        (0.35, "Part of the training prior is left", None),
        (0, ": fine.", None),
        (-0.3, "A little more than the training prior was taken out", None),
        (-1, "adjusted twice?", "adjust the logits once only"),
    ],
)
def test_left_of_gaussians(times, words, step):
    likelihood, labels = gaussians()
    log_prior = (LEFT_COUNTS / LEFT_COUNTS.sum()).double().log()
    d = Diagnosis(likelihood + times * log_prior, labels, LEFT_COUNTS)
    assert d.left == pytest.approx(times, abs=0.1)
    assert d.left == adjustment_left(
        likelihood + times * log_prior, labels, LEFT_COUNTS.double() / LEFT_COUNTS.sum()
    )
    line = next(line for line in d.reading().splitlines() if "training prior" in line)
    assert words in line
    assert f"{d.left:.2f}" in line
    if step:
        assert step in d.reading().splitlines()[-1]
    else:
        assert "logit_adjust" not in d.reading()


def test_probabilities_are_read_like_their_logarithms():
    likelihood, labels = gaussians()
    log_prior = (LEFT_COUNTS / LEFT_COUNTS.sum()).double().log()
    z = (likelihood + log_prior).log_softmax(1)
    assert Diagnosis(z.exp(), labels, LEFT_COUNTS).left == pytest.approx(1, abs=0.1)
    frame = pd.DataFrame(z.exp().numpy()).assign(label=labels.numpy())
    found = Diagnosis.from_frame(frame, LEFT_COUNTS, scores=list(range(6)))
    assert found.left == pytest.approx(Diagnosis(z, labels, LEFT_COUNTS).left, abs=1e-6)


def test_left_is_not_given_where_it_means_nothing():
    logits, labels = gaussians()

    def left(counts=LEFT_COUNTS, keep=slice(None), made=logits):
        return Diagnosis(made[keep], labels[keep], counts).left

    assert left() is not None
    uneven = torch.tensor([i for i, y in enumerate(labels.tolist()) if y or i < 0.6 * 1800])
    assert left(keep=uneven) is None  # 180 of one class, 300 of the others
    nearly = torch.tensor([i for i, y in enumerate(labels.tolist()) if y or i < 0.7 * 1800])
    assert left(keep=nearly) is not None
    assert left(keep=labels != 5) is None
    assert left(torch.tensor([5, 4, 3, 2, 1, 0])) is None
    assert left(torch.full((6,), 9)) is None
    impossible = logits.clone()
    impossible[0, (labels[0] + 1) % 6] = -torch.inf
    assert left(made=impossible) is None


def test_even_counts_say_nothing_about_left():
    logits, labels = gaussians()
    d = Diagnosis(logits, labels, [103, 102, 101, 100, 99, 98])
    assert "too even to see" in d.reading()
    assert "adjust" not in d.reading()


# ---- words


def data_line(d):
    return d.reading().splitlines()[1]


def test_reading_of_a_data_gap(diagnosis):
    words = diagnosis.reading()
    low, high = (f"{100 * end:.1f}" for end in diagnosis.data_interval)
    assert f"Few is below Many, by {100 * diagnosis.data_gap:.1f} points [{low}, {high}]" in words
    assert "a parameter gap is not shown by this test set" in words
    assert "a data gap is not shown" not in words
    assert f"Accuracy: {100 * diagnosis.accuracy:.1f} %, the mean over 12 classes" in words
    assert "95 % intervals" in words
    assert words.splitlines()[-1].startswith("Try next: logit adjustment")
    assert "unless it was done already" in words  # predictions do not tell
    assert "backdoor_adjust" not in words


def test_reading_of_a_parameter_gap():
    right = np.empty(12, int)
    right[PRIOR_ORDER] = D_GAP
    words = Diagnosis(*answers_with(right), COUNTS, prior=PRIOR).reading()
    assert "a data gap is not shown by this test set" in words
    assert "a parameter gap is not shown" not in words
    assert "several differently pre-trained models" in words.splitlines()[-1]
    assert "logit adjustment" not in words


def test_reading_without_a_gap():
    right = [10, 14, 10, 14, 16, 12, 12, 12, 12, 10, 12, 14]  # Many and Few alike in both cuts
    words = Diagnosis(*answers_with(right), COUNTS, prior=PRIOR).reading()
    assert words.count("Many minus Few is 0.0 points [") == 2
    assert words.count("is not shown by this test set") == 2
    assert "no remedy follows" in words.splitlines()[-1]


def test_reading_of_a_gap_turned_round():
    words = Diagnosis(*answers_with(D_GAP[::-1]), COUNTS).reading()
    d = Diagnosis(*answers_with(D_GAP), COUNTS)
    low, high = (f"{100 * end:.1f}" for end in d.data_interval)
    assert f"Few is above Many, by {100 * d.data_gap:.1f} points [{low}, {high}]" in words
    assert "less adjustment" in words


def test_no_interval_is_no_finding():
    one_each = Diagnosis(*answers_with([20, 10, 0]), [200, 50, 5])
    assert one_each.data_gap == 1
    assert one_each.data_interval is None
    assert "without an interval" in data_line(one_each)
    assert "no remedy follows" in one_each.reading()
    alike = Diagnosis(*answers_with([20, 20, 10, 10, 0, 0]), [300, 200, 60, 50, 6, 5])
    assert alike.data_interval is None  # no spread: it would look certain
    assert "without an interval" in data_line(alike)
    some = Diagnosis(*answers_with([20, 19, 10, 10, 0, 0]), [300, 200, 60, 50, 6, 5])
    assert "Few is below Many" in data_line(some)


def test_equal_counts_are_no_groups():
    d = Diagnosis(*answers_with(D_GAP), [50] * 12, prior=PRIOR)
    assert "Classes of one training count were cut apart" in data_line(d)
    assert "Few is below" not in d.reading()
    assert "logit adjustment" not in d.reading()  # although the interval excludes 0
    assert d.data_interval[0] > 0
    assert d.rank_correlation is None
    flat = Diagnosis(*answers_with(D_GAP), COUNTS, prior=[1 / 12] * 12)
    assert "Classes of one prior were cut apart" in flat.reading()
    assert flat.rank_correlation is None


def test_no_adjustment_is_advised_where_the_few_are_ahead():
    d = Diagnosis(*answers_with(D_GAP[::-1]), COUNTS)
    d.left = 0.8  # as of a model that was not adjusted
    assert "logit adjustment," not in d.reading().splitlines()[-1]
    assert "less adjustment, if there was any" in d.reading().splitlines()[-1]


def test_a_gap_with_part_of_the_prior_left_is_answered_by_adjustment():
    likelihood, labels = gaussians(12, 60)
    counts = torch.tensor(COUNTS)
    z = likelihood + (counts / counts.sum()).double().log()
    d = Diagnosis(z / 2.2, labels, counts)  # not sure enough of itself: it shows less than it holds
    assert 0.15 < d.left < 0.6
    assert "Few is below Many" in data_line(d)
    assert "logit adjustment, in training" in d.reading().splitlines()[-1]


def test_gap_that_remains_after_adjustment():
    likelihood, labels = gaussians(12, 60)
    counts = torch.tensor(COUNTS)
    pull = torch.where(counts < 20, 3.0, 0.0)  # the Few classes are noisy, not disfavoured
    noise = torch.randn(likelihood.shape, generator=torch.Generator().manual_seed(0))
    d = Diagnosis(likelihood + pull[labels][:, None] * noise, labels, counts)
    assert abs(d.left) < 0.5
    assert "Few is below Many" in data_line(d)
    assert "more or better examples of the Few classes" in d.reading().splitlines()[-1]
    assert "logit_adjust" not in d.reading()


def test_worst_cell(diagnosis):
    row = diagnosis.cells.loc[diagnosis.cells["accuracy"].idxmin()]
    wanted = f"{row['data']} by data, {row['parameter']} by parameter, with "
    wanted += f"{100 * row['accuracy']:.1f} % in {row['classes']} class"
    assert wanted in diagnosis.reading()
    assert "a hint, not a finding" in diagnosis.reading()
    big = Diagnosis(*answers_with(D_GAP * 9), np.tile(COUNTS, 9), prior=np.tile(PRIOR, 9) / 9)
    assert big.cells["classes"].min() >= 5
    assert "a hint" not in big.reading()


def test_relation_of_the_imbalances():
    def words(counts, prior):
        return Diagnosis(*answers_with([9] * len(counts)), counts, prior=prior).reading()

    size = 100
    ranks = np.arange(size, 0, -1)
    share = ranks / ranks.sum()
    assert "imbalances are related" in words(ranks * 3, share)
    assert "imbalances are opposed" in words(ranks * 3, share[::-1])
    folded = np.r_[share[::2], share[1::2][::-1]]
    assert abs(stats.spearmanr(ranks, folded).statistic) < 0.1
    assert "nearly independent (rank correlation" in words(ranks * 3, folded)
    assert "not shown to be related" in words(COUNTS, PRIOR)  # 12 classes cannot tell


# ---- tables from anywhere


NAMES = [f"kind {k}" for k in range(12)]


def frame_of(logits, labels):
    table = pd.DataFrame(logits, columns=[f"score {k}" for k in range(12)])
    table["label"] = [NAMES[k] for k in labels]
    table["predicted"] = [NAMES[k] for k in np.asarray(logits).argmax(1)]
    return table


def test_from_frame_equals_the_direct_call():
    logits, labels = gaussians(12, 20)
    frame, counts = frame_of(logits, labels), dict(zip(NAMES, COUNTS.tolist(), strict=True))
    direct = Diagnosis(logits, labels, COUNTS, prior=PRIOR, names=NAMES)
    assert direct.per_class["class"].tolist() == NAMES
    by_scores = Diagnosis.from_frame(
        frame, counts, scores=[f"score {k}" for k in range(12)], prior=PRIOR
    )
    by_class = Diagnosis.from_frame(frame, pd.Series(counts), prediction="predicted", prior=PRIOR)
    for d in (by_scores, by_class):
        pd.testing.assert_frame_equal(d.per_class, direct.per_class)
        pd.testing.assert_frame_equal(d.cells, direct.cells)
    assert by_scores.left == direct.left
    assert by_class.left is None
    assert by_scores.reading() == direct.reading()


def test_from_frame_with_numbers_and_other_columns():
    predictions, labels = answers_with(D_GAP)
    frame = pd.DataFrame({"truth": labels, "guess": predictions}).sample(frac=1, random_state=0)
    d = Diagnosis.from_frame(frame, COUNTS, label="truth", prediction="guess", level=0.5)
    direct = Diagnosis(predictions, labels, COUNTS, level=0.5)
    pd.testing.assert_frame_equal(d.per_class, direct.per_class)
    pd.testing.assert_frame_equal(d.data, direct.data)


def test_from_frame_in_three_lines():
    train = pd.DataFrame({"label": np.repeat(NAMES, COUNTS[::-1])})  # the last class is frequent
    predictions, labels = answers_with(D_GAP[::-1])
    test = pd.DataFrame({"label": np.take(NAMES, labels), "guess": np.take(NAMES, predictions)})
    prior = dict(zip(NAMES, PRIOR[::-1], strict=True))

    counts = train["label"].value_counts()
    found = Diagnosis.from_frame(test, counts, prediction="guess", prior=prior)
    assert "Few is below Many" in found.reading()

    assert found.per_class["class"].tolist() == NAMES[::-1]
    np.testing.assert_allclose(found.prior, PRIOR)  # by name, not by place
    np.testing.assert_allclose(found.per_class["accuracy"], np.array(D_GAP) / 20)


# ---- figures


def check_legible(fig):
    """Words at least 12 points high on the page, and not over each other."""
    FigureCanvasAgg(fig).draw()
    shown = [t for t in fig.findobj(Text) if t.get_text().strip() and t.get_visible()]
    assert shown
    assert min(t.get_fontsize() for t in shown) >= 12
    page, found = fig.bbox.padded(1), [(t, t.get_window_extent()) for t in shown]
    for text, box in found:
        assert page.contains(box.x0, box.y0), text
        assert page.contains(box.x1, box.y1), text
    for (a, one), (b, two) in itertools.combinations(found, 2):
        assert not one.padded(-1).overlaps(two.padded(-1)), (a.get_text(), b.get_text())


def test_bars(diagnosis):
    fig = diagnosis.figure()
    check_legible(fig)
    assert fig.get_size_inches()[0] == 5.6
    assert len(fig.axes) == 2
    for ax, table in zip(fig.axes, (diagnosis.data, diagnosis.parameter), strict=True):
        heights = [bar.get_height() for bar in ax.patches]
        np.testing.assert_allclose(heights, 100 * table["accuracy"])
        whiskers = [c.get_segments()[0][:, 1] for c in ax.collections]
        np.testing.assert_allclose(whiskers, 100 * table[["low", "high"]].clip(0, 1), atol=1e-9)
        ticks = [t.get_text() for t in ax.get_xticklabels()]
        assert ticks == [f"{g}\n({n})" for g, n in table["classes"].items()]
    assert "%" in fig.axes[0].get_ylabel()
    alone = Diagnosis(*answers_with(D_GAP), COUNTS)
    fig = alone.figure()
    check_legible(fig)
    assert len(fig.axes) == 1
    assert "prior" not in alone.figure_alt()


def test_bars_in_words(diagnosis):
    words = diagnosis.figure_alt()
    for table in (diagnosis.data, diagnosis.parameter):
        for group, row in table.iterrows():
            low, high = 100 * max(row["low"], 0), 100 * min(row["high"], 1)
            number = f"{100 * row['accuracy']:.1f} %"
            assert f"{group} {number} [{low:.1f}, {high:.1f}] (4 classes)" in words


def test_heat(diagnosis):
    fig = diagnosis.heat()
    check_legible(fig)
    ax = fig.axes[0]
    wanted = 100 * diagnosis.cells["accuracy"].to_numpy()
    mesh = next(m for m in ax.collections if isinstance(m, QuadMesh))
    np.testing.assert_allclose(mesh.get_array().ravel(), wanted)
    assert (mesh.norm.vmin, mesh.norm.vmax) == (0, 100)
    assert ax.yaxis_inverted()  # Many at the top
    words = [t.get_text() for t in ax.texts]
    counts = [f"{n} class" if n == 1 else f"{n} classes" for n in diagnosis.cells["classes"]]
    assert words == [f"{w:.0f} %\n{n}" for w, n in zip(wanted, counts, strict=True)]
    for text, value in zip(ax.texts, wanted, strict=True):
        back = np.array(mesh.cmap(value / 100)[:3])
        light = float(back**2.2 @ [0.2126, 0.7152, 0.0722])
        ink = {"black": 0.0, "white": 1.0}[text.get_color()]
        assert (max(light, ink) + 0.05) / (min(light, ink) + 0.05) > 4.4  # contrast
    alt = diagnosis.heat_alt()
    for row in diagnosis.cells.itertuples():
        tail = alt.split(f"{row.data} by data: ")[1].split(";")[0]
        assert f"{row.parameter} {100 * row.accuracy:.1f} % ({row.classes})" in tail


def test_figures_with_empty_groups():
    counts, prior = [5, 4, 3, 2, 1, 0], np.array([6, 5, 4, 3, 2, 1]) / 21
    d = Diagnosis(*answers_with([20, 20, 10, 10, 0, 1]), counts, prior=prior)
    check_legible(d.figure())
    heat = d.heat()
    check_legible(heat)
    assert [t.get_text() for t in heat.axes[0].texts].count("no class") == 6
    assert "Many by data: Many 100.0 % (2), Medium none (0), Few none (0)" in d.heat_alt()
    lonely = Diagnosis(*answers_with([20, 10, 0]), [200, 50, 5])
    fig = lonely.figure()
    check_legible(fig)
    assert not fig.axes[0].collections  # no whiskers
    assert "Many 100.0 % (1 class)" in lonely.figure_alt()


def test_figures_leave_no_style_behind(diagnosis):
    import matplotlib as mpl

    mpl.get_backend()  # settles what would change later
    before = mpl.rcParams.copy()
    diagnosis.figure()
    diagnosis.heat()
    assert mpl.rcParams == before


# ---- bad input


L = np.arange(12)
GOOD = {"predictions_or_logits": L, "labels": L, "counts": COUNTS}
NAN, MINUS = np.eye(12), np.eye(12)
NAN[3, 2], MINUS[5] = np.nan, -np.inf


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"predictions_or_logits": NAN}, r"predictions_or_logits\[3\] holds NaN"),
        ({"predictions_or_logits": MINUS}, r"predictions_or_logits\[5\] is -inf for every class"),
        ({"predictions_or_logits": np.eye(12)[:, :9]}, "but counts hold 12 classes"),
        ({"predictions_or_logits": np.eye(12, dtype=int)}, "table of whole numbers"),
        ({"predictions_or_logits": np.eye(12)[:9]}, r"labels has shape \(12,\)"),
        ({"predictions_or_logits": L[:9]}, r"predictions has shape \(9,\)"),
        ({"predictions_or_logits": L * 1.0}, r"predictions has shape .* whole number"),
        ({"predictions_or_logits": L + 1}, "predictions must hold classes from 0 to 11"),
        ({"predictions_or_logits": torch.eye(12, dtype=torch.bool)}, "holds torch.bool"),
        ({"labels": L - 1}, "labels must hold classes from 0 to 11"),
        ({"labels": [f"kind {k}" for k in L]}, "labels holds .* use Diagnosis.from_frame"),
        ({"predictions_or_logits": [], "labels": []}, "predictions has shape"),
        ({"counts": -COUNTS}, r"counts\[0\] = -300"),
        ({"counts": COUNTS + 0.5}, r"counts\[0\] = 300.5"),
        ({"counts": [5, 4]}, "counts has 2 classes: three groups"),
        (
            {"counts": pd.Series(COUNTS, index=L[::-1])},
            r"counts is a Series .*starts with 11.*\.sort_index",
        ),
        ({"prior": PRIOR[:9]}, r"prior has shape \(9,\).*\(12,\)"),
        ({"prior": 2 * PRIOR}, "prior sums to 2: divide"),
        ({"prior": PRIOR - PRIOR.min()}, r"prior\[11\] = 0"),
        ({"prior": pd.Series(PRIOR, index=NAMES)}, "prior is a Series"),
        ({"prior": PRIOR, "zero_shot": (np.eye(12), L)}, "prior and zero_shot are both given"),
        ({"zero_shot": np.eye(12)}, "zero_shot: give a pair"),
        ({"zero_shot": (np.eye(12)[:, :9], L)}, r"zero_shot: logits \(12, 9\), but 12 classes"),
        ({"zero_shot": (9 * np.eye(12), L)}, r"zero_shot: accuracy 1 .* pass prior="),  # all right
        (
            {"zero_shot": (9 * np.eye(12)[:9], L[:9])},
            "zero_shot: labels hold no example of class 9",
        ),
        ({"d_groups": [0, 1, 2]}, "d_groups: give 0 .* of the 12 classes"),
        ({"d_groups": L}, "d_groups: give 0"),
        ({"names": NAMES[:9]}, "names has 9 entries, counts 12"),
        ({"level": 95}, "level=95: choose a number between 0 and 1"),
    ],
)
def test_bad_input(change, match):
    Diagnosis(**GOOD)
    with pytest.raises(ValueError, match=match):
        Diagnosis(**{**GOOD, **change})


SCORES = [f"score {k}" for k in range(12)]
BY_NAME = dict(zip(NAMES, COUNTS.tolist(), strict=True))


@pytest.mark.parametrize(
    ("counts", "arguments", "match"),
    [
        (BY_NAME, {}, "give either prediction"),
        (BY_NAME, {"prediction": "predicted", "scores": SCORES}, "give either prediction"),
        (BY_NAME, {"prediction": "guess"}, r"frame lacks the columns \['guess'\]"),
        (BY_NAME, {"prediction": "predicted", "label": "y"}, r"frame lacks the columns \['y'\]"),
        (BY_NAME, {"scores": [*SCORES[:11], "s"]}, r"frame lacks the columns \['s'\]"),
        (BY_NAME, {"scores": SCORES[:11]}, "scores has 11 columns: give one for each of 12"),
        (BY_NAME, {"scores": [*SCORES[:11], SCORES[0]]}, "scores has 12 columns"),
        (BY_NAME, {"scores": "score 0"}, "give a list of K columns"),
        (BY_NAME, {"scores": [*SCORES[:11], "label"]}, "scores: a column is not of numbers"),
        (COUNTS, {"prediction": "predicted"}, r"'predicted'\] holds 'kind 0' .* mapping"),
        (
            {name: 5 for name in NAMES if name != "kind 7"},
            {"prediction": "predicted"},
            "holds 'kind 7'",
        ),
        (pd.Series([5] * 13, [*NAMES, NAMES[2]]), {"prediction": "predicted"}, "see 'kind 2'"),
        (
            BY_NAME,
            {"prediction": "predicted", "prior": dict.fromkeys(NAMES[:11], 1 / 11)},
            "prior must name every class of counts once; see 'kind 11'",
        ),
        (
            BY_NAME,
            {"prediction": "predicted", "d_groups": {**BY_NAME, "odd": 0}},
            "d_groups must name every class of counts once; see 'odd'",
        ),
    ],
)
def test_bad_frames(counts, arguments, match):
    frame = frame_of(np.eye(12), L)
    with pytest.raises(ValueError, match=match):
        Diagnosis.from_frame(frame, counts, **arguments)


def test_scores_named_like_classes_must_be_in_their_order():
    frame = frame_of(np.eye(12), L).rename(columns=dict(zip(SCORES, NAMES, strict=True)))
    found = Diagnosis.from_frame(frame, BY_NAME, scores=NAMES)
    assert found.accuracy == 1
    with pytest.raises(ValueError, match=r"in another order .* scores=list\(counts.keys\(\)\)"):
        Diagnosis.from_frame(frame, BY_NAME, scores=NAMES[::-1])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: group_table([0.5, 1.5], [0, 1]), "accuracy: give one share"),
        (lambda: group_table([0.5, 0.5], [0, 3]), "groups: give 0"),
        (lambda: group_table([0.5, 0.5], [0]), "groups: give 0"),
        (lambda: group_table([0.5, 0.5], [0, 1], level=1.0), "level=1.0"),
        (lambda: cell_table([0.5, 0.5], [0, 1], [0]), "p_groups: give 0"),
        (lambda: cell_table([0.5, 0.5], [-1, 1], [0, 1]), "d_groups: give 0"),
    ],
)
def test_bad_tables(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_without_a_level_there_are_no_intervals_and_no_reading():
    draw = np.random.default_rng(3)
    labels, counts = draw.integers(0, 9, 300), [90, 80, 70, 30, 20, 15, 5, 4, 3]
    answers = np.where(draw.random(300) < 0.7, labels, 0)
    prior = np.arange(1, 10) / 45
    slow, quick = (Diagnosis(answers, labels, counts, prior=prior, level=v) for v in (0.95, None))
    assert quick.data_interval is None
    assert quick.parameter_interval is None
    for table in ("data", "parameter", "cells"):
        a, b = getattr(slow, table), getattr(quick, table)
        assert b[["low", "high"]].isna().all().all()
        assert a.drop(columns=["low", "high"]).equals(b.drop(columns=["low", "high"]))
    assert quick.data_gap == slow.data_gap
    assert "intervals" not in quick.figure_alt()
    plt.close(quick.figure())
    with pytest.raises(ValueError, match="left the intervals out"):
        quick.reading()


def test_a_reading_can_be_given_a_width():
    labels = np.repeat(np.arange(6), 10)
    found = Diagnosis(np.where(labels > 3, 0, labels), labels, [50, 40, 30, 5, 4, 3])
    plain, narrow = found.reading(), found.reading(width=60)
    assert max(map(len, plain.splitlines())) > 60
    assert max(map(len, narrow.splitlines())) <= 60
    assert narrow.split() == plain.split()


class Arrow:
    """A table whose ``columns`` are the columns themselves, as Arrow's are."""

    def __init__(self, columns):
        self.held = columns
        self.column_names, self.columns = list(columns), list(columns.values())

    def __getitem__(self, name):
        return self.held[name]


def polars(columns):
    return pytest.importorskip("polars").DataFrame(columns)


def arrow(columns):
    return pytest.importorskip("pyarrow").table(columns)


@pytest.mark.parametrize("table", [pd.DataFrame, dict, Arrow, polars, arrow])
def test_tables_of_any_library_are_read(table):
    draw = np.random.default_rng(0)
    label = draw.integers(3, size=60)
    answer = np.where(draw.random(60) < 0.7, label, 0)
    names = np.array(["a", "b", "c"])
    by_number = Diagnosis.from_frame(
        table({"label": label, "answer": answer}), [300, 60, 9], prediction="answer"
    )
    by_name = Diagnosis.from_frame(
        table({"label": names[label], "answer": names[answer]}),
        {"a": 300, "b": 60, "c": 9},
        prediction="answer",
    )
    scores = {name: (answer == k) * 3.0 for k, name in enumerate("abc")}
    by_score = Diagnosis.from_frame(
        table({"label": label, **scores}), [300, 60, 9], scores=["a", "b", "c"]
    )
    assert by_number.micro == by_name.micro == by_score.micro == (label == answer).mean()


class Lazy:
    columns = ("label", "answer")

    def collect(self):
        raise AssertionError("not ours to run")


def test_columns_that_hold_no_names_or_are_there_twice_are_named():
    nested = pd.DataFrame({"label": [[0], [1]], "answer": [0, 1]})
    with pytest.raises(ValueError, match=r"'label'. holds list, not class names"):
        Diagnosis.from_frame(nested, [3, 2], prediction="answer")
    twice = pd.DataFrame([[0, 0, 1]], columns=["label", "answer", "answer"])
    with pytest.raises(ValueError, match=r"columns \['answer'\] more than once"):
        Diagnosis.from_frame(twice, [3, 2], prediction="answer")


@pytest.mark.parametrize(
    ("frame", "counts", "words"),
    [
        (Lazy(), [3, 2, 1], "collect()"),
        ([{"label": 0, "answer": 0}], [3, 2, 1], "to_pandas"),
        ({"label": [0], "answer": [0]}, pd.DataFrame({"label": [0], "count": [3]}), "mapping"),
        ({"label": [0], "answer": [0]}, iter([3, 2, 1]), "mapping"),
    ],
)
def test_what_is_no_table_is_named(frame, counts, words):
    with pytest.raises(TypeError, match=words.replace("(", r"\(").replace(")", r"\)")):
        Diagnosis.from_frame(frame, counts, prediction="answer")


@pytest.mark.parametrize(
    "kind",
    [
        list,
        lambda v: pd.Series(v).convert_dtypes(),
        lambda v: torch.tensor(v).to(torch.uint8),
        lambda v: [torch.tensor(one) for one in v],
    ],
)
def test_classes_of_any_kind_are_read(kind):
    label, answer = np.array([0, 1, 2, 1]), np.array([0, 1, 2, 2])
    assert Diagnosis(kind(answer), kind(label), [30, 20, 10]).micro == 0.75


def test_rows_of_logits_that_carry_gradients_are_read():
    rows = [torch.tensor([float(k == j) * 4 for j in range(3)], requires_grad=True) for k in (0, 1)]
    assert Diagnosis(rows, [0, 2], [30, 20, 10]).micro == 0.5
