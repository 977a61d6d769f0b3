"""The prior of a classifier: estimated, checked against closed forms, and taken out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from toolkit.diagnose.longtail_bias import adjustment, checks
from toolkit.diagnose.longtail_bias import prior as prior_

DOUBLE = torch.float64
CENTRES = torch.tensor([[0.0, 0.0], [2.5, 0.0], [0.0, 2.5], [1.5, 1.5]], dtype=DOUBLE)
PI = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=DOUBLE)


def gaussians(per_class, seed=0):
    """log P(x|y) (N, 4) of unit Gaussians on balanced data, up to a constant, and labels."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(4).repeat_interleave(per_class)
    x = CENTRES[y] + torch.randn(len(y), 2, generator=draw, dtype=DOUBLE)
    return -0.5 * torch.cdist(x, CENTRES).square(), y


def table():
    """Six values of x with exact shares: log P(x|y) (60, 3) and labels, 20 of each class."""
    cells = torch.tensor([[8, 5, 3, 2, 1, 1], [1, 4, 7, 4, 2, 2], [1, 2, 2, 4, 5, 6]])
    y, x = (cells > 0).nonzero().T
    repeats = cells[y, x]
    x, y = x.repeat_interleave(repeats), y.repeat_interleave(repeats)
    return (cells.double() / 20).log().T[x], y


def softmax(z):
    z = np.exp(z - z.max(1, keepdims=True))
    return z / z.sum(1, keepdims=True)


def test_a_known_prior_is_recovered_from_closed_form_gaussians():
    logits, y = gaussians(10_000)
    found = prior_.estimate_prior(logits + PI.log(), y)
    torch.testing.assert_close(found.prior, PI, atol=0, rtol=0.05)
    assert float(found.prior.sum()) == pytest.approx(1.0)
    torch.testing.assert_close(found.prior.log(), found.log_prior)
    assert found.residual <= 1e-7
    assert found.temperature == 1.0


def test_a_discrete_world_gives_the_prior_exactly():
    logits, y = table()
    pi = torch.tensor([0.7, 0.2, 0.1], dtype=DOUBLE)
    found = prior_.estimate_prior(logits + pi.log(), y)
    torch.testing.assert_close(found.prior, pi, atol=1e-6, rtol=0)
    # calibrated on balanced data: nothing to take out
    found = prior_.estimate_prior(logits, y)
    torch.testing.assert_close(found.prior, torch.full_like(pi, 1 / 3), atol=1e-6, rtol=0)


def random_logits(rows=400, classes=5, seed=3):
    draw = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(rows, classes, generator=draw, dtype=DOUBLE)
    return z, torch.arange(classes).repeat_interleave(rows // classes)


@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
def test_at_the_optimum_mean_softmax_is_the_share_of_each_class(scale):
    z, y = random_logits()
    z = scale * z
    y[:20] = 3  # not balanced
    found = prior_.estimate_prior(z, y)
    mean = softmax(z.numpy() - np.log(found.prior.numpy())).mean(0)
    share = np.bincount(y.numpy()) / len(y)
    np.testing.assert_allclose(mean, share, atol=1e-5)
    assert found.residual == pytest.approx(np.abs(mean - share).max(), abs=1e-8)
    free = z.numpy() - np.log(found.prior.numpy())
    loss = -np.log(softmax(free)[np.arange(len(y)), y.numpy()]).mean()
    assert found.loss == pytest.approx(loss, rel=1e-8)


def test_a_constant_per_example_changes_nothing_and_one_per_class_moves_the_prior():
    z, y = random_logits()
    found = prior_.estimate_prior(z, y)
    moved = prior_.estimate_prior(z + 50 * torch.randn(len(z), 1, dtype=DOUBLE), y)
    torch.testing.assert_close(moved.log_prior, found.log_prior, atol=1e-5, rtol=0)
    bias = torch.tensor([0.0, 3.0, -2.0, 1.0, 0.5], dtype=DOUBLE)
    shifted = prior_.estimate_prior(z + bias, y)
    torch.testing.assert_close(
        shifted.log_prior, (found.log_prior + bias).log_softmax(0), atol=1e-5, rtol=0
    )


def test_a_constrained_solver_finds_the_same_optimum():
    z, y = random_logits(250)
    own, labels = z.numpy(), y.numpy()

    def value(q):
        free = own - np.log(q)
        top = free.max(1)
        total = np.log(np.exp(free - top[:, None]).sum(1)) + top
        return (total - free[np.arange(len(y)), labels]).mean()

    solved = minimize(
        value,
        np.full(5, 0.2),
        method="SLSQP",
        bounds=[(1e-6, 1)] * 5,
        constraints={"type": "eq", "fun": lambda q: q.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert solved.success
    found = prior_.estimate_prior(z, y)
    np.testing.assert_allclose(found.prior.numpy(), solved.x, atol=1e-4)
    assert found.loss <= solved.fun + 1e-10


def test_temperature_turns_the_prior_into_its_root():
    logits, y = table()
    q = torch.tensor([0.7, 0.2, 0.1], dtype=DOUBLE)
    hot = 2.5 * logits + q.log()
    found = prior_.estimate_prior(hot, y, temperature=2.5)
    torch.testing.assert_close(found.prior, q ** (1 / 2.5) / (q ** (1 / 2.5)).sum(),
                               atol=1e-6, rtol=0)  # fmt: skip
    divided = prior_.estimate_prior(hot / 2.5, y)
    torch.testing.assert_close(found.prior, divided.prior, atol=1e-7, rtol=0)
    assert (found.temperature, divided.temperature) == (2.5, 1.0)


def test_reweighting_undoes_unbalanced_labels():
    logits, y = table()
    pi = torch.tensor([0.2, 0.5, 0.3], dtype=DOUBLE)
    z = logits + pi.log()
    repeats = torch.tensor([1, 3, 10])[y]
    many, labels = z.repeat_interleave(repeats, 0), y.repeat_interleave(repeats)
    found = prior_.estimate_prior(many, labels, reweight=True)
    torch.testing.assert_close(found.prior, pi, atol=1e-6, rtol=0)
    # without it the shares of the labels are counted as part of the prior
    absorbed = pi / torch.tensor([1.0, 3.0, 10.0], dtype=DOUBLE)
    found = prior_.estimate_prior(many, labels)
    torch.testing.assert_close(found.prior, absorbed / absorbed.sum(), atol=1e-6, rtol=0)


def test_single_precision_logits_give_a_single_precision_prior():
    z, y = random_logits()
    single = prior_.estimate_prior(z.float(), y)
    assert single.prior.dtype == torch.float32
    torch.testing.assert_close(single.prior.double(), prior_.estimate_prior(z, y).prior,
                               atol=1e-5, rtol=0)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_keep_a_prior_that_can_be_taken_out(dtype):
    z, y = gaussians(400)
    z = z.to(dtype)
    found = prior_.estimate_prior(z, y)
    assert found.prior.dtype == torch.float32
    wanted = prior_.estimate_prior(z.float(), y)
    torch.testing.assert_close(found.prior, wanted.prior, atol=1e-4, rtol=0)
    adjusted = adjustment.logit_adjust(z, found.prior)
    assert adjusted.dtype == dtype
    torch.testing.assert_close(adjusted.float(), z.float() - found.log_prior, atol=0.05, rtol=0.02)
    # a class whose share is 0 in half precision must not win every answer
    rare = torch.tensor([1 - 3e-8, 1e-8, 1e-8, 1e-8])
    assert adjustment.logit_adjust(torch.zeros(2, 4, dtype=dtype), rare).isfinite().all()


def test_arrays_are_taken_like_tensors():
    z, y = gaussians(50)
    found = prior_.estimate_prior(z.numpy(), y.numpy())
    assert torch.equal(found.prior, prior_.estimate_prior(z, y).prior)
    assert torch.equal(adjustment.logit_adjust(z.numpy(), PI), adjustment.logit_adjust(z, PI) + 0)
    assert prior_.calibrate_temperature(z.numpy(), y.numpy()) > 0
    assert adjustment.adjustment_left(z.numpy(), y.numpy(), PI) == adjustment.adjustment_left(
        z, y, PI
    )


def test_too_few_steps_show_in_the_residual():
    z, y = random_logits()
    found = prior_.estimate_prior(8 * z, y, max_steps=1)
    assert found.steps == 1
    assert found.residual > 1e-5


# temperature


def test_the_calibrated_temperature_makes_confidence_accuracy():
    logits, y = gaussians(500)
    for scale in (0.2, 1.0, 7.0):
        z = scale * logits
        found = prior_.calibrate_temperature(z, y)
        confidence = softmax(z.numpy() / found).max(1).mean()
        assert confidence == pytest.approx(float((z.argmax(1) == y).double().mean()), abs=1e-8)
        assert found == pytest.approx(scale * prior_.calibrate_temperature(logits, y), rel=1e-6)
    assert prior_.calibrate_temperature(logits, y) == pytest.approx(1.0, abs=0.15)
    estimate = prior_.estimate_prior(3 * logits, y, temperature="calibrate")
    assert estimate.temperature == prior_.calibrate_temperature(3 * logits, y)


# taking it out


def test_adjusting_afterwards_gives_the_balanced_bayes_classifier():
    likelihood, y = gaussians(4000)
    biased = likelihood + PI.log()
    adjusted = adjustment.logit_adjust(biased, PI)
    torch.testing.assert_close(adjusted.softmax(1), likelihood.softmax(1), atol=1e-7, rtol=0)
    assert torch.equal(adjusted.argmax(1), likelihood.argmax(1))
    balanced, plain = ((z.argmax(1) == y).double().mean() for z in (adjusted, biased))
    assert balanced > plain + 0.03
    half = adjustment.logit_adjust(biased, PI, tau=0.5)
    torch.testing.assert_close(half, likelihood + 0.5 * PI.log(), atol=1e-6, rtol=0)


def test_adjusting_twice_is_refused_and_the_input_is_not_marked():
    z, _ = gaussians(5)
    adjusted = adjustment.logit_adjust(z, PI)
    with pytest.raises(ValueError, match="adjusted for a prior already"):
        adjustment.logit_adjust(adjusted, PI)
    adjustment.logit_adjust(z, PI)
    adjustment.logit_adjust(adjusted + 0, PI)  # marks do not survive arithmetic


def test_what_is_left_of_the_prior_is_one_then_none_then_minus_one():
    likelihood, y = gaussians(8000)
    z = likelihood + PI.log()
    for wanted in (1, 0, -1):
        assert adjustment.adjustment_left(z, y, PI) == pytest.approx(wanted, abs=0.06)
        z = z - PI.log()
    half = likelihood + 0.5 * PI.log()
    assert adjustment.adjustment_left(half, y, PI) == pytest.approx(0.5, abs=0.06)


Z, Y = random_logits(50)
NAN, NEVER = Z.clone(), Z.clone()
NAN[7, 2] = math.nan
NEVER[7, 2] = -math.inf
RIGHT = 9 * torch.eye(3, dtype=DOUBLE).repeat(4, 1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: prior_.estimate_prior(Z, Y.clamp(max=3)), "no example of class 4"),
        (lambda: prior_.estimate_prior(Z[:20], Y[:20]), "no example of class 2 (3 such"),
        (lambda: prior_.estimate_prior(NAN, Y), "logits[7] holds NaN"),
        (lambda: prior_.estimate_prior(NEVER, Y), "-inf"),
        (lambda: prior_.estimate_prior(Z.softmax(1), Y), "logits are probabilities"),
        (lambda: prior_.estimate_prior(Z.long(), Y), "whole numbers"),
        (lambda: adjustment.logit_adjust(Z.softmax(1), PI), "prior has shape (4,)"),
        (
            lambda: adjustment.logit_adjust(Z.softmax(1), torch.full((5,), 0.2)),
            "logits are probabilities",
        ),
        (lambda: prior_.estimate_prior(Z, Y[:-1]), "50 rows"),
        (lambda: prior_.estimate_prior(Z, Y + 1), "between 0 and 4"),
        (lambda: prior_.estimate_prior(Z, Y, temperature=0.0), "temperature=0.0"),
        (lambda: prior_.estimate_prior(Z, Y, temperature=math.nan), "temperature=nan"),
        (lambda: prior_.estimate_prior(Z, Y, temperature="auto"), "temperature='auto'"),
        (lambda: prior_.calibrate_temperature(RIGHT, RIGHT.argmax(1)), "accuracy 1 is no mean"),
        (lambda: prior_.calibrate_temperature(RIGHT, RIGHT.argmin(1)), "accuracy 0 is no mean"),
        (lambda: prior_.calibrate_temperature(NAN, Y), "logits[7] holds NaN"),
        (lambda: adjustment.logit_adjust(Z, PI), "prior has shape (4,)"),
        (
            lambda: adjustment.logit_adjust(NAN[None], torch.full((5,), 0.2)),
            "logits[0, 7] holds NaN",
        ),
        (lambda: adjustment.logit_adjust(Z, torch.ones(5)), "prior sums to 5"),
        (lambda: adjustment.logit_adjust(Z, torch.arange(5)), "whole numbers"),
        (lambda: adjustment.logit_adjust(Z, torch.tensor([0.5, 0.5, 0, 0, 0])), "prior[2] = 0"),
        (lambda: adjustment.adjustment_left(Z, Y, torch.full((5,), 0.2)), "prior is uniform"),
        (lambda: adjustment.adjustment_left(Z, Y, PI), "prior has shape (4,)"),
        (
            lambda: adjustment.adjustment_left(
                Z[:20], Y[:20], checks.prior_from_counts(torch.arange(1, 6))
            ),
            "no example of class 2",
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan"), "warm"])
def test_a_temperature_that_is_none_is_refused(temperature):
    z, y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    with pytest.raises(ValueError, match="temperature="):
        prior_.estimate_prior(z, y, temperature=temperature)
