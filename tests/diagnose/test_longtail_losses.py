"""Losses for long tails against their definitions in NumPy, and priors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from toolkit.core.lanes import lane_loss
from toolkit.diagnose.longtail_bias import adjustment, checks, losses

DOUBLE = torch.float64
COUNTS = torch.tensor([200, 57, 9, 3, 1])
N = COUNTS.double().numpy()
PRIOR = torch.tensor(N / N.sum())
MODEL = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05], dtype=DOUBLE)
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0], dtype=DOUBLE)


def batch(rows=7, classes=5, seed=0, seen=5):
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, classes, generator=draw, dtype=DOUBLE)
    return logits, torch.randint(0, seen, (rows,), generator=draw)


def each(z, y):
    """Cross-entropy of every row, from the definition."""
    z = z - z.max(1, keepdims=True)
    return np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), y]


def weighted(w):
    return lambda z, y: (w[y] * each(z, y)).sum() / w[y].sum()


def focal(gamma, w=1.0):
    def value(z, y):
        loss = each(z, y) * (w[y] if np.ndim(w) else w)
        return ((1 - np.exp(-loss)) ** gamma * loss).mean()

    return value


def ldam(most, scale):
    margin = most * (N / N.min()) ** -0.25

    def value(z, y):
        z = z.copy()
        z[np.arange(len(z)), y] -= scale * margin[y]
        return each(z, y).mean()

    return value


def lade(regularise, weight):
    pi = N / N.sum()

    def value(z, y):
        rows, classes = z.shape
        total = 0.0
        for k in range(classes):
            mine = z[y == k, k]
            own = mine.mean() if len(mine) else 0.0
            bound = np.log(np.exp(z[:, k] - np.log(pi[k]) - np.log(classes)).sum() / rows)
            total += pi[k] * (own - bound - regularise * bound**2)
        return each(z + np.log(pi), y).mean() - weight * total

    return value


def class_balanced(beta):
    return weighted((1 - beta) / (1 - beta**N))


LOSSES = {
    "focal": (lambda: losses.FocalLoss(), focal(2.0)),
    "focal 0.5": (lambda: losses.FocalLoss(0.5), focal(0.5)),
    "focal weight": (lambda: losses.FocalLoss(2.0, WEIGHT), focal(2.0, WEIGHT.numpy())),
    "ldam": (lambda: losses.LDAMLoss(COUNTS.double()), ldam(0.5, 30)),
    "ldam 0.3": (lambda: losses.LDAMLoss(COUNTS.double(), 0.3, 25.0), ldam(0.3, 25)),
    "class-balanced": (
        lambda: losses.ClassBalancedLoss(COUNTS.double()),
        class_balanced(0.9999),
    ),
    "class-balanced 0.9": (
        lambda: losses.ClassBalancedLoss(COUNTS.double(), 0.9),
        class_balanced(0.9),
    ),
    "reweighted": (lambda: losses.ReweightedLoss(PRIOR), weighted(1 / N)),
    "reweighted 0.5": (lambda: losses.ReweightedLoss(PRIOR, 0.5), weighted(N**-0.5)),
    "balanced softmax": (
        lambda: losses.BalancedSoftmaxLoss(PRIOR),
        lambda z, y: each(z + np.log(N), y).mean(),
    ),
    "logit-adjusted": (
        lambda: losses.LogitAdjustedLoss(PRIOR),
        lambda z, y: each(z + np.log(N), y).mean(),
    ),
    "logit-adjusted 2": (
        lambda: losses.LogitAdjustedLoss(PRIOR, 2.0),
        lambda z, y: each(z + 2 * np.log(N), y).mean(),
    ),
    "gla-train": (
        lambda: losses.GLATrainLoss(PRIOR, MODEL, 0.5),
        lambda z, y: each(z + 0.5 * np.log(N) + np.log(MODEL.numpy()), y).mean(),
    ),
    "lade": (lambda: losses.LADELoss(PRIOR), lade(0.1, 0.1)),
    "lade 0.3": (lambda: losses.LADELoss(PRIOR, 0.3, 0.7), lade(0.3, 0.7)),
}


@pytest.mark.parametrize("seen", [5, 2])  # 2: the batch misses three classes
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_those_of_the_definition(name, seen):
    make, expected = LOSSES[name]
    loss = make()
    z, y = batch(seen=seen)
    z.requires_grad_()
    value = loss(z, y)
    assert value.shape == ()
    # official constants of 1e-9 inside logarithms and 1e-8 beside counts
    assert float(value.detach()) == pytest.approx(
        expected(z.detach().numpy(), y.numpy()), rel=2e-7, abs=2e-7
    )
    (slope,) = torch.autograd.grad(value, z)
    for i, k in ((0, 0), (1, int(y[1])), (3, 4), (6, 1)):
        step = np.zeros(z.shape)
        step[i, k] = 1e-5
        up, down = (expected(z.detach().numpy() + s * step, y.numpy()) for s in (1, -1))
        assert float(slope[i, k]) == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-7)
    assert torch.autograd.gradcheck(lambda t: loss(t, y), (z,))


@pytest.mark.parametrize("kind", ["LADELoss", "BalancedSoftmaxLoss", "LogitAdjustedLoss"])
def test_a_rare_class_has_a_finite_loss_in_half_precision(kind):
    prior = torch.tensor([1 - 2e-8, 1e-8, 1e-8])  # 1e-8 is 0 in half precision
    z = torch.zeros(2, 3, dtype=torch.float16, requires_grad=True)
    loss = getattr(losses, kind)(prior)(z, torch.tensor([0, 1]))
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"focal", "focal 0.5"}))
def test_logits_of_other_classes_are_refused(name):
    with pytest.raises(ValueError, match="logits have 4 classes, this loss was made for 5"):
        LOSSES[name][0]()(torch.zeros(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("name", LOSSES)
def test_single_precision_and_one_example_are_fine(name):
    loss = LOSSES[name][0]().float()
    z, y = batch(1, seed=3)
    z, y = z.float().requires_grad_(), torch.tensor([4])
    value = loss(z, y)
    value.backward()
    assert value.isfinite()
    assert z.grad.isfinite().all()
    assert z.grad.dtype == torch.float32


EQUAL = torch.full((5,), 0.2, dtype=DOUBLE)


@pytest.mark.parametrize(
    "loss",
    [
        losses.LogitAdjustedLoss(EQUAL),
        losses.LogitAdjustedLoss(EQUAL, 3.0),
        losses.LogitAdjustedLoss(PRIOR, 0.0),
        losses.BalancedSoftmaxLoss(EQUAL),
        losses.GLATrainLoss(EQUAL, EQUAL),
        losses.FocalLoss(0.0),
        losses.FocalLoss(0.0, torch.ones(5, dtype=DOUBLE)),
        losses.LDAMLoss(COUNTS.double(), max_margin=0.0),
        losses.ClassBalancedLoss(COUNTS.double(), beta=0.0),
        losses.ClassBalancedLoss(torch.full((5,), 8.0, dtype=DOUBLE)),
        losses.ReweightedLoss(PRIOR, 0.0),
        losses.ReweightedLoss(EQUAL),
        losses.LADELoss(EQUAL, weight=0.0),
    ],
)
def test_without_imbalance_or_strength_it_is_cross_entropy(loss):
    z, y = batch(20)
    z.requires_grad_()
    found, plain = loss(z, y), F.cross_entropy(z, y)
    torch.testing.assert_close(found, plain, atol=1e-14, rtol=1e-14)
    slopes = [torch.autograd.grad(v, z)[0] for v in (found, plain)]
    torch.testing.assert_close(*slopes, atol=1e-14, rtol=1e-12)


def test_balanced_softmax_is_logit_adjustment_at_one_and_constants_change_nothing():
    z, y = batch(20)
    z.requires_grad_()
    one, other = losses.BalancedSoftmaxLoss(PRIOR), losses.LogitAdjustedLoss(PRIOR)
    shifted = losses.LogitAdjustedLoss(PRIOR)
    shifted.shift += 3.7  # log prior up to a constant, such as log counts
    values = [loss(z, y) for loss in (one, other, shifted)]
    slopes = [torch.autograd.grad(v, z)[0] for v in values]
    for value, slope in zip(values, slopes, strict=True):
        torch.testing.assert_close(value, values[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(slope, slopes[0], atol=1e-7, rtol=0)
    moved = other(z + torch.randn(20, 1, dtype=DOUBLE), y)
    torch.testing.assert_close(moved, values[1], atol=1e-12, rtol=0)


def test_gla_train_adds_the_two_priors():
    z, y = batch(20)
    joint = PRIOR * MODEL
    both = losses.BalancedSoftmaxLoss(joint / joint.sum())
    torch.testing.assert_close(losses.GLATrainLoss(PRIOR, MODEL)(z, y), both(z, y))


def test_weights_have_mean_one_and_rise_towards_the_tail():
    for loss in (
        losses.ClassBalancedLoss(COUNTS.double()),
        losses.ReweightedLoss(PRIOR),
        losses.ReweightedLoss(PRIOR, 0.5),
    ):
        assert float(loss.weight.mean()) == pytest.approx(1.0)
        assert (loss.weight.diff() > 0).all()
    margin = losses.LDAMLoss(torch.tensor([16, 1, 81])).margin
    torch.testing.assert_close(margin, torch.tensor([0.25, 0.5, 0.5 / 3]))


@pytest.mark.parametrize("beta", [0.9999, 1 - 1e-7, 0.99999999])
def test_effective_numbers_survive_a_beta_close_to_one(beta):
    counts = torch.tensor([1, 10, 100_000])
    weight = losses.ClassBalancedLoss(counts.double(), beta).weight.numpy()
    w = -1 / np.expm1(counts.double().numpy() * math.log(beta))
    np.testing.assert_allclose(weight, w / w.mean(), rtol=1e-5)
    # whole numbers round as in the official code, but must not end in 0 / 0
    if beta > 1 - 1e-7:
        with pytest.raises(ValueError, match="double precision"):
            losses.ClassBalancedLoss(counts, beta)


def test_trained_logit_adjustment_converges_to_the_balanced_bayes_classifier():
    # six values of x, exact shares of a long-tailed training set: the optimum has a closed form
    likelihood = torch.tensor([[8, 5, 3, 2, 1, 1], [1, 4, 7, 4, 2, 2], [1, 2, 2, 4, 5, 6]]) / 20
    counts = torch.tensor([200, 60, 20])
    cells = (likelihood * counts[:, None]).round().long()
    y, x = (cells > 0).nonzero().T
    repeats = cells[y, x]
    x, y = x.repeat_interleave(repeats), y.repeat_interleave(repeats)
    assert len(x) == 280
    prior = checks.prior_from_counts(counts)
    found = {}
    for name, loss in (
        ("adjusted", losses.LogitAdjustedLoss(prior.double())),
        ("plain", torch.nn.CrossEntropyLoss()),
    ):
        table = torch.zeros(6, 3, dtype=DOUBLE, requires_grad=True)
        descent = torch.optim.LBFGS([table], max_iter=500, tolerance_grad=1e-10,
                                    tolerance_change=0, line_search_fn="strong_wolfe")  # fmt: skip

        def closure(table=table, loss=loss, descent=descent):
            descent.zero_grad()
            value = loss(table[x], y)
            value.backward()
            return value

        descent.step(closure)
        found[name] = table.detach().softmax(1)
    balanced = likelihood.double().T / likelihood.double().sum(0)[:, None]
    joint = (likelihood * counts[:, None]).double()
    torch.testing.assert_close(found["adjusted"], balanced, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["plain"], (joint / joint.sum(0)).T, atol=1e-5, rtol=0)


def test_priors_from_counts():
    assert checks.prior_from_counts(torch.tensor([6, 3, 1])).tolist() == pytest.approx(
        [0.6, 0.3, 0.1]
    )
    floored = checks.prior_from_counts(torch.tensor([3, 0, 1]), floor=0.5)
    assert floored.tolist() == pytest.approx([3 / 4.5, 0.5 / 4.5, 1 / 4.5])
    assert checks.prior_from_counts(COUNTS.double()).dtype == DOUBLE
    half = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float16)
    assert checks.check_prior(half) is half


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: checks.prior_from_counts(torch.tensor([3, 0, 1])), "counts[1] is 0"),
        (lambda: checks.prior_from_counts(torch.tensor([3, -2, 1])), "counts[1] = -2"),
        (lambda: checks.prior_from_counts(torch.tensor([3, -2, 1]), floor=1.0), "counts[1] = -2"),
        (lambda: checks.prior_from_counts(torch.tensor([3, 1.5])), "counts[1] = 1.5"),
        (lambda: checks.prior_from_counts(torch.tensor([3, math.inf])), "counts[1] = inf"),
        (lambda: checks.prior_from_counts(torch.tensor([3, math.nan])), "counts[1] = nan"),
        (lambda: checks.prior_from_counts(torch.tensor([[3, 1]])), "shape (1, 2)"),
        (lambda: checks.prior_from_counts(torch.tensor([3, 1]), floor=0.0), "floor=0.0"),
        (lambda: checks.prior_from_counts(torch.tensor([3, 1]), floor=math.nan), "floor=nan"),
        (lambda: checks.check_prior(COUNTS), "are these counts?"),
        (lambda: checks.check_prior(COUNTS.float()), "sums to 270"),
        (lambda: checks.check_prior(PRIOR, 4), "give one number per class, (4,)"),
        (lambda: checks.check_prior(PRIOR[None]), "shape (1, 5)"),
        (lambda: checks.check_prior(torch.tensor([0.5, 0.0, 0.5])), "prior[1] = 0"),
        (lambda: checks.check_prior(torch.tensor([1.2, -0.2])), "prior[1] = -0.2"),
        (lambda: checks.check_prior(torch.tensor([0.5, math.nan])), "prior[1] = nan"),
        (lambda: checks.check_prior(torch.tensor([0.5, 0.49])), "sums to 0.99"),
        (lambda: losses.LogitAdjustedLoss(COUNTS), "prior holds whole numbers"),
        (lambda: losses.BalancedSoftmaxLoss(COUNTS), "prior holds whole numbers"),
        (lambda: losses.ReweightedLoss(COUNTS.float()), "prior sums to 270"),
        (lambda: losses.LADELoss(torch.tensor([1.0, 0.0])), "prior[1] = 0"),
        (lambda: losses.GLATrainLoss(PRIOR, MODEL[:4]), "model_prior has shape (4,)"),
        (lambda: losses.GLATrainLoss(PRIOR, MODEL * 2), "model_prior sums to 2"),
        (lambda: losses.LDAMLoss(torch.tensor([3, 0, 1])), "counts[1] is 0"),
        (lambda: losses.LDAMLoss(COUNTS, max_margin=-0.1), "max_margin=-0.1"),
        (lambda: losses.LDAMLoss(COUNTS, scale=0.0), "scale=0.0"),
        (lambda: losses.ClassBalancedLoss(torch.tensor([3, 0, 1])), "counts[1] is 0"),
        (lambda: losses.ClassBalancedLoss(COUNTS, beta=1.0), "beta=1.0"),
        (lambda: losses.ClassBalancedLoss(COUNTS, beta=-0.1), "beta=-0.1"),
        (lambda: losses.FocalLoss(-1.0), "gamma=-1.0"),
        (lambda: losses.FocalLoss(2.0, torch.tensor([1.0, -1.0])), "must not be negative"),
        (lambda: checks.check_logits(torch.zeros(3)), "logits has shape (3,)"),
        (lambda: checks.check_logits(torch.zeros(0, 3)), "logits has shape (0, 3)"),
        (lambda: checks.check_logits(torch.tensor([[0, 1], [math.nan, 0]])), "logits[1]"),
        (lambda: checks.check_logits(torch.tensor([[0, math.inf]]), name="z"), "z[0]"),
        (lambda: checks.check_logits(torch.zeros(3, 2), torch.tensor([0, 1])), "3 rows"),
        (lambda: checks.check_logits(torch.zeros(2, 2), torch.zeros(2)), "torch.float32"),
        (lambda: checks.check_logits(torch.zeros(2, 2), torch.tensor([0, 2])), "0 and 1"),
        (lambda: checks.check_logits(torch.zeros(2, 2), torch.tensor([-1, 0])), "0 and 1"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)


KINDS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint16]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOSSES)
def test_labels_of_any_whole_numbers_give_the_same_loss(name, kind):
    z, y = batch()
    loss = LOSSES[name][0]()
    assert torch.equal(loss(z, y.to(kind)), loss(z, y))


@pytest.mark.parametrize("name", LOSSES)
def test_examples_of_label_minus_100_do_not_count(name):
    z, y = batch()
    loss, kept = LOSSES[name][0](), torch.tensor([0, 2, 3, 5, 6])
    some = y.clone()
    some[[1, 4]] = -100
    z[1, 0] = -torch.inf  # a class that is not possible, in an example that does not count
    z.requires_grad_()
    value, expected = loss(z, some), loss(z[kept], y[kept])
    torch.testing.assert_close(value, expected)
    (slope,) = torch.autograd.grad(value, z)
    (own,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(slope, own)
    assert loss(z, torch.full_like(y, -100)).isnan()


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_examples_are_left_out_in_lanes_too(name):
    z, y = batch(rows=6)
    y[3] = -100
    own = [LOSSES[name][0](), LOSSES[name][0]()]
    both = lane_loss(own)(z.view(2, 3, 5), y.view(2, 3).int(), torch.arange(2))
    torch.testing.assert_close(both, torch.stack([own[0](z[:3], y[:3]), own[0](z[3:], y[3:])]))


@pytest.mark.parametrize(
    "change",
    [
        lambda z, y: (z, y[:, None]),
        lambda z, y: (z, F.one_hot(y, 5)),
        lambda z, y: (z, F.one_hot(y, 5).double()),
        lambda z, y: (z, y.double()),
        lambda z, y: (z, y > 2),
        lambda z, y: (z, y[:-1]),
        lambda z, y: (z, y.clone().fill_(5)),
        lambda z, y: (z, y.clone().fill_(-1)),
        lambda z, y: (z[0], y[0]),
        lambda z, y: (z.long(), y),
    ],
)
@pytest.mark.parametrize("name", LOSSES)
def test_labels_and_logits_that_do_not_fit_are_named(name, change):
    z, y = change(*batch())
    with pytest.raises(ValueError, match=r"labels|logits"):
        LOSSES[name][0]()(z, y)


def test_one_row_that_sums_to_one_is_taken_for_logits():
    z = torch.tensor([[0.25, 0.75]])
    prior = torch.tensor([0.9, 0.1])
    adjusted = adjustment.logit_adjust(z, prior)
    torch.testing.assert_close(adjusted, z - (prior + 1e-9).log())
    with pytest.raises(ValueError, match="probabilities"):
        adjustment.logit_adjust(z.expand(2, 2), prior)


def test_classes_that_are_not_possible_leave_lade_finite():
    loss = losses.LADELoss(torch.tensor([0.7, 0.2, 0.1]))
    z, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    plain = loss(z, y)
    z = z.clone()
    z[0, 2] = -torch.inf
    z.requires_grad_()
    value = loss(z, y)
    value.backward()
    assert bool(value.isfinite())
    assert bool(z.grad.isfinite().all())
    assert not torch.equal(value, plain)
