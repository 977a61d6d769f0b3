"""The loop and its solvers: as diffusers computes them, of their order, fed and stopped rightly."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.core.sample import loop
from toolkit.core.sample.loop import combined, generate, sample
from toolkit.core.sample.mixtures import Mixture
from toolkit.core.sample.plans import DDIM, PLANS, DPMpp2M, Heun, Move, Plan, Step, UniPC
from toolkit.core.sample.schedule import EDM, LinearVP, Schedule

HERE = Path(__file__).parent
SPEC = importlib.util.spec_from_file_location("record", HERE / "record_diffusers.py")
record = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(record)
RECORDED = json.loads((HERE / "diffusers.json").read_text())

EVERY = {
    "ddim": (DDIM(), 1),
    "heun": (Heun(), 2),
    "dpmpp_2m": (DPMpp2M(lower_last=False), 2),
    "unip 1": (UniPC(1, corrector=False), 1),
    "unip 2": (UniPC(2, corrector=False), 2),
    "unip 3": (UniPC(3, "bh1", corrector=False), 3),
    "unipc 1": (UniPC(1), 2),
    "unipc 2": (UniPC(2), 3),
    "unipc 3": (UniPC(3), 4),
}


def planned(case: str) -> Plan:
    """Our solver for a recorded case."""
    if case == "ddim":
        return DDIM()
    if case.startswith("heun"):
        return Heun()
    if case.startswith("dpm"):
        return DPMpp2M(lower_last="full last" not in case)
    _, order, variant, *_ = case.replace(",", "").split()
    return UniPC(
        int(order), variant, corrector="predictor" not in case,
        uncorrected=(0,) if "first uncorrected" in case else (),
    )  # fmt: skip


@pytest.mark.parametrize("case", record.CASES)
@pytest.mark.parametrize(("kind", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_states_are_those_of_diffusers(case: str, kind: str, tolerance: float) -> None:
    schedule = record.SCHEDULES[record.CASES[case][1]]()
    start = record.start(schedule, getattr(torch, kind))
    seen = []

    def denoiser(x, level):
        seen.append(x)
        return record.clean(x, level)

    found = sample(denoiser, schedule, planned(case), start, keep=True)
    # where a state is corrected later, theirs is the predicted one, which the network sees
    states = found.path[1:] if case.startswith("heun") else [*seen[1:], found.x]
    ours = torch.stack([x.flatten() for x in states])
    theirs = torch.tensor(RECORDED[case][kind], dtype=ours.dtype)
    assert ours.dtype == getattr(torch, kind)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def mixture() -> Mixture:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    return Mixture(means, 0.6, classes=[0, 0, 1, 1])


def begun(schedule: Schedule, count: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    return noise * schedule.levels[0].std


def levels(steps: int, view: str = "vp") -> Schedule:
    schedule = Schedule.even_log_snr(LinearVP(), steps, 0.6, 0.05)
    return schedule if view == "vp" else schedule.under(EDM())


def eased(steps: int) -> Schedule:
    """Short steps at both ends, where solvers with a memory are of lower order."""
    law, ends = LinearVP(), [math.log(LinearVP().sigma(t)) for t in (0.6, 0.05)]
    shares = [(i / steps) ** 2 * (3 - 2 * i / steps) for i in range(steps + 1)]
    logs = [ends[0] + share * (ends[1] - ends[0]) for share in shares]
    return Schedule(tuple(law.at(math.exp(log)) for log in logs))


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    schedule = eased(1500)
    return sample(mixture().denoise, schedule, UniPC(3), begun(schedule)).x


@pytest.mark.parametrize("name", EVERY)
def test_errors_fall_with_the_order(name: str, exact: torch.Tensor) -> None:
    plan, order = EVERY[name]
    errors = []
    for steps in (64, 128):
        schedule = eased(steps)
        x = sample(mixture().denoise, schedule, plan, begun(schedule)).x
        errors.append(float((x - exact).square().mean().sqrt()))
    slope = math.log2(errors[0] / errors[1])
    assert errors[1] > 1e-12, "too exact to tell an order"
    assert slope == pytest.approx(order, abs=0.45), f"{errors}"


def test_one_gaussian_follows_its_closed_form() -> None:
    mean = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    mix, schedule = Mixture(mean, 0.5), Schedule.even_log_snr(LinearVP(), 300, 1.0, 1e-3)
    first, last = schedule.levels[0], schedule.levels[-1]
    deviation = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def at(level):
        return level.alpha * mean + math.hypot(level.alpha * 0.5, level.std) * deviation

    found = sample(mix.denoise, schedule, UniPC(3), at(first)).x
    torch.testing.assert_close(found, at(last), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_views_give_the_same_sample(name: str) -> None:
    plan, _ = EVERY[name]
    one, two = levels(9), levels(9, "edm")
    x = begun(one)
    ours = sample(mixture().denoise, one, plan, x, keep=True)
    other = sample(mixture().denoise, two, plan, x / one.levels[0].alpha, keep=True)
    for a, b, level in zip(ours.path, other.path, one.levels, strict=True):
        torch.testing.assert_close(a / level.alpha, b, rtol=1e-11, atol=1e-11)
    assert len(ours.path) == 10
    assert torch.equal(ours.path[-1], ours.x)
    assert torch.equal(ours.path[0], x)


@pytest.mark.parametrize("name", EVERY)
def test_calls_are_counted_and_a_point_is_reached(name: str) -> None:
    plan, _ = EVERY[name]
    point = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    asked = []

    def denoiser(x, level):
        asked.append(level)
        return Mixture(point).denoise(x, level)

    schedule = Schedule.edm(7)
    found = sample(denoiser, schedule, plan, begun(schedule))
    assert found.calls == len(asked) == (13 if name == "heun" else 7)
    torch.testing.assert_close(found.x, point.expand(16, 3), rtol=0, atol=1e-12)
    assert all(level.std > 0 for level in asked)


def test_a_constant_prediction_is_followed_exactly_by_all() -> None:
    schedule = levels(5)
    clean = torch.full((16, 3), 0.7, dtype=torch.float64)
    x, first, last = begun(schedule), schedule.levels[0], schedule.levels[-1]
    wanted = last.alpha * clean + last.std * (x - first.alpha * clean) / first.std
    for plan, _ in EVERY.values():
        found = sample(lambda x, level: clean, schedule, plan, x).x
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_plans_of_first_order_agree() -> None:
    schedule = levels(6)
    x = begun(schedule)
    one = sample(mixture().denoise, schedule, DDIM(), x).x
    two = sample(mixture().denoise, schedule, UniPC(1, corrector=False), x).x
    assert torch.equal(one, two)
    for plan in (DPMpp2M(), UniPC(1), Heun()):
        single = Schedule(schedule.levels[:2])
        if not isinstance(plan, Heun):
            torch.testing.assert_close(
                sample(mixture().denoise, single, plan, x).x,
                sample(mixture().denoise, single, DDIM(), x).x,
            )


def test_small_steps_keep_their_digits() -> None:
    """Coefficients of UniPC lose all digits at tiny steps if they are formed by subtraction."""
    schedule = Schedule.even_log_snr(LinearVP(), 40_000, 0.6, 0.05)
    (correct,) = [UniPC(3)._move(schedule.levels[i : i + 4], True) for i in (100,)]
    assert max(map(abs, correct.weights)) < 1e-3
    total = correct.keep * schedule.levels[102].alpha + sum(correct.weights)
    assert total == pytest.approx(schedule.levels[103].alpha, rel=1e-14)


def test_guidance_goes_away_from_what_no_label_says() -> None:
    mix, schedule = mixture(), levels(12)
    labels = torch.arange(16) % 2
    x = begun(schedule)

    def by_hand(x, level):
        told, untold = mix.denoise(x, level, labels), mix.denoise(x, level)
        return untold + 3.0 * (told - untold)

    wanted = sample(by_hand, schedule, UniPC(), x)
    found = sample(
        mix.denoise, schedule, UniPC(), x, labels=labels, guidance=3.0, untold=mix.untold
    )
    torch.testing.assert_close(found.x, wanted.x)
    assert found.calls == 12
    alone = sample(mix.denoise, schedule, UniPC(), x, labels=labels)
    told = sample(lambda x, level: mix.denoise(x, level, labels), schedule, UniPC(), x)
    assert torch.equal(alone.x, told.x)


def test_the_hook_replaces_every_prediction() -> None:
    schedule, seen = Schedule.edm(5), []

    def clean(said, number, level):
        seen.append((number, level))
        return torch.ones_like(said)

    found = sample(mixture().denoise, schedule, Heun(), begun(schedule), clean=clean)
    assert torch.equal(found.x, torch.ones(16, 3, dtype=torch.float64))
    assert [n for n, _ in seen] == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert all(level == schedule.levels[n] for n, level in seen)


def test_the_hook_on_states_comes_before_every_step() -> None:
    schedule, seen = Schedule.edm(5), []

    def state(x, number, level):
        seen.append(number)
        return x + level.sigma

    found = sample(mixture().denoise, schedule, DDIM(), begun(schedule), state=state, keep=True)
    assert seen == [0, 1, 2, 3, 4]
    x = begun(schedule)
    for number, level in enumerate(schedule.levels[:-1]):
        x = x + level.sigma
        move = DDIM().steps(schedule)[number].predict
        x = move.keep * x + move.weights[0] * mixture().denoise(x, level)
        torch.testing.assert_close(found.path[number + 1], x)


@dataclass(frozen=True)
class Blended(Plan):
    """UniPC whose newest prediction is mixed with the one before it."""

    ratio: object = 1.0

    def steps(self, schedule):
        rest = UniPC(2).steps(schedule)
        return [
            Step(s.predict, s.correct, blend=(self.ratio, 1 - self.ratio) if n else None)
            for n, s in enumerate(rest)
        ]


def test_predictions_can_be_blended_and_the_weights_searched_for() -> None:
    schedule = levels(6)
    x = begun(schedule)
    plain = sample(mixture().denoise, schedule, UniPC(2), x).x
    torch.testing.assert_close(sample(mixture().denoise, schedule, Blended(), x).x, plain)
    ratio = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
    wanted = torch.zeros_like(x)

    def loss(r):
        made = sample(mixture().denoise, schedule, Blended(r), x, gradient=True)
        return (made.x - wanted).square().mean()

    (slope,) = torch.autograd.grad(loss(ratio), ratio)
    change = (float(loss(1.1 + 1e-5)) - float(loss(1.1 - 1e-5))) / 2e-5
    assert float(slope) == pytest.approx(change, rel=1e-5)
    assert abs(change) > 1e-4
    assert not sample(mixture().denoise, schedule, Blended(ratio), x).x.requires_grad


def test_a_plan_that_looks_back_too_far_is_named() -> None:
    class Greedy(Plan):
        def steps(self, schedule):
            return [Step(Move(1.0, (0.5, 0.5)))] * schedule.steps

    class Short(Plan):
        def steps(self, schedule):
            return []

    with pytest.raises(ValueError, match="plan: a step needs 2 predictions and there are 1"):
        sample(mixture().denoise, levels(4), Greedy(), begun(levels(4)))
    with pytest.raises(ValueError, match="plan: 0 steps planned"):
        sample(mixture().denoise, levels(4), Short(), begun(levels(4)))


def test_combinations_are_new_tensors() -> None:
    x, term = torch.ones(2, 3), torch.full((2, 3), 2.0)
    made = combined(0.0, x, (1.0,), [term])
    made += 1
    assert torch.equal(term, torch.full((2, 3), 2.0))
    assert torch.equal(combined(2.0, x, (3.0, torch.tensor(1.0)), [term, x]), torch.full((2, 3), 9))
    assert torch.equal(combined(0.0, x, (), []), torch.zeros(2, 3))
    # a denoiser may answer with its own input
    schedule = Schedule.edm(4)
    start = begun(schedule)
    before = start.clone()
    sample(lambda x, level: x, schedule, UniPC(), start)
    assert torch.equal(start, before)


@pytest.mark.parametrize("freedom", [math.inf, 8.0])
def test_a_seed_gives_the_same_sample_in_any_batch(freedom: float) -> None:
    schedule = Schedule.edm(6, 0.01, 20.0)
    labels = [0, 1, 0, 1, 1]

    def made(seeds, labels, batch):
        return generate(
            mixture().denoise, schedule, UniPC(), (3,), seeds, labels=labels, batch=batch,
            freedom=freedom, keep=True,
        )  # fmt: skip

    whole = made(range(5), labels, 64)
    for batch in (1, 2, 5):
        parts = made(range(5), labels, batch)
        torch.testing.assert_close(parts.x, whole.x, rtol=1e-6, atol=1e-6)
        assert parts.calls == 6
        assert len(parts.path) == 7
        assert torch.equal(parts.path[0], whole.path[0])
    alone = made([3], labels[3:4], 64)
    torch.testing.assert_close(alone.x[0], whole.x[3], rtol=1e-6, atol=1e-6)
    torch.manual_seed(5)
    assert torch.equal(made(range(5), labels, 64).x, whole.x)


class Counting(TorchDispatchMode):
    """Counts the calls by which a number reaches Python, which is where a device is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits, self.after = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_local_scalar_dense" in str(function) or "nonzero" in str(function):
            self.waits += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", EVERY)
def test_no_step_waits_for_a_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(loop._Asking):
        """As on a GPU."""

        def __init__(self, *arguments):
            super().__init__(*arguments)
            assert self.at_once
            self.at_once = False

        def finish(self):
            seen.append(mode.waits)
            super().finish()

    schedule, seen = Schedule.edm(6), []
    monkeypatch.setattr(loop, "_Asking", Elsewhere)
    with Counting() as mode:
        float(torch.ones(1))  # it is seen
        sample(lambda x, level: x * 0.1, schedule, EVERY[name][0], begun(schedule))
    assert seen == [1]


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_network_that_is_not_finite_is_named_with_its_step(at_once, bad, monkeypatch) -> None:
    schedule = Schedule.edm(6)
    real = loop._Asking.__init__

    def init(self, *arguments):
        real(self, *arguments)
        self.at_once = at_once

    monkeypatch.setattr(loop._Asking, "__init__", init)
    calls = []

    def denoiser(x, level):
        calls.append(level)
        x = torch.zeros_like(x)
        if level.sigma < schedule.sigmas[3] * 1.01:
            x[1, 2] = bad
        return x

    with pytest.raises(FloatingPointError, match=r"denoiser: its answer at level 3 \(time"):
        sample(denoiser, schedule, DDIM(), begun(schedule))
    assert len(calls) == (4 if at_once else 6)


X = torch.zeros(16, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"denoiser": lambda x, level: x[:, :2]}, r"denoiser: returned shape \(16, 2\)"),
        ({"denoiser": lambda x, level: x[:1]}, "denoiser: returned shape"),
        ({"clean": lambda m, n, level: m[:1]}, "clean: returned shape"),
        ({"state": lambda x, n, level: x.T}, "state: returned shape"),
        ({"guidance": 2.0}, "guidance: 2.0 needs labels"),
        ({"guidance": 2.0, "labels": [0] * 16}, "untold"),
        ({"guidance": math.nan, "labels": [0] * 16}, "guidance: a finite weight"),
        ({"labels": [0] * 3}, "labels: 3 labels for 16"),
        ({"labels": torch.zeros(16)}, "labels hold"),
        ({"start": torch.zeros(0, 3)}, "start"),
        ({"start": torch.zeros(3)}, "start"),
        ({"plan": UniPC(3), "schedule": Schedule.edm(2)}, "fewer than the order 3"),
        ({"start": torch.zeros(1, 1).expand(10**7, 10**7)}, "shape.*GB are free"),
    ],
)
def test_bad_input_is_named(options: dict, words: str) -> None:
    given = {
        "denoiser": lambda x, level, *labels: x, "schedule": Schedule.edm(4), "plan": DDIM(),
        "start": X,
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        sample(**(given | options))


def test_what_is_no_tensor_is_named() -> None:
    schedule = Schedule.edm(4)
    for start in ([1.0], torch.zeros(2, 3, dtype=torch.int64)):
        with pytest.raises(TypeError, match="start"):
            sample(lambda x, level: x, schedule, DDIM(), start)
    with pytest.raises(TypeError, match="denoiser: must return a tensor, got tuple"):
        sample(lambda x, level: (x,), schedule, DDIM(), X)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, "batch"),
        ({"seeds": []}, "seeds"),
        ({"labels": [1]}, "labels: 1 labels for 2 seeds"),
        ({"freedom": 0.0}, "D must be positive"),
        ({"shape": (3, 10**6, 10**6)}, "GB are free"),
        ({"guidance": 2.0}, "needs labels"),
    ],
)
def test_generating_names_what_is_wrong(options: dict, words: str) -> None:
    given = {"shape": (3,), "seeds": [0, 1]} | options
    with pytest.raises(ValueError, match=words):
        generate(lambda x, level, *labels: x, Schedule.edm(4), DDIM(), **given)


@pytest.mark.parametrize(("order", "variant"), [(0, "bh1"), (4, "bh1"), (2, "bh3")])
def test_unipc_names_orders_and_variants(order: int, variant: str) -> None:
    with pytest.raises(ValueError, match=r"order|variant"):
        UniPC(order, variant)


def test_plans_have_names() -> None:
    assert set(PLANS) == {"ddim", "heun", "dpmpp_2m", "unipc"}
    assert all(len(kind().steps(Schedule.edm(4))) == 4 for kind in PLANS.values())


def test_half_precision_networks_keep_the_states_precision() -> None:
    schedule = Schedule.edm(5, 0.01, 20.0)
    found = sample(lambda x, level: x.bfloat16() * 0.5, schedule, UniPC(), X.float() + 1)
    assert found.x.dtype == torch.float32
