"""DC-Solver: weights, steps, search and polynomials, on mixtures whose denoiser is exact."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from toolkit import DCSolver
from toolkit.core.sample.loop import sample
from toolkit.core.sample.mixtures import Mixture
from toolkit.core.sample.plans import DDIM, DPMpp2M, Plan, UniPC
from toolkit.core.sample.schedule import EDM, Betas, LinearVP, Schedule
from toolkit.core.seeds import generator
from toolkit.generate.dc_solver import (
    compensated_prediction,
    cpr_features,
    cpr_ratios,
    fit_cpr,
    lagrange_weights,
    reference_states,
    refined,
    search_ratios,
    states_at,
    whole_times,
)

LAW = LinearVP()
DATA = Mixture(torch.randn(4, 3, generator=generator(0), dtype=torch.float64), 0.6,
               classes=[0, 1, 0, 1])  # fmt: skip


def schedule(steps=6):
    return Schedule.even(LAW, steps, 1.0, 1e-3)


def noise(count=8, seed=1):
    return torch.randn(count, 3, generator=generator(seed), dtype=torch.float64)


def run(plan, steps=6, x=None, **options):
    return sample(DATA.denoise, schedule(steps), plan, noise() if x is None else x, **options)


@dataclasses.dataclass(frozen=True)
class Table(Plan):
    """A plan of steps that are there already."""

    made: tuple

    def steps(self, schedule):
        return list(self.made)


# the weights


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_weights_are_exact_on_polynomials(degree):
    times = torch.rand(degree + 1, generator=generator(degree), dtype=torch.float64).cumsum(0)
    for ratio, power in itertools.product((-0.5, 0.0, 0.3, 1.0, 1.7), range(degree + 1)):
        weights = lagrange_weights(times.tolist(), ratio)
        at = ratio * times[0] + (1 - ratio) * times[1]
        assert sum(w * t**power for w, t in zip(weights, times, strict=True)) == pytest.approx(
            float(at**power), abs=1e-12
        )
    assert lagrange_weights(times.tolist(), 1.0) == pytest.approx([1.0] + [0.0] * degree)
    assert lagrange_weights(times.tolist(), 0.0) == pytest.approx([0.0, 1.0] + [0.0] * (degree - 1))


def test_the_newest_prediction_moves_along_the_curve_of_the_last_three():
    times = [0.3, 0.5, 0.9]
    curve = lambda t: torch.tensor([[2 * t * t - t + 1, -t]], dtype=torch.float64)  # noqa: E731
    got = compensated_prediction([curve(t) for t in times], times, 1.25)
    torch.testing.assert_close(got, curve(1.25 * 0.3 - 0.25 * 0.5))
    each = torch.tensor([1.0, 0.0], dtype=torch.float64)[:, None]
    both = compensated_prediction([curve(t).expand(2, 2) for t in times], times, each)
    torch.testing.assert_close(both, torch.cat([curve(0.3), curve(0.5)]))


# the solver


@pytest.mark.parametrize(
    ("order", "variant", "corrector", "first"),
    [(1, "bh1", True, True), (2, "bh2", True, False), (3, "bh1", True, True),
     (3, "bh2", False, True)],
)  # fmt: skip
def test_all_ratios_one_is_unipc(order, variant, corrector, first):
    ours = DCSolver(order=order, variant=variant, corrector=corrector, first_corrector=first)
    theirs = UniPC(order, variant, corrector, () if first else (0,))
    asked = run(theirs, labels=[0, 1] * 4, guidance=3.0, untold=2)
    for ratios in ([1.0] * 6, [1.0]):
        got = run(ours.given(ratios), labels=[0, 1] * 4, guidance=3.0, untold=2)
        assert (got.x - asked.x).abs().max() <= 1e-12
        assert got.calls == asked.calls == 6


def test_first_order_without_corrector_and_predictors_are_what_they_are_called():
    ddim = run(DDIM()).x
    assert torch.allclose(run(DCSolver("1", order=1, corrector=False)).x, ddim, atol=1e-12)
    assert torch.equal(run(DCSolver("1", solver="ddim")).x, ddim)
    assert torch.equal(run(DCSolver("1", solver="dpmpp_2m")).x, run(DPMpp2M()).x)
    for solver in ("ddim", "dpmpp_2m"):
        moved = run(DCSolver("1.2", solver=solver))
        assert moved.calls == 6
        assert (moved.x - run(DCSolver("1", solver=solver)).x).abs().max() > 1e-3


def unipc_by_hand(times, start, ratios, order, degree, bh1):
    """The card's equations in plain loops over NumPy numbers, with a compensated history."""
    levels = [LAW.level(t) for t in times]
    ask = lambda x, n: DATA.denoise(torch.from_numpy(x), levels[n]).numpy()  # noqa: E731
    alpha, sigma = [v.alpha for v in levels], [v.std for v in levels]
    lam, count = [v.log_snr for v in levels], len(times) - 1
    x, held = start.numpy(), [(0, ask(start.numpy(), 0))]
    for i in range(1, count + 1):
        if ratios[i - 1] != 1:
            last = held[-degree - 1 :]
            t = [times[n] for n, _ in last]
            at = ratios[i - 1] * t[-1] + (1 - ratios[i - 1]) * t[-2]
            new = sum(
                m * np.prod([(at - t[l]) / (t[k] - t[l]) for l in range(len(t)) if l != k])
                for k, (_, m) in enumerate(last)
            )
            held[-1] = (held[-1][0], new)
        p = min(order, i, count + 1 - i)
        h = lam[i] - lam[i - 1]
        r = [(lam[held[-1 - k][0]] - lam[i - 1]) / h for k in range(1, p)] + [1.0]
        m0 = held[-1][1]
        D = [(held[-1 - k][1] - m0) / r[k - 1] for k in range(1, p)]
        B = -h if bh1 else math.expm1(-h)
        g, b = math.expm1(-h) / -h - 1, []
        for j in range(1, p + 1):
            b.append(math.factorial(j) * g / B)
            g = g / -h - 1 / math.factorial(j + 1)
        R = np.array([[rk ** (j - 1) for rk in r] for j in range(1, p + 1)])
        base = sigma[i] / sigma[i - 1] * x - alpha[i] * math.expm1(-h) * m0
        P = [0.5] if p == 2 else np.linalg.solve(R[:-1, :-1], b[:-1]) if p > 1 else []
        x = base - alpha[i] * B * sum(w * d for w, d in zip(P, D, strict=True))
        if i < count:
            new = ask(x, i)
            C = [0.5] if p == 1 else np.linalg.solve(R, b)
            x = base - alpha[i] * B * sum(w * d for w, d in zip(C, [*D, new - m0], strict=True))
            held.append((i, new))
    return x


@pytest.mark.parametrize(("order", "degree", "bh1"), [(2, 2, False), (3, 2, True), (2, 3, False),
                                                      (3, 1, False)])  # fmt: skip
def test_against_the_equations_in_plain_numpy(order, degree, bh1):
    ratios = [1.0] * degree + [0.7, 1.3, 0.9, 1.6][: 6 - degree]
    ratios += [1.1] * (6 - len(ratios))
    plan = DCSolver(order=order, degree=degree, variant="bh1" if bh1 else "bh2").given(ratios)
    wanted = unipc_by_hand(schedule().times, noise(), ratios, order, degree, bh1)
    assert np.abs(run(plan).x.numpy() - wanted).max() < 1e-11


def test_a_single_gaussian_has_a_closed_form_and_the_error_falls_with_the_order():
    data = Mixture(torch.tensor([[1.0, -2.0]]), 0.5)
    s, x = schedule(20), noise()[:, :2]
    first, last = s.levels[0], s.levels[-1]
    unit = (x - first.alpha * data.means) / math.hypot(0.5 * first.alpha, first.std)
    wanted = last.alpha * data.means + math.hypot(0.5 * last.alpha, last.std) * unit
    errors = {}
    for steps in (40, 80):
        plan = Schedule.even_log_snr(LAW, steps, 1.0, 1e-3)
        made = sample(data.denoise, plan, DCSolver("1"), x)
        errors[steps] = float((made.x - wanted).abs().max())
    assert math.log2(errors[40] / errors[80]) > 2.5
    reference = reference_states(data.denoise, s, x, LAW, parts=100)
    assert (reference[-1] - wanted).abs().max() < 5e-3


def test_order_on_the_mixture():
    errors = []
    x = noise()
    fine = sample(DATA.denoise, Schedule.even_log_snr(LAW, 640, 0.9, 0.05), DCSolver("1"), x).x
    for steps in (40, 80):
        s = Schedule.even_log_snr(LAW, steps, 0.9, 0.05)
        errors.append(float((sample(DATA.denoise, s, DCSolver("1"), x).x - fine).abs().max()))
    assert math.log2(errors[0] / errors[1]) > 1.8


def test_callers_lists_stay_and_text_comes_back_exactly():
    ratios = [1.0, 1.0, 1 / 3, 0.1 + 0.2, 1.25, 1e-3]
    plan = DCSolver().given(ratios)
    before = list(ratios)
    run(plan)
    assert ratios == before
    assert [float(word) for word in plan.ratios.split(",")] == ratios
    assert DCSolver(ratios) == plan == DCSolver(plan.ratios)
    assert DCSolver(1.1) == DCSolver("1.1")
    assert hash(plan) == hash(DCSolver(ratios))


def test_with_only_p_predictions_kept_nothing_is_ever_compensated():
    code = DCSolver(order=2, like="code")
    assert (code.kept, DCSolver(order=2).kept, DCSolver(order=3, like="code").kept) == (2, 3, 3)
    assert torch.equal(run(dataclasses.replace(code, ratios="1.3")).x, run(UniPC(2)).x)
    with pytest.raises(ValueError, match=r'step 2 is 1.3.*2 are held.*like="paper"'):
        run(code.given([1, 1, 1.3, 1, 1, 1]))
    long = code.search(DATA.denoise, schedule(), noise(), states(), iterations=2)
    assert long.ratios.tolist() == [1.0] * 6
    assert bool(long.losses.isnan().all())
    three = DCSolver(order=3, ratios="1.3")
    assert torch.equal(run(three).x, run(dataclasses.replace(three, like="code")).x)


def states(steps=6, x=None, **options):
    x = noise() if x is None else x
    return reference_states(DATA.denoise, schedule(steps), x, LAW, parts=20, **options)


# the search


GUIDED = {"labels": [0, 1] * 4, "guidance": 4.0, "untold": 2}


PLANS = (
    DCSolver(),
    DCSolver(order=3, variant="bh1", degree=1),
    DCSolver(corrector=False),
    DCSolver(solver="dpmpp_2m"),
)


@pytest.mark.parametrize("plan", PLANS)
def test_the_search_comes_nearer_to_the_reference(plan):
    goal = states(**GUIDED)
    found = plan.search(DATA.denoise, schedule(), noise(), goal, iterations=15, keep="best",
                        **GUIDED)  # fmt: skip
    assert found.ratios[: plan.degree].tolist() == [1.0] * plan.degree
    losses = found.losses[plan.degree :, :, 0]
    assert bool((losses.min(1).values <= losses[:, 0]).all())
    # the loss at the last step is that of the whole run
    end = run(plan.given(found.ratios.tolist()), **GUIDED).x
    assert float((end - goal[-1]).square().mean()) == pytest.approx(float(losses[-1].min()))
    one = run(plan.given([1.0]), **GUIDED).x
    assert float((end - goal[-1]).square().mean()) < float((one - goal[-1]).square().mean())


def test_the_search_is_greedy_and_its_gradient_is_right():
    goal, plan = states(**GUIDED), DCSolver()
    found = plan.search(DATA.denoise, schedule(), noise(), goal, iterations=1, **GUIDED)

    def loss(value):
        """The distance after step 2 with this ratio there, by the sampling loop."""
        ratios = [1.0, 1.0, value, 1.0, 1.0, 1.0]
        made = sample(DATA.denoise, schedule(), Table(tuple(plan.table(schedule(), ratios))),
                      noise(), keep=True, gradient=True, **GUIDED)  # fmt: skip
        return (made.path[3] - goal[2]).square().mean()

    at = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(at), at)
    numeric = (loss(1 + 1e-5) - loss(1 - 1e-5)) / 2e-5
    assert float(slope) == pytest.approx(float(numeric), rel=1e-6)
    assert float(found.losses[2, 0, 0]) == pytest.approx(float(loss(1.0)), rel=1e-12)
    # AdamW's first step: the decay, then the rate against the gradient's sign
    wanted = 1 * (1 - 0.1 * 0.01) - 0.1 * float(slope.sign())
    assert float(found.ratios[2]) == pytest.approx(wanted, abs=1e-4)


def test_groups_are_searched_as_if_alone():
    one, two = noise(seed=3), noise(seed=4)
    both = torch.cat([one, two])
    found = DCSolver().search(DATA.denoise, schedule(), both, states(x=both), groups=2,
                              iterations=4)  # fmt: skip
    for row, x in zip(found.ratios, (one, two), strict=True):
        alone = DCSolver().search(DATA.denoise, schedule(), x, states(x=x), iterations=4)
        torch.testing.assert_close(row, alone.ratios)
    assert found.losses.shape == (6, 4, 2)
    assert found.calls == alone.calls == 6 + 4 * 3  # no call in the last step


def test_single_precision_and_a_network_that_trains_are_left_as_they_are():
    net = torch.nn.Linear(3, 3)
    x = noise().float()
    denoiser = lambda x, level: net(x)  # noqa: E731
    goal = reference_states(denoiser, schedule(), x, LAW, parts=3)
    found = DCSolver().search(denoiser, schedule(), x, goal, iterations=2)
    assert found.ratios.dtype == torch.float64
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_a_search_does_not_mind_that_gradients_are_off():
    goal = states()
    wanted = DCSolver().search(DATA.denoise, schedule(), noise(), goal, iterations=3)
    with torch.no_grad():
        found = DCSolver().search(DATA.denoise, schedule(), noise(), goal, iterations=3)
    assert torch.equal(found.ratios, wanted.ratios)
    assert not found.ratios.requires_grad


# references and times


def test_references_lie_on_a_refinement_of_the_schedule():
    fine = refined(schedule(3), LAW, 4)
    assert fine.steps == 12
    assert fine.levels[::4] == schedule(3).levels
    edm = Schedule.edm(4)
    assert refined(edm, EDM(), 3).levels[::3] == edm.levels
    with pytest.raises(ValueError, match="law: at time"):
        refined(schedule(3), LinearVP(0.2, 10.0), 4)
    with pytest.raises(ValueError, match="parts"):
        refined(schedule(3), LAW, 0)


def test_stored_states_as_the_code_picks_them_are_a_little_early():
    times, stored = [1.0, 0.7, 0.334, 0.1, 1e-3], [torch.full((1, 1), float(n)) for n in range(5)]
    coarse = Schedule.of(LAW, [1.0, 0.334, 1e-3])
    assert [float(s) for s in states_at(times, stored, coarse)] == [2, 4]
    assert [float(s) for s in states_at(times, stored, coarse, "code")] == [1, 3]
    with pytest.raises(ValueError, match=r"no stored state for time 0\.5"):
        states_at(times, stored, Schedule.of(LAW, [1.0, 0.5, 1e-3]))
    with pytest.raises(ValueError, match="states: one for each"):
        states_at(times, stored[1:], coarse)
    with pytest.raises(ValueError, match="like"):
        states_at(times, stored, coarse, "both")


@pytest.mark.parametrize("steps", [5, 7, 10, 18])
def test_whole_times_are_numpys(steps):
    wanted = np.linspace(0, 999, steps + 1).round()[::-1].astype(int).tolist()
    assert whole_times(steps) == wanted
    assert Schedule.of(Betas.scaled_linear(), whole_times(steps)).steps == steps
    with pytest.raises(ValueError, match="steps"):
        whole_times(1000)


# polynomials


def test_polynomials_by_hand_and_back():
    phi = torch.randn(4, 3, 3, generator=generator(5), dtype=torch.float64)
    n, c = 10 / 50, 7.5 / 12
    b = [sum((row[0] * n * n + row[1] * n + row[2]) * c**k
             for row, k in zip(phi[j], (2, 1, 0), strict=True)) for j in range(4)]  # fmt: skip
    wanted = [sum(b[j] * (i / 10) ** j for j in range(4)) for i in range(3, 11)]
    got = cpr_ratios(phi, 7.5, 10)
    assert got[:2] == [1.0, 1.0]
    assert got[2:] == pytest.approx([float(w) for w in wanted])
    assert cpr_ratios(phi.flatten(), 7.5, 10) == got
    searched = [(w, m, cpr_ratios(phi, w, m)) for w in (1.0, 3.0, 5.0, 7.5) for m in (6, 8, 12, 20)]
    again = fit_cpr(searched)
    for w, m in ((2.0, 7), (6.0, 15)):
        assert cpr_ratios(again, w, m) == pytest.approx(cpr_ratios(phi, w, m), abs=1e-6)
    assert cpr_features(7.5, 10).shape == (10, 36)
    plan = DCSolver().predicted(phi, 7.5, 10)
    assert plan == DCSolver().given(got)


def test_a_ridge_shrinks_and_few_searches_still_fit():
    searched = [(4.0, 6, [1, 1, 1.2, 0.9, 1.1, 1.4])]
    assert cpr_ratios(fit_cpr(searched), 4.0, 6) == pytest.approx(searched[0][2], abs=1e-6)
    assert fit_cpr(searched, ridge=1.0).norm() < fit_cpr(searched).norm()


# bad input


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: run(DCSolver()), "ratios: none are given; search them"),
        (lambda: run(DCSolver("1,1,1.2")), "ratios: one for each of the 6 steps, got 3"),
        (lambda: run(DCSolver("1.2,1,1,1,1,1")), "step 0 is 1.2, and degree 2 needs 3"),
        (lambda: run(DCSolver("1,0.9,1,1,1,1")), "step 1 is 0.9"),
        (lambda: run(DCSolver("1,1,nan,1,1,1")), "ratio of step 2 is nan"),
        (lambda: run(DCSolver("1", order=3), steps=2), "2 steps are fewer than the order 3"),
        (lambda: run(DCSolver(order=3), steps=2), "2 steps are fewer than the order 3"),
        (lambda: DCSolver("1;2"), "numbers with commas"),
        (lambda: DCSolver(order=4), "order must lie in"),
        (lambda: DCSolver(degree=0), "degree must lie in"),
        (lambda: DCSolver(variant="bh3"), "variant must be one of"),
        (lambda: DCSolver(like="book"), "like must be one of"),
        (lambda: Schedule.of(LAW, [0.1, 0.5]), "times: they must fall"),
        (lambda: lagrange_weights([0.5, 0.3], 1.1), "newest first they rise"),
        (lambda: lagrange_weights([0.5], 1.1), "two or more"),
        (lambda: compensated_prediction([noise()], [0.1, 0.2], 1.0), "one for each of the 2"),
        (lambda: cpr_ratios(torch.zeros(35), 1.0, 5), r"\(degree \+ 1, 3, 3\)"),
        (lambda: cpr_ratios(torch.zeros(36), math.nan, 5), "guidance"),
        (lambda: fit_cpr([]), "no ratio beyond"),
        (lambda: fit_cpr([(1.0, 5, [1, 1, 1])]), "5 for 5 calls, got 3"),
        (lambda: fit_cpr([(1.0, 3, [1, 1, 1])], ridge=-1.0), "ridge"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reference": []}, "steps, reference: 6 each"),
        ({"start": noise(4)}, "reference: states of shape"),
        ({"groups": 3}, "8 samples do not make 3"),
        ({"iterations": 0}, "iterations, keep"),
        ({"keep": "first"}, "iterations, keep"),
        ({"labels": [0, 1]}, "2 labels for 8 samples"),
        ({"guidance": 2.0}, "needs labels"),
    ],
)
def test_bad_searches_are_named(options, words):
    goal = [noise()] * 6
    given = {"start": noise(), "reference": goal} | options
    with pytest.raises(ValueError, match=words):
        search_ratios(DATA.denoise, schedule(), UniPC().steps(schedule()), **given)


def test_a_search_that_breaks_says_where():
    broken = lambda x, level: x * (math.nan if level.time < 0.6 else 1.0)  # noqa: E731
    with pytest.raises(FloatingPointError, match="at step 2 is not finite"):
        DCSolver().search(broken, schedule(), noise(), [noise()] * 6, iterations=1)
