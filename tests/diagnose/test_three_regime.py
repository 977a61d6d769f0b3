"""Pruning, paths, similarity, curvature, and the experiment on a tiny grid."""

from __future__ import annotations

import dataclasses
import fractions

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from toolkit.core import nets
from toolkit.core.lanes import Lane, LaneNet, train
from toolkit.core.lanes import nets as lane_nets
from toolkit.core.seeds import generator
from toolkit.diagnose import three_regime as tr
from toolkit.labs.diagnose import grid as grids

DOUBLE = torch.float64


def mlp(draw):
    return nets.mlp([6, 8, 8, 3], generator=draw, dtype=DOUBLE)


def cnn(draw):
    return nets.convnet(1, (4, 6), 3, generator=draw, dtype=DOUBLE)


def data(n=60, image=False, seed=5):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn((n, 1, 4, 4) if image else (n, 6), generator=draw, dtype=DOUBLE)
    return x, torch.randint(0, 3, (n,), generator=draw)


def shuffled(model, seed=3):
    """The same function with the units of the first hidden layer in another order."""
    twin = nets.mlp([6, 8, 8, 3], dtype=DOUBLE)
    twin.load_state_dict(model.state_dict())
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        twin[0].weight.copy_(model[0].weight[order])
        twin[0].bias.copy_(model[0].bias[order])
        twin[2].weight.copy_(model[2].weight[:, order])
    return twin


# pruning


@pytest.mark.parametrize("density", [0.01, 0.05, 0.13, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_counts_are_exact_and_the_largest_stay(density, scope):
    states = lane_nets.initial(mlp, [0, 1, 2])
    names = tr.prunable(mlp(generator(0)))
    assert names == ["0.weight", "2.weight"]
    masks = tr.magnitude_masks(states, density, names, scope)
    sizes = {n: states[n][0].numel() for n in names}
    for m in range(3):
        kept = {n: int(masks[n][m].sum()) for n in names}
        if scope == "uniform":
            assert kept == {n: max(1, s - round((1 - density) * s)) for n, s in sizes.items()}
            groups = [[n] for n in names]
        else:
            total = sum(sizes.values())
            assert sum(kept.values()) == total - round((1 - density) * total)
            groups = [names]
        for group in groups:
            weight = torch.cat([states[n][m].flatten() for n in group]).abs()
            mask = torch.cat([masks[n][m].flatten() for n in group]).bool()
            if 0 < mask.sum() < len(mask):
                assert weight[mask].min() >= weight[~mask].max()


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_masks_are_nested_and_ties_are_broken_evenly(scope):
    model = mlp(generator(0))
    nn.init.constant_(model[0].weight, 0.1)
    before = {n: 0 * t for n, t in lane_nets.stack([model]).items()}
    for density in (0.02, 0.1, 0.3, 0.31, 0.8, 1.0):
        masks = tr.magnitude_masks(model, density, scope=scope)
        for name, mask in masks.items():
            assert bool((mask >= before[name]).all())
        before = masks
    assert all(bool(mask.all()) for mask in before.values())


def test_every_lane_has_its_own_density():
    states = lane_nets.initial(mlp, [0, 0])
    masks = tr.magnitude_masks(states, [0.25, 0.75], ["2.weight"])
    assert masks["2.weight"].flatten(1).sum(1).tolist() == [16, 48]


def test_convolutions_are_pruned_and_the_classifier_is_not():
    names = tr.prunable(cnn(generator(0)))
    assert names == ["blocks.0.0.weight", "blocks.1.0.weight"]


# paths


def test_the_path_of_a_network_to_itself_is_flat():
    x, y = data()
    states = lane_nets.initial(mlp, [0, 1])
    along = tr.path_errors(LaneNet(mlp(generator(0))), states, states, x, y)
    assert along.shape == (2, 11)
    assert torch.equal(tr.lmc(along), torch.zeros(2))
    assert torch.equal(tr.barrier(along), torch.zeros(2))


@pytest.fixture(scope="module")
def trained():
    lane = Lane(steps=400, batch=20, lr=0.1, weight_decay=0.0)
    return train(mlp, [lane], *data())


def test_shuffling_hidden_units_makes_a_barrier_between_equal_functions(trained):
    x, y = data()
    model = mlp(generator(0))
    model.load_state_dict(lane_nets.lane(trained.states, 0))
    twin = shuffled(model)
    torch.testing.assert_close(twin(x), model(x))
    net = LaneNet(model)
    along = tr.path_errors(net, trained.states, lane_nets.stack([twin]), x, y)
    assert along[0, 0] == along[0, -1]
    assert tr.lmc(along)[0] < -0.1
    assert tr.barrier(along)[0] > 0.1


def test_path_errors_equal_one_network_at_a_time_with_fresh_statistics():
    x, y = data(image=True)
    pair = train(cnn, [Lane(order=o, steps=12, batch=20) for o in (0, 1)], x, y)
    a, b = lane_nets.take(pair.states, [0]), lane_nets.take(pair.states, [1])
    along = tr.path_errors(LaneNet(cnn(generator(0))), a, b, x, y, norm_batch=20)
    for k, t in enumerate(torch.linspace(0, 1, 11).tolist()):
        model = cnn(generator(0))
        own = {n: v[0] for n, v in a.items()}
        for name, _ in model.named_parameters():
            own[name] = (1 - t) * a[name][0] + t * b[name][0]
        model.load_state_dict(own)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # PyTorch's cumulative mean: equal batches, so the same weights
        model.train()
        for part in x.split(20):
            model(part)
        model.eval()
        expected = (model(x).argmax(1) != y).double().mean()
        assert abs(float(along[0, k]) - float(expected)) < 1e-6, k


def test_the_line_is_the_bezier_curve_with_the_midpoint_as_bend():
    x, y = data(image=True)
    states = lane_nets.initial(cnn, [0, 1])
    a, b = lane_nets.take(states, [0]), lane_nets.take(states, [1])
    middle = {n: (a[n] + b[n]) / 2 if a[n].is_floating_point() else a[n] for n in a}
    net = LaneNet(cnn(generator(0)))
    straight = tr.path_errors(net, a, b, x, y)
    assert torch.equal(straight, tr.path_errors(net, a, b, x, y, bend=middle))


def test_a_trained_curve_lowers_the_barrier(trained):
    x, y = data()
    model = mlp(generator(0))
    model.load_state_dict(lane_nets.lane(trained.states, 0))
    net, a, b = LaneNet(model), trained.states, lane_nets.stack([shuffled(model)])
    bend = tr.curved(net, a, b, x, y, torch.Generator().manual_seed(0), steps=400)
    straight, bent = (tr.barrier(tr.path_errors(net, a, b, x, y, bend=m)) for m in (None, bend))
    assert bent[0] < straight[0] / 2


def test_signs_of_lmc():
    rise = torch.tensor([0.1, 0.3, 0.6, 0.2, 0.1])
    assert float(tr.lmc(rise)) == pytest.approx(-0.5)
    assert float(tr.lmc(0.7 - rise)) == pytest.approx(0.5)
    assert float(tr.barrier(rise)) == pytest.approx(0.5)
    # a straight slope is no barrier, but the ends take part in LMC: half their difference
    slope = torch.linspace(0.1, 0.3, 5)
    assert float(tr.barrier(slope)) == pytest.approx(0.0, abs=1e-6)
    assert abs(float(tr.lmc(slope))) == pytest.approx(0.1)
    assert float(tr.lmc(rise)) == float(tr.lmc(rise.flip(0)))
    # the largest deviation in either direction counts, not the largest error
    assert float(tr.lmc(torch.tensor([0.5, 0.55, 0.1, 0.5]))) == pytest.approx(0.4)


def test_the_place_of_lmc_is_where_its_value_is_taken():
    draw = torch.Generator().manual_seed(0)
    error = torch.rand(4, 3, 11, generator=draw, dtype=DOUBLE)
    place = tr.lmc_place(error)
    at = (place * 10).round().long()
    torch.testing.assert_close(place, at / 10.0, check_dtype=False)
    there = (error[..., 0] + error[..., -1]) / 2 - error.gather(-1, at[..., None])[..., 0]
    assert torch.equal(tr.lmc(error), there)
    assert float(tr.lmc_place(torch.tensor([0.1, 0.3, 0.6, 0.2, 0.1]))) == 0.5
    # the first of equal deviations; so the start of a slope, and of a flat path
    ties = torch.tensor([[0.5, 0.75, 0.25, 0.5], [0.25] * 4])
    assert tr.lmc_place(ties).tolist() == pytest.approx([1 / 3, 0.0])
    with pytest.raises(ValueError, match="1 point along the path"):
        tr.lmc_place(torch.ones(3, 1))


def test_loss_along_the_path_is_the_loss_at_its_points():
    x, y = data(image=True)
    pair = train(cnn, [Lane(order=o, steps=12, batch=20) for o in (0, 1)], x, y)
    a, b = lane_nets.take(pair.states, [0, 1]), lane_nets.take(pair.states, [1, 1])
    net = LaneNet(cnn(generator(0)))
    along = tr.path_errors(net, a, b, x, y, points=3, norm_batch=20, measure="loss")
    assert along.dtype == DOUBLE
    middle = {n: (a[n] + b[n]) / 2 if n in net.parameters else a[n] for n in a}
    for k, states in enumerate((a, middle, b)):
        fresh = net.restate(states, x, 20)
        own = [F.cross_entropy(z, y) for z in net.predict(fresh, x)]
        torch.testing.assert_close(along[:, k], torch.stack(own))
    torch.testing.assert_close(along[1], along[1, :1].expand(3))  # a network and itself
    with pytest.raises(ValueError, match="measure='accuracy'"):
        tr.path_errors(net, a, b, x, y, measure="accuracy")


def test_loss_on_the_line_between_convex_models_is_no_barrier():
    x, y = data()
    linear = lambda draw: nets.mlp([6, 3], generator=draw, dtype=DOUBLE)  # noqa: E731
    ends = lane_nets.initial(linear, [0, 1, 2])
    a, b = lane_nets.take(ends, [0, 1, 2]), lane_nets.take(ends, [1, 2, 0])
    along = tr.path_errors(LaneNet(linear(generator(0))), a, b, x, y, measure="loss")
    torch.testing.assert_close(tr.barrier(along), torch.zeros(3, dtype=DOUBLE))
    assert (along[:, 5] < along[:, [0, -1]].mean(1)).all()


@pytest.mark.parametrize("kind", [torch.float16, torch.int64])
def test_loss_of_inputs_of_other_kinds_is_summed_in_single_precision(kind):
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(12, 3))
    if kind == torch.float16:
        model = nn.Linear(4, 3).half()
    x = torch.randint(0, 5, (40, 4), generator=torch.Generator().manual_seed(0)).to(kind)
    y = torch.arange(40) % 3
    found = tr.losses(LaneNet(model), lane_nets.stack([model]), x, y)
    assert found.dtype == torch.float32
    wanted = F.cross_entropy(model(x).float(), y)
    torch.testing.assert_close(found[0], wanted, atol=2e-3, rtol=0)


# similarity


def test_cka_properties():
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(2, 500, 6, generator=draw, dtype=DOUBLE)
    b = a + torch.randn(2, 500, 6, generator=draw, dtype=DOUBLE)
    one = torch.ones(2, dtype=DOUBLE)
    torch.testing.assert_close(tr.linear_cka(a, a), one)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=draw, dtype=DOUBLE)).Q
    torch.testing.assert_close(tr.linear_cka(a, 3 * a @ turn + 7), one)
    torch.testing.assert_close(tr.linear_cka(a, b), tr.linear_cka(b, a))
    c, d = (m - m.mean(1, keepdim=True) for m in (a, b))
    gram, other = c @ c.mT, d @ d.mT
    slow = (gram * other).sum((1, 2)) / (
        torch.linalg.norm(gram, dim=(1, 2)) * torch.linalg.norm(other, dim=(1, 2))
    )
    torch.testing.assert_close(tr.linear_cka(a, b), slow, atol=1e-10, rtol=0)
    noise = torch.randn(20_000, 6, generator=draw, dtype=DOUBLE)
    assert float(tr.linear_cka(noise, torch.randn(20_000, 6, generator=draw, dtype=DOUBLE))) < 0.01


def test_cka_of_one_class_is_refused():
    a = torch.softmax(torch.randn(50, 3, dtype=DOUBLE), -1)
    with pytest.raises(ValueError, match="0 / 0"):
        tr.linear_cka(a, torch.ones(50, 3, dtype=DOUBLE) / 3)
    both = torch.stack([a, torch.ones(50, 3, dtype=DOUBLE) / 3])
    assert tr.linear_cka(both, both, undefined="nan").isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match="same inputs"):
        tr.linear_cka(a, a[:40])


def unbiased_cka_written_out(a, b):
    """The U-statistic of HSIC from Gram matrices without their diagonals (Song et al., 2012)."""
    n = len(a)
    one = torch.ones(n, dtype=a.dtype)

    def hsic(p, q):
        k, l = (m @ m.T for m in (p, q))
        k, l = (m - m.diag().diag() for m in (k, l))
        sums = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
        return (torch.trace(k @ l) + sums - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))

    return hsic(a, b) / (hsic(a, a) * hsic(b, b)).sqrt()


@pytest.mark.parametrize(
    ("n", "features"), [(4, (2, 3)), (30, (6, 6)), (30, (4, 50)), (8, (40, 9))]
)
def test_unbiased_cka_equals_gram_matrices_written_out(n, features):
    draw = torch.Generator().manual_seed(n)
    a, b = (1 + torch.randn(3, n, k, generator=draw, dtype=DOUBLE) for k in features)
    b[..., :2] += a[..., :2]
    found = tr.linear_cka(a, b, unbiased=True)
    wanted = [unbiased_cka_written_out(p, q) for p, q in zip(a, b, strict=True)]
    torch.testing.assert_close(found, torch.stack(wanted), atol=1e-10, rtol=0)
    torch.testing.assert_close(found, tr.linear_cka(b, a, unbiased=True))
    assert (found.abs() <= 1 + 1e-12).all()


@pytest.mark.parametrize("features", [6, 60])
def test_unbiased_cka_ignores_turning_scaling_and_shifting(features):
    draw = torch.Generator().manual_seed(1)
    a = torch.randn(40, features, generator=draw, dtype=DOUBLE)
    b = a[:, :5] + torch.randn(40, 5, generator=draw, dtype=DOUBLE)
    turn = torch.linalg.qr(torch.randn(features, features, generator=draw, dtype=DOUBLE)).Q
    moved = 3 * a @ turn + 7
    one = torch.tensor(1.0, dtype=DOUBLE)
    torch.testing.assert_close(tr.linear_cka(a, moved, unbiased=True), one)
    torch.testing.assert_close(
        tr.linear_cka(moved, b, unbiased=True), tr.linear_cka(a, b, unbiased=True)
    )


def test_unbiased_cka_of_independent_noise_is_about_0_where_the_biased_one_is_not():
    draw = torch.Generator().manual_seed(2)
    a, b = (torch.randn(200, 32, 24, generator=draw, dtype=DOUBLE) for _ in range(2))
    assert tr.linear_cka(a, b).min() > 0.3
    found = tr.linear_cka(a, b, unbiased=True)
    assert abs(float(found.mean())) < 4 * float(found.std()) / 200**0.5
    assert float(found.abs().max()) < 0.2
    many = torch.cat([a, b], 1).flatten(0, 1)  # with many examples the two forms agree
    pair = many[:, :12], many[:, 6:18]
    torch.testing.assert_close(
        tr.linear_cka(*pair), tr.linear_cka(*pair, unbiased=True), atol=0.01, rtol=0
    )


def test_unbiased_cka_needs_four_inputs_and_a_spread_over_them():
    a = torch.randn(3, 2, dtype=DOUBLE)
    with pytest.raises(ValueError, match="a and b hold 3 inputs: unbiased=True needs at least 4"):
        tr.linear_cka(a, a, unbiased=True)
    tr.linear_cka(a, a)
    a = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(3))
    b = torch.ones(2, 9, 4)
    b[1, 3, 1] = 4.0  # one input alone differs
    assert tr.linear_cka(a, b, "nan", unbiased=True).isnan().all()
    assert tr.linear_cka(a, b, "nan").isnan().tolist() == [True, False]
    with pytest.raises(ValueError, match="0 / 0"):
        tr.linear_cka(a[1], b[1], unbiased=True)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_cka_of_half_precision_is_that_of_the_same_numbers(kind, unbiased):
    draw = torch.Generator().manual_seed(0)
    a = (100 * torch.randn(512, 64, generator=draw)).to(kind)  # its products overflow float16
    b = (a.float() @ torch.randn(64, 64, generator=draw)).to(kind)
    wanted = tr.linear_cka(a.double(), b.double(), unbiased=unbiased)
    with torch.autocast("cpu", torch.bfloat16):
        inside = tr.linear_cka(a, b, unbiased=unbiased)
    for found in (tr.linear_cka(a, b, unbiased=unbiased), inside):
        assert found.dtype == torch.float32
        assert float(found) == pytest.approx(float(wanted), abs=1e-5)
    mixed = tr.linear_cka(a, b.double(), unbiased=unbiased)
    torch.testing.assert_close(mixed, wanted)
    least = (a / 100).to(torch.float8_e4m3fn)
    tiny = tr.linear_cka(least, b, unbiased=unbiased)
    torch.testing.assert_close(tiny, tr.linear_cka(least.float(), b.float(), unbiased=unbiased))
    small = tr.linear_cka((a.float() / 1e5).to(kind), b, unbiased=unbiased)  # squares underflow
    assert float(small) == pytest.approx(float(wanted), abs=0.01)


# curvature


def test_curvature_equals_the_hessian_written_out():
    x, y = data(30)
    small = lambda draw: nets.mlp([6, 3, 3], generator=draw, dtype=DOUBLE)  # noqa: E731
    states = lane_nets.initial(small, [0, 1])
    net = LaneNet(small(generator(0)))
    tops, traces = [], []
    for m in range(2):
        names = net.parameters
        shapes = [states[n][m].shape for n in names]
        flat = torch.cat([states[n][m].flatten() for n in names])

        def loss(w, shapes=shapes, names=names):
            parts = w.split([s.numel() for s in shapes])
            own = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
            return F.cross_entropy(torch.func.functional_call(net.template, own, (x,)), y)

        values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))
        tops.append(values[values.abs().argmax()])
        traces.append(values.sum())
    draw = torch.Generator().manual_seed(0)
    found = tr.hessian_top(net, states, x, y, draw, iterations=200)
    torch.testing.assert_close(found, torch.stack(tops), rtol=1e-3, atol=0)
    found = tr.hessian_trace(net, states, x, y, draw, draws=600)
    torch.testing.assert_close(found, torch.stack(traces), rtol=0.1, atol=0)


# the experiment


BASE = Lane(steps=30, batch=12, lr=0.1, noise=0.1)


@pytest.mark.parametrize("axis", ["checkpoint", "schedule", "batch", "lr", "rho"])
def test_temperatures_run_from_cold_to_hot(axis):
    x, y = data()
    values = {"lr": (0.3, 0.1), "rho": (0.2, 0.0)}.get(axis, (6, 12))
    states, table = grids.dense_networks(mlp, x, y, axis, values, [0, 1], BASE)
    assert table.temperature.tolist() == [0, 1, 0, 1]
    cold = max(values) if axis in ("checkpoint", "schedule", "batch") else min(values)
    assert set(table[table.temperature == 0]["value"]) == {cold}
    assert lane_nets.lanes_of(states) == 4
    if axis == "checkpoint":  # a checkpoint is the long run stopped early, not a short schedule
        short = dataclasses.replace(BASE, steps=6, horizon=30, seed=1, order=1)
        own = train(mlp, [short], x, y).states
        torch.testing.assert_close(states["2.weight"][3], own["2.weight"][0])


def test_copies_share_start_and_mask_and_differ_in_order_alone():
    x, y = data()
    states, table = grids.dense_networks(mlp, x, y, "checkpoint", (10, 30), [0], BASE)
    copies, frame = grids.retrained_copies(mlp, states, table, x, y, [0.2, 1.0], 2, BASE)
    assert len(frame) == 8
    sparse = frame[frame.density == 0.2].index
    assert bool((copies["0.weight"][sparse] != 0).flatten(1).sum(1).eq(round(0.2 * 48)).all())
    first, second = frame[(frame.density == 0.2) & (frame.temperature == 0)].index
    assert torch.equal(copies["0.weight"][first] != 0, copies["0.weight"][second] != 0)
    assert not torch.equal(copies["0.weight"][first], copies["0.weight"][second])
    again, _ = grids.retrained_copies(mlp, states, table, x, y, [0.2, 1.0], 2, BASE)
    assert torch.equal(copies["0.weight"], again["0.weight"])


def test_the_grid_is_whole_and_its_numbers_are_those_of_the_parts():
    train_set, test_set = data(60), data(40, seed=6)
    cells, paths = grids.phase_grid(
        mlp, train_set, test_set, axis="checkpoint", values=(10, 20, 30), densities=(0.3, 0.6),
        seeds=(0, 1), copies=3, dense=BASE,
    )  # fmt: skip
    assert len(cells) == 2 * 3 * 2
    assert len(paths) == len(cells) * 3 * 11
    assert cells[["test_error", "train_error", "lmc", "barrier", "cka"]].notna().all(axis=None)
    ends = paths[paths.t.isin([0.0, 1.0])].groupby(["seed", "temperature", "density"]).train_error
    own = cells.set_index(["seed", "temperature", "density"]).train_error
    pd.testing.assert_series_equal(ends.mean().sort_index(), own.sort_index(), atol=1e-6)
    assert set(tr.RegimeRule().regimes(cells)) <= {"I", "II-A", "II-B"}
    assert cells.cka.between(0, 1 + 1e-6).all()


def test_a_cell_with_a_diverged_copy_is_marked_and_the_rest_is_measured():
    x, y = data()
    states, table = grids.dense_networks(mlp, x, y, "checkpoint", (10, 30), [0], BASE)
    copies, frame = grids.retrained_copies(mlp, states, table, x, y, [0.2, 0.5], 2, BASE)
    frame.loc[0, "diverged"] = True
    for name in copies:
        copies[name][0] = float("nan")
    cells, _ = grids.measure(mlp, copies, frame, (x, y), (x, y))
    assert cells.diverged.tolist() == [True, False, False, False]
    assert cells.test_error.isna().tolist() == [True, False, False, False]
    assert cells.lmc.isna().tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tr.magnitude_masks(mlp(generator(0)), 0.0), "density=0.0"),
        (lambda: tr.magnitude_masks(mlp(generator(0)), 1.2), "density=1.2"),
        (lambda: tr.magnitude_masks(mlp(generator(0)), 0.5, scope="local"), "scope='local'"),
        (lambda: tr.magnitude_masks(mlp(generator(0)), [0.5, 0.2]), "2 values for 1 lanes"),
        (lambda: tr.magnitude_masks(mlp(generator(0)), 0.5, ["9.weight"]), "no such tensor"),
        (
            lambda: grids.dense_networks(mlp, *data(), "heat", (1, 2), [0], BASE),
            "axis='heat'",
        ),
        (
            lambda: grids.dense_networks(mlp, *data(), "lr", (0.1,), [0], BASE),
            "two or more",
        ),
        (
            lambda: grids.retrained_copies(mlp, {}, pd.DataFrame(), *data(), [0.5], 1, BASE),
            "at least two retrained copies",
        ),
        (
            lambda: tr.path_errors(
                LaneNet(mlp(generator(0))),
                lane_nets.initial(mlp, [0]),
                lane_nets.initial(cnn, [0]),
                *data(),
            ),
            "not of one architecture",
        ),
        (lambda: tr.RegimeRule(epsilon=-1.0), "epsilon"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)


@pytest.mark.parametrize(
    "density",
    [
        np.float32(0.9),
        np.array(0.9),
        torch.tensor(0.9),
        torch.tensor([0.9], requires_grad=True),
        fractions.Fraction(9, 10),
        (0.9,),
    ],
)
def test_a_density_may_be_any_real_number(density):
    net = nn.Sequential(nn.Linear(5, 1), nn.ReLU(), nn.Linear(1, 3))
    # of 5 weights 0.9 keeps all, and the next number above 0.1 in single precision would cut one
    for name, mask in tr.magnitude_masks(net, density).items():
        assert torch.equal(mask, tr.magnitude_masks(net, 0.9)[name])


@pytest.mark.parametrize("density", [True, np.True_, torch.tensor(True), "0.5", None, 1j, {0.5: 1}])
def test_a_density_that_is_no_number_is_named(density):
    net = nn.Sequential(nn.Linear(5, 1), nn.ReLU(), nn.Linear(1, 3))
    with pytest.raises(TypeError, match="density"):
        tr.magnitude_masks(net, density)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("size", [1e-37, 1e-20, 1e15, 1e35])
def test_cka_does_not_depend_on_the_size_of_the_outputs(size, unbiased):
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 20, 6, generator=draw)
    value = tr.linear_cka(a * size, b, unbiased=unbiased)
    torch.testing.assert_close(value, tr.linear_cka(a, b, unbiased=unbiased))


def test_cka_takes_arrays_and_names_what_is_not_finite():
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(2, 20, 6))
    value = tr.linear_cka(a, b)
    assert value == tr.linear_cka(torch.from_numpy(a), torch.from_numpy(b))
    a[3, 2] = np.inf
    with pytest.raises(ValueError, match="a holds NaN or inf"):
        tr.linear_cka(a, b)
    assert tr.linear_cka(a, b, "nan").isnan()
    with pytest.raises(ValueError, match="real numbers"):
        tr.linear_cka(b + 1j, b)
