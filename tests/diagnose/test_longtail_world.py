"""The world of digit pairs and the experiment in it, on tiny networks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.lanes import separate
from toolkit.core import data
from toolkit.core.lanes import Lane
from toolkit.core.lanes import nets as lane_nets
from toolkit.core.lanes.nets import stack, take
from toolkit.core.nets import residual as stream
from toolkit.core.seeds import generator
from toolkit.diagnose import longtail_bias as lt
from toolkit.labs.diagnose import experiment as lab
from toolkit.labs.diagnose.experiment import downstream, order_of, start
from toolkit.labs.diagnose.world import Design, DigitPairs, pooled

DIGITS = 3
K = DIGITS**2
PLAN = lab.Plan(models=2, pre_ratio=5, pre_largest=24, ratio=4, largest=16, valid=4, test=6)
SGD = {"batch": 16, "schedule": "cosine", "weight_decay": 5e-4}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # lanes this small are slower on two threads, and crawl beside another process
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def glyphs():
    found = data.load("digits")
    return torch.as_tensor(found.x_train[:400]), torch.as_tensor(found.y_train[:400])


def world(seed=0, **options):
    return DigitPairs(*glyphs(), generator(seed, "world"), DIGITS, **options)


def body(draw):
    return stream.residual_mlp(128, 12, 2, K, generator=draw)


def transformer(draw):
    return stream.stream_transformer(12, 2, 2, K, patch=4, size=(8, 16), generator=draw)


def design(build=body, **options):
    return Design(build, K, 12, 4, 16.0, Lane(lr=0.1, **SGD), Lane(lr=0.05, **SGD), 2, 2, **options)


def one_by_one(*arguments, workers, optimizer="sgd", **options):
    return SimpleNamespace(states=stack(separate(*arguments, **options)))


def test_pools_share_no_glyph_and_hold_all():
    made = world()
    pools = {name: {int(i) for p in pool for i in p} for name, pool in made.pools.items()}
    _, labels = glyphs()
    assert sum(map(len, pools.values())) == len(set().union(*pools.values()))
    assert sum(map(len, pools.values())) == int((labels < DIGITS).sum())


def test_a_pair_shows_its_two_digits_and_counts_are_exact():
    made, (images, labels) = world(noise=0.0), glyphs()
    counts = torch.arange(K)
    x, y = made.pairs(counts, "test", generator(1))
    assert torch.equal(torch.bincount(y, minlength=K), counts)
    assert x.shape == (int(counts.sum()), 8, 16)
    allowed = {int(i) for p in made.pools["test"] for i in p}
    for image, label in zip(x, y.tolist(), strict=True):
        for half, digit in ((image[:, :8], label // DIGITS), (image[:, 8:], label % DIGITS)):
            same = (images == half).flatten(1).all(1).nonzero().flatten().tolist()
            assert any(labels[i] == digit and i in allowed for i in same)


def test_noise_has_the_size_it_says():
    plain, noisy = world(noise=0.0), world(noise=0.35)
    a, b = (w.pairs(torch.tensor(20), "train", generator(2))[0] for w in (plain, noisy))
    assert float((b - a).std()) == pytest.approx(0.35, rel=0.03)


def test_a_pool_without_a_digit_is_refused():
    images, labels = glyphs()
    with pytest.raises(ValueError, match="lacks a digit"):
        DigitPairs(images[:12], labels[:12], generator(0), DIGITS)


def test_sets_of_unequal_size_are_refused():
    x, y = torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match="equal size"):
        pooled([(x, y), (x[:4], y[:4])])


@pytest.mark.parametrize("build", [body, transformer])
def test_a_student_starts_as_its_foundation_model(build):
    plan = design(build)
    made = world()
    sets = [made.pairs(torch.tensor(6), "train", generator(0, m)) for m in range(2)]
    states = plan.pretrained(sets, [0, 1])
    losses = [lt.LogitAdjustedLoss(torch.full((K,), 1 / K))] * 2
    students = plan.tuned(states, [1, 0], [sets[0]] * 2, losses, [3, 4], rates=[1e-12] * 2)
    x = sets[1][0]
    before, after = plan.logits(take(states, [1, 0]), x), plan.logits(students, x)
    torch.testing.assert_close(before, after, atol=1e-4, rtol=0)
    assert (before[0] - before[1]).abs().max() > 0.1
    assert plan.features(students, x).shape == (2, len(x), 12)


def test_only_adapters_and_head_train():
    plan, made = design(), world()
    sets = [made.pairs(torch.tensor(6), "train", generator(0))]
    states = plan.pretrained(sets, [0])
    losses = [lt.LogitAdjustedLoss(torch.full((K,), 1 / K))]
    student = plan.tuned(states, [0], sets, losses, [3])
    for name, tensor in student.items():
        plain = name.replace(".block.", ".")
        if ".adapter." in name or name.startswith("head."):
            continue
        assert torch.equal(tensor, states[plain]), name
    assert not torch.equal(student["head.weight"], states["head.weight"])


@pytest.mark.parametrize("build", [body, transformer])
def test_the_experiment_by_lanes_equals_separate_runs(build):
    rates = dict.fromkeys(lab.MENU, 0.05)
    if build is body:
        arms, worlds = {}, {0: world(0), 1: world(1)}
    else:  # which arms there are does not depend on the network
        arms, worlds = {"names": (), "ensembles": ("LA/different", "CE/different")}, {0: world(0)}
    ours = lab.experiment(design(build), worlds, PLAN, rates, **arms)
    alone = lab.experiment(design(build, train=one_by_one), worlds, PLAN, rates, **arms)
    for a, b in zip(ours, alone, strict=True):
        assert a.seed == b.seed
        assert a.logits.keys() == b.logits.keys()
        torch.testing.assert_close(a.zero_shot, b.zero_shot, atol=1e-2, rtol=0)
        for arm in a.logits:
            torch.testing.assert_close(a.logits[arm], b.logits[arm], atol=1e-2, rtol=0, msg=arm)


@pytest.fixture(scope="module")
def whole(_one_thread):
    """All arms of one seed."""
    return lab.experiment(design(), {0: world()}, PLAN, dict.fromkeys(lab.MENU, 0.05))[0]


def test_arms_are_what_they_say(whole):
    out = whole
    many = {"LA/different", "LA/same", "LA/again", "CE/different", "CE/after"}
    assert set(out.logits) == many | {"GLA-Train/LA"} | (set(lab.MENU) - {"CE", "LA"})
    rates = dict.fromkeys(lab.MENU, 0.05) | {"GLA": 0.05}
    one = {"names": ("CE", "LA"), "ensembles": ("LA/different",)}
    tuned = lab.experiment(design(), {0: world()}, PLAN, rates, **one)[0]
    torch.testing.assert_close(tuned.logits["LA/GLA"][0], out.logits["LA/different"][0])
    assert tuned.valid_logits["LA/GLA"].shape == (1, 4 * K, K)
    # all rates are one here
    torch.testing.assert_close(out.logits["GLA-Train/LA"], out.logits["GLA-Train"])
    torch.testing.assert_close(out.logits["CE/after"], out.logits["CE/different"])
    assert not torch.allclose(out.logits["LA/different"], out.logits["CE/different"], atol=0.1)
    rates = dict.fromkeys(lab.MENU, 0.05) | {"CE, adjusted after": 0.001}
    both = {"names": (), "ensembles": ("CE/different", "CE/after")}
    other = lab.experiment(design(), {0: world()}, PLAN, rates, **both)[0]
    torch.testing.assert_close(other.logits["CE/different"], out.logits["CE/different"])
    assert not torch.allclose(other.logits["CE/after"], out.logits["CE/after"], atol=0.1)
    for arm in ("LA/different", "LA/same", "LA/again", "CE/different"):
        assert out.logits[arm].shape == (2, 6 * K, K)
    for arm in ("LA/same", "LA/again"):
        assert torch.equal(out.logits[arm][0], out.logits["LA/different"][0])
        assert not torch.allclose(out.logits[arm][1], out.logits["LA/different"][1])
    # students of one model are alike, those of other models are not
    spread = {a: (z[0] - z[1]).abs().mean() for a, z in out.logits.items() if len(z) > 1}
    assert spread["LA/again"] < spread["LA/same"]
    assert torch.equal(out.pre_counts[0].sort().values, out.pre_counts[1].sort().values)
    assert not torch.equal(out.pre_counts[0], out.pre_counts[1])
    assert torch.equal(out.prior, lt.prior_from_counts(out.counts))


def test_some_arms_can_be_run_alone(whole):
    rates = {"LA": 0.05}  # and no other rate is asked for
    some = ("LA/different", "LA/same")
    part = lab.experiment(design(), {0: world()}, PLAN, rates, (), some)[0]
    assert set(part.logits) == set(some)
    assert set(part.valid_logits) == {"LA/different"}
    for arm in some:
        torch.testing.assert_close(part.logits[arm], whole.logits[arm], atol=1e-3, rtol=0)
    for wrong in (("LA/same",), ("LA/different", "other")):
        with pytest.raises(ValueError, match="keep LA/different"):
            lab.experiment(design(), {0: world()}, PLAN, rates, (), wrong)


def test_models_of_one_prior_share_their_order():
    states, at, outcomes = start(design(), {0: world()}, PLAN)
    assert at[0, "same", 0] == at[0, "different", 0]
    assert len(next(iter(states.values()))) == 3
    expected = lt.longtail_counts(K, 24, 5, order=order_of(K, 0, 0))
    assert torch.equal(outcomes[0].pre_counts[0], expected)


def test_rates_are_tried_for_every_loss_on_validation_data():
    plan = replace(design(), pretrain_epochs=8, tune_epochs=6)
    records = lab.rates_tried(plan, {5: world(5)}, PLAN, (0.001, 0.1), ("CE", "LA", "focal"))
    seen = {(r["arm"], r["rate"]) for r in records}
    arms = ("CE", "CE, adjusted after", "LA", "GLA", "focal")
    assert seen == {(arm, rate) for arm in arms for rate in (0.001, 0.1)}
    assert all(0 <= r["accuracy"] <= 1 and r["seed"] == 5 for r in records)
    assert len({r["accuracy"] for r in records}) > 2
    # the test set has no say
    again = lab.rates_tried(
        plan, {5: world(5)}, replace(PLAN, test=2), (0.001, 0.1), ("CE", "LA", "focal")
    )
    assert again == records
    fewer = lab.rates_tried(plan, {5: world(5)}, replace(PLAN, valid=9), (0.1,), ("CE",))
    assert fewer[0]["accuracy"] != records[1]["accuracy"]


def test_every_set_is_drawn_from_its_own_glyphs():
    made = world(noise=0.0)
    _, _, outcomes = start(design(), {0: made}, PLAN)
    halves = made.glyphs.flatten(1)

    def drawn(x):
        """Numbers of the glyphs in pairs (n, h, 2 w) without noise."""
        parts = torch.cat(x.split(x.shape[-1] // 2, -1)).flatten(1)
        distance = torch.cdist(parts, halves)
        assert distance.amin(1).max() < 1e-5
        return set(distance.argmin(1).tolist())

    sets = {
        "valid": outcomes[0].valid[0],
        "test": outcomes[0].test[0],
        "train": downstream(made, outcomes[0])[0],
    }
    for name, x in sets.items():
        own = {int(i) for pool in made.pools[name] for i in pool}
        assert drawn(x) <= own, name


def test_priors_are_estimated_on_validation_data_and_models_draw_their_own():
    net = design()
    made = world()
    states, at, outcomes = start(net, {0: made}, PLAN)
    out = outcomes[0]
    z, y = net.logits(out.foundations, out.valid[0]), out.valid[1]
    for m, found in enumerate(out.estimates):
        torch.testing.assert_close(lt.estimate_prior(z[m], y).prior, found.prior)
    # two models of one prior are pre-trained on different draws and from different weights
    pair = lane_nets.take(states, [at[0, "different", 0], at[0, "same", 1]])
    assert not torch.allclose(pair["stem.weight"][0], pair["stem.weight"][1])
    kinds = ("different", 0), ("same", 1)
    draws = [made.pairs(out.pre_counts[0], "train", generator(0, "pre", *k))[0] for k in kinds]
    assert not torch.equal(*draws)
    trained = [
        net.pretrained([(draw, made_labels(out))], [s])
        for draw, s in zip(draws, (0, 101), strict=True)
    ]
    for n, alone in enumerate(trained):
        torch.testing.assert_close(
            alone["stem.weight"][0], pair["stem.weight"][n], atol=1e-3, rtol=0
        )


def made_labels(outcome):
    return torch.arange(K).repeat_interleave(outcome.pre_counts[0])


def test_the_grid_has_every_downstream_set():
    made = world()
    outcome, found = lab.grid(design(), made, 0, PLAN, ratios=(2, 4), correlations=(-1.0, 0.0, 1.0))
    assert set(found) == {(r, c) for r in (2, 4) for c in (-1.0, 0.0, 1.0)}
    for (ratio, correlation), (counts, z) in found.items():
        assert z.shape == (2, 6 * K, K)
        assert counts.max() == 16
        assert counts.min() == 16 // ratio
        if abs(correlation) == 1:
            near = lt.rank_correlation(counts.double(), outcome.pre_counts[0].double())
            assert near == pytest.approx(correlation, abs=0.05)


def test_every_loss_of_the_menu_is_its_own():
    counts = torch.tensor([40.0, 10.0, 4.0])
    z, y = torch.randn(8, 3, generator=generator(0)), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    values = {
        n: float(lab.loss_of(n, counts, torch.full((3,), 1 / 3), 16.0)(z, y)) for n in lab.MENU
    }
    even = values.pop("GLA-Train")  # an even model prior shifts all logits alike
    assert even == pytest.approx(values["LA"], abs=1e-5)
    assert len({round(v, 5) for v in values.values()}) == len(values)
    plain = torch.nn.functional.cross_entropy(z, y)
    assert values["CE"] == pytest.approx(float(plain), abs=1e-6)


def test_the_scale_of_the_head_is_that_of_the_margin():
    counts = torch.tensor([40.0, 10.0])
    assert lab.loss_of("LDAM", counts, torch.full((2,), 0.5), 7.0).scale == 7.0
    assert replace(design(), scale=3.0).foundation(generator(0)).head.scale == 3.0
