"""The method, long tails made to measure, groups, and averages of models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import rankdata

from toolkit.core.seeds import generator
from toolkit.diagnose import longtail_bias as lb
from toolkit.diagnose.longtail_bias import ensemble, tails
from toolkit.diagnose.longtail_bias.adjustment import logit_adjust
from toolkit.diagnose.longtail_bias.losses import LogitAdjustedLoss

DOUBLE = torch.float64
# CIFAR-100-LT with imbalance 100: int(500 * 0.01 ** (k / 99)), typed from the official code's run
CIFAR100_IR100 = [
    500, 477, 455, 434, 415, 396, 378, 361, 344, 328, 314, 299, 286, 273, 260, 248, 237, 226, 216,
    206, 197, 188, 179, 171, 163, 156, 149, 142, 135, 129, 123, 118, 112, 107, 102, 98, 93, 89, 85,
    81, 77, 74, 70, 67, 64, 61, 58, 56, 53, 51, 48, 46, 44, 42, 40, 38, 36, 35, 33, 32, 30, 29, 27,
    26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 15, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9,
    8, 8, 7, 7, 7, 6, 6, 6, 6, 5, 5, 5, 5,
]  # fmt: skip


def models(count=3, rows=40, classes=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(count, rows, classes, generator=draw, dtype=DOUBLE)
    return z, torch.randint(0, classes, (rows,), generator=draw)


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


# the method


def test_the_method_is_its_loss_and_its_average():
    method = lb.BackdoorAdjustment()
    assert (method.tau, method.reduce) == (1.0, "logit")
    counts = torch.tensor([60, 30, 9, 1])
    z, y = models()
    loss = lb.BackdoorAdjustment(tau=0.5).loss(counts)
    assert isinstance(loss, LogitAdjustedLoss)
    wanted = F.cross_entropy(z[0] + 0.5 * (counts / 100).log(), y)
    torch.testing.assert_close(loss(z[0], y), wanted, atol=1e-6, rtol=0)
    assert float(lb.BackdoorAdjustment(tau=0.0).loss(counts)(z[0], y)) == pytest.approx(
        float(F.cross_entropy(z[0], y))
    )
    np.testing.assert_allclose(method.predict(z), z.numpy().mean(0), atol=1e-14)
    probabilities = lb.BackdoorAdjustment(reduce="prob").predict(z)
    np.testing.assert_allclose(probabilities, np.log(softmax(z.numpy()).mean(0)), atol=1e-13)
    first = method.predict(list(z), [1.0, 0.0, 0.0])
    torch.testing.assert_close(first, z[0], atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"counts\[1\] is 0"):
        method.loss(torch.tensor([3, 0, 2]))
    floored = method.loss(torch.tensor([3, 0, 2]), floor=1.0)
    torch.testing.assert_close(floored.shift, torch.tensor([3, 1, 2.0]).div(6).log())


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"tau": -0.1}, ValueError, "tau"),
        ({"tau": 5.0}, ValueError, "tau"),
        ({"tau": math.nan}, ValueError, "tau"),
        ({"tau": "1"}, TypeError, "tau"),
        ({"reduce": "sum"}, ValueError, "reduce"),
    ],
)
def test_hyperparameters_are_checked(options, kind, words):
    with pytest.raises(kind, match=words):
        lb.BackdoorAdjustment(**options)


def test_the_module_offers_what_it_lists():
    assert len(lb.__all__) == len(set(lb.__all__))
    for name in lb.__all__:
        assert getattr(lb, name).__doc__, name
    assert lb.backdoor_adjust is ensemble.backdoor_adjust


# counts and samples


def test_cifar_counts_are_those_of_the_official_code():
    assert tails.longtail_counts(100, 500, 100).tolist() == CIFAR100_IR100
    for ratio, total, ends in (
        (100, 10_847, [500, 477, 5]),
        (50, 12_608, [500, 480, 10]),
        (10, 19_573, [500, 488, 50]),
    ):
        counts = tails.longtail_counts(100, 500, ratio)
        assert int(counts.sum()) == total
        assert [int(counts[k]) for k in (0, 1, 99)] == ends


@pytest.mark.parametrize("profile", tails.PROFILES)
def test_whole_numbers_survive_and_the_ends_are_exact(profile):
    for ratio in range(1, 200):  # 49 * (1 / 49) is below 1
        counts = tails.longtail_counts(7, 3 * ratio, ratio, profile)
        assert (int(counts[0]), int(counts[-1])) == (3 * ratio, 3), ratio
        assert (counts.diff() <= 0).all()
    assert tails.longtail_counts(3, 49 * 49, 49 * 49).tolist() == [2401, 49, 1]
    assert tails.longtail_counts(5, 8, 1, profile).tolist() == [8] * 5


def test_pareto_is_its_formula_and_becomes_exponential():
    u = np.arange(20) / 19
    for alpha in (0.5, 1.0, 6.0):
        wanted = np.floor(9999 * (1 + (50 ** (1 / alpha) - 1) * u) ** -alpha + 1e-9)
        assert tails.longtail_counts(20, 9999, 50, "pareto", alpha).tolist() == wanted.tolist()
    exponential = tails.longtail_counts(20, 10**6, 50).double()
    gaps = [
        float((tails.longtail_counts(20, 10**6, 50, "pareto", a) / exponential - 1).abs().max())
        for a in (1.0, 6.0, 100.0, 1e4)
    ]
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3]
    assert gaps[3] < 1e-3


def test_an_order_says_which_class_is_frequent():
    counts = tails.longtail_counts(4, 27, 27, order=[2, 0, 3, 1])
    assert counts.tolist() == [9, 1, 27, 3]
    assert tails.longtail_counts(4, 27, 27, order=torch.tensor([2, 0, 3, 1])).tolist() == [
        9, 1, 27, 3,
    ]  # fmt: skip


def test_samples_have_exactly_the_counts_and_hold_nothing_twice():
    labels = torch.randint(0, 5, (500,), generator=generator(0))
    counts = torch.tensor([60, 0, 17, 1, 40])
    chosen = tails.longtail_sample(labels, counts, generator(1))
    assert torch.bincount(labels[chosen], minlength=5).tolist() == counts.tolist()
    assert len(chosen.unique()) == len(chosen) == 118
    assert torch.equal(chosen, tails.longtail_sample(labels, counts, generator(1)))
    assert not torch.equal(chosen, tails.longtail_sample(labels, counts, generator(2)))
    every = torch.bincount(labels, minlength=5)
    assert tails.longtail_sample(labels, every, generator(1)).sort().values.tolist() == list(
        range(500)
    )


# orders


def spearman(a, b):
    """Of two orders: each class's place in one against its place in the other."""
    return np.corrcoef(np.argsort(a), np.argsort(b))[0, 1]


@pytest.mark.parametrize("seed", range(4))
def test_orders_have_the_correlation_asked_for(seed):
    order = torch.randperm(100, generator=generator(seed))
    for wanted in np.linspace(-0.95, 0.95, 11):
        made = tails.correlated_order(order, float(wanted), generator(seed, "made"))
        assert sorted(made.tolist()) == list(range(100))
        assert spearman(order.numpy(), made.numpy()) == pytest.approx(wanted, abs=0.02)
    assert torch.equal(tails.correlated_order(order, 1.0, generator(seed)), order)
    assert torch.equal(tails.correlated_order(order, -1.0, generator(seed)), order.flip(0))
    pair = [tails.correlated_order(order, 0.0, generator(seed, i)) for i in (0, 1)]
    assert not torch.equal(*pair)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_short_orders_too(size):
    for seed in range(20):
        order = torch.randperm(size, generator=generator(seed))
        assert torch.equal(tails.correlated_order(order, 1.0, generator(seed)), order)
        assert torch.equal(tails.correlated_order(order, -1.0, generator(seed)), order.flip(0))
        made = tails.correlated_order(order, 0.3, generator(seed))
        assert sorted(made.tolist()) == list(range(size))


def test_rank_correlation_is_that_of_mean_ranks():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 6, (2, 40), generator=draw)
    wanted = np.corrcoef(rankdata(a), rankdata(b))[0, 1]
    assert tails.rank_correlation(a, b) == pytest.approx(wanted)
    x = torch.rand(9, generator=draw, requires_grad=True)
    assert tails.rank_correlation(x, x.exp()) == pytest.approx(1.0)
    assert tails.rank_correlation(x, -x) == pytest.approx(-1.0)


# groups


def test_groups_by_count_have_the_cuts_of_the_convention():
    counts = torch.tensor([500, 101, 100, 50, 20, 19, 1, 0])
    assert tails.groups_by_count(counts).tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert tails.groups_by_count(counts, many=50, few=51).tolist() == [0, 0, 0, 2, 2, 2, 2, 2]
    cifar = tails.groups_by_count(torch.tensor(CIFAR100_IR100))
    assert torch.bincount(cifar).tolist() == [35, 35, 30]


def test_groups_by_rank_are_thirds_with_the_rest_in_the_last():
    values = torch.tensor([0.1, 0.3, 0.05, 0.2, 0.3, 0.04, 0.01, 0.0])
    # ranks: 1, 4 | 3, 0 | 2, 5, 6, 7
    assert tails.groups_by_rank(values).tolist() == [1, 0, 2, 1, 0, 2, 2, 2]
    assert tails.groups_by_rank(torch.ones(3)).tolist() == [0, 1, 2]
    draw = torch.randperm(100, generator=generator(0))
    groups = tails.groups_by_rank(draw.double())
    assert torch.bincount(groups).tolist() == [33, 33, 34]
    assert draw[groups == 0].min() > draw[groups == 1].max()
    assert draw[groups == 1].min() > draw[groups == 2].max()


# generalised logit adjustment


def test_gla_is_its_formula_and_its_special_cases():
    (tuned, zero, _), _ = models()
    p, q = (torch.tensor(v, dtype=DOUBLE) for v in ([0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.2, 0.5]))
    full = ensemble.gla(tuned, zero, q, p)
    np.testing.assert_allclose(
        full, tuned.numpy() + zero.numpy() - np.log(q.numpy()) - np.log(p.numpy()), atol=1e-7
    )
    torch.testing.assert_close(ensemble.gla(tuned, zero, q), full + p.log(), atol=1e-7, rtol=0)
    even = torch.full((4,), 0.25, dtype=DOUBLE)
    both = ensemble.gla(tuned, zero, even, even)
    torch.testing.assert_close(both.log_softmax(1), (tuned + zero).log_softmax(1))
    # without fine-tuning it is the zero-shot model with its prior taken out
    torch.testing.assert_close(
        ensemble.gla(torch.zeros_like(zero), zero, q), logit_adjust(zero, q), atol=1e-7, rtol=0
    )


def test_gla_refuses_to_adjust_twice():
    (tuned, zero, _), _ = models()
    p = torch.full((4,), 0.25, dtype=DOUBLE)
    adjusted = logit_adjust(tuned, p)
    ensemble.gla(adjusted, zero, p)
    with pytest.raises(ValueError, match="fine_tuned were adjusted"):
        ensemble.gla(adjusted, zero, p, p)
    with pytest.raises(ValueError, match="zero_shot were adjusted"):
        ensemble.gla(tuned, logit_adjust(zero, p), p)
    broken = zero.clone()
    broken[1, 2] = math.nan
    for pair, name in (((tuned, broken), "zero_shot"), ((broken, zero), "fine_tuned")):
        with pytest.raises(ValueError, match=rf"{name}\[1\] holds NaN"):
            ensemble.gla(*pair, p)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gla_in_half_precision_lets_no_rare_class_win(dtype):
    rare = torch.tensor([1 - 3e-8, 1e-8, 1e-8, 1e-8])
    z = torch.zeros(2, 4, dtype=dtype)
    found = ensemble.gla(z, z, rare, rare)
    assert found.dtype == dtype
    assert found.isfinite().all()


def test_marks_of_adjustment_survive_the_averages():
    z, _ = models()
    p = torch.full((4,), 0.25, dtype=DOUBLE)
    adjusted = [logit_adjust(one, p) for one in z]
    for combined in (
        ensemble.gla(z[0], z[1], p),
        *(ensemble.backdoor_adjust(adjusted, how) for how in ensemble.REDUCE),
        ensemble.backdoor_adjust(logit_adjust(z, p)),
    ):
        with pytest.raises(ValueError, match="adjusted for a prior already"):
            logit_adjust(combined, p)
    logit_adjust(ensemble.backdoor_adjust(z), p)


# the backdoor average


@pytest.mark.parametrize("reduce", ensemble.REDUCE)
def test_the_average_is_its_formula_and_its_identities_hold(reduce):
    z, _ = models()
    w = np.array([0.5, 0.3, 0.2])
    found = ensemble.backdoor_adjust(z, reduce, w)
    if reduce == "logit":
        wanted = np.einsum("m,mnk->nk", w, z.numpy())
    else:
        wanted = np.log(np.einsum("m,mnk->nk", w, softmax(z.numpy())))
    np.testing.assert_allclose(found, wanted, atol=1e-13)
    average = ensemble.backdoor_adjust(z, reduce)
    third = ensemble.backdoor_adjust(z, reduce, torch.full((3,), 1 / 3))
    torch.testing.assert_close(average, third, atol=1e-6, rtol=0)
    for order in ([2, 0, 1], [1, 0, 2]):
        swapped = ensemble.backdoor_adjust([z[m] for m in order], reduce)
        torch.testing.assert_close(swapped, average, atol=1e-13, rtol=0)
    one = z[0] if reduce == "logit" else z[0].log_softmax(1)
    for same in (z[:1], z[:1].expand(4, -1, -1)):
        found = ensemble.backdoor_adjust(same, reduce)
        torch.testing.assert_close(found, one, atol=1e-13, rtol=0)
    # a model without weight does not count, however sure it is
    loud = z * torch.tensor([1.0, 1.0, 1e3], dtype=DOUBLE)[:, None, None]
    pair = ensemble.backdoor_adjust(z[:2], reduce)
    quiet = ensemble.backdoor_adjust(loud, reduce, [0.5, 0.5, 0.0])
    torch.testing.assert_close(quiet, pair, atol=1e-13, rtol=0)


@pytest.mark.parametrize("reduce", ensemble.REDUCE)
def test_a_model_without_weight_has_no_say_whatever_it_answers(reduce):
    z, _ = models()
    never = z[0].clone()
    never[:, 1] = -math.inf
    found = ensemble.backdoor_adjust([never, z[1]], reduce, [0.0, 1.0])
    torch.testing.assert_close(found.log_softmax(1), z[1].log_softmax(1))


def test_logits_and_probabilities_differ_where_models_do():
    z, _ = models()
    a, b = (ensemble.backdoor_adjust(z, r).softmax(1) for r in ensemble.REDUCE)
    assert float((a - b).abs().max()) > 0.05


def test_fitted_weights_find_the_better_model_and_the_optimum():
    z, y = models(2, 300)
    good = 2.0 * F.one_hot(y, 4) + 0.5 * z[0]
    for reduce in ensemble.REDUCE:
        pair = torch.stack([z[1], good])
        w = ensemble.fit_weights(pair, y, reduce)
        assert w.dtype == DOUBLE
        assert float(w.sum()) == pytest.approx(1.0)
        assert float(w[1]) > 0.9
        # two middling models: the optimum of a fine grid
        pair = torch.stack([good + z[1], good - z[1].roll(1, 0)])
        grid = np.linspace(0.001, 0.999, 999)[:, None]
        a, b = pair.numpy()
        if reduce == "prob":
            own = [softmax(m)[np.arange(300), y] for m in (a, b)]
            losses = -np.log(grid * own[0] + (1 - grid) * own[1]).mean(1)
        else:
            mixed = grid[..., None] * a + (1 - grid[..., None]) * b
            losses = -np.log(softmax(mixed)[:, np.arange(300), y]).mean(1)
        best = float(grid[np.argmin(losses), 0])
        assert 0.1 < best < 0.9
        assert float(ensemble.fit_weights(pair, y, reduce)[0]) == pytest.approx(best, abs=2e-3)


@pytest.mark.filterwarnings("error")
def test_fitting_weights_is_silent():
    z, y = models()
    torch.set_warn_always(True)  # by default PyTorch warns once per process
    try:
        ensemble.fit_weights(z, y)
    finally:
        torch.set_warn_always(False)


MODELS, LABELS = models()
BROKEN = MODELS.clone()
BROKEN[1, 5, 2] = math.nan
EVEN = torch.full((4,), 0.25)
NAMES = ["cat", "dog", "eel", "fox"]
ANY = torch.arange(4).repeat(10)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tails.longtail_counts(1, 5, 2), "classes=1"),
        (lambda: tails.longtail_counts(3, 0, 1), "largest=0"),
        (lambda: tails.longtail_counts(3, 5, 0.5), "ratio=0.5"),
        (lambda: tails.longtail_counts(3, 5, math.nan), "ratio=nan"),
        (lambda: tails.longtail_counts(3, 5, math.inf), "ratio=inf"),
        (lambda: tails.longtail_counts(3, 5, 2, "pareto", alpha=0.0), "alpha=0.0"),
        (lambda: tails.longtail_counts(3, 5, 2, "zipf"), "profile='zipf'"),
        (lambda: tails.longtail_counts(3, 5, 6), "a ratio of at most 5"),
        (lambda: tails.longtail_counts(3, 5, 2, order=[0, 1]), "classes 0 to 2 once"),
        (lambda: tails.longtail_counts(3, 5, 2, order=[0, 1, 1]), "classes 0 to 2 once"),
        (lambda: tails.longtail_sample(ANY, torch.tensor([1, 11, 0, 0]), generator(0)), "10 exam"),
        (lambda: tails.longtail_sample(ANY, torch.tensor([1, -1]), generator(0)), "counts[1] = -1"),
        (lambda: tails.longtail_sample(ANY, torch.tensor([1, 0.5]), generator(0)), "counts[1] = 0"),
        (lambda: tails.correlated_order([0, 1, 2], 1.1, generator(0)), "correlation=1.1"),
        (lambda: tails.correlated_order([0, 1, 2], math.nan, generator(0)), "correlation=nan"),
        (lambda: tails.correlated_order([0, 2, 2], 0.5, generator(0)), "classes 0 to 2 once"),
        (lambda: tails.groups_by_count(torch.tensor([5, -1])), "counts[1] = -1"),
        (lambda: tails.groups_by_count(torch.tensor([5, 1]), many=3, few=5), "few=5 and many=3"),
        (lambda: tails.groups_by_rank(torch.tensor([0.5, 0.5])), "at least three"),
        (lambda: tails.groups_by_rank(torch.tensor([0.5, math.nan, 0.1])), "one finite number"),
        (lambda: ensemble.gla(MODELS[0], MODELS[1, :5], EVEN), "the same examples and classes"),
        (lambda: ensemble.gla(MODELS[0], MODELS[1], EVEN[:3] * 4 / 3), "model_prior has shape"),
        (lambda: ensemble.gla(MODELS[0], MODELS[1], EVEN, torch.arange(4)), "whole numbers"),
        (lambda: ensemble.gla(MODELS[0], MODELS[1], EVEN, EVEN * 2), "prior sums to 2"),
        (lambda: ensemble.backdoor_adjust([]), "holds no model"),
        (lambda: ensemble.backdoor_adjust(MODELS, "mean"), "reduce='mean'"),
        (lambda: ensemble.backdoor_adjust([MODELS[0], MODELS[1, :, :3]]), "logits[1] has shape"),
        (lambda: ensemble.backdoor_adjust([MODELS[0], MODELS[1, :9]]), "logits[1] has shape"),
        (lambda: ensemble.backdoor_adjust(BROKEN), "logits[1][5] holds NaN"),
        (lambda: ensemble.backdoor_adjust(MODELS, weights=[0.5, 0.5]), "give 3 numbers"),
        (lambda: ensemble.backdoor_adjust(MODELS, weights=[0.5, 0.7, -0.2]), "0 or more"),
        (lambda: ensemble.backdoor_adjust(MODELS, weights=[1.0, 1.0, 1.0]), "sum to 1"),
        (lambda: ensemble.backdoor_adjust(MODELS, weights=[1.0, 0.0, math.nan]), "sum to 1"),
        (
            lambda: ensemble.backdoor_adjust(MODELS, classes=[NAMES, NAMES, NAMES[::-1]]),
            "model 2 does not have the class names",
        ),
        (lambda: ensemble.backdoor_adjust(MODELS, classes=[NAMES] * 2), "class names"),
        (lambda: ensemble.backdoor_adjust(MODELS, classes=[NAMES[:3]] * 3), "class names"),
        (lambda: ensemble.fit_weights(MODELS, LABELS[:-1]), "40 rows"),
        (lambda: ensemble.fit_weights(BROKEN, LABELS), "holds NaN"),
        (lambda: ensemble.fit_weights(MODELS, LABELS, "mean"), "reduce='mean'"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)


def test_equal_class_names_are_accepted():
    named = ensemble.backdoor_adjust(MODELS, classes=[NAMES] * 3)
    assert torch.equal(named, ensemble.backdoor_adjust(MODELS))


def test_the_method_compares_class_names_too():
    z = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    method = lb.BackdoorAdjustment()
    names = [list("abcd"), list("abcd")]
    assert torch.equal(method.predict(z, classes=names), method.predict(z))
    with pytest.raises(ValueError, match="class names"):
        method.predict(z, classes=[list("abcd"), list("abdc")])
