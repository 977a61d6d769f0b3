"""Lanes against runs of their own."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import math
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.lanes import separate
from toolkit.core import lanes, nets
from toolkit.core.lanes import Lane, chains, steps, train
from toolkit.core.lanes import losses as losses_of_lanes
from toolkit.core.lanes import nets as lane_nets
from toolkit.core.lanes.fingerprint import fingerprint
from toolkit.core.seeds import generator
from toolkit.diagnose.longtail_bias import losses

DOUBLE = torch.float64


class Residual(nn.Module):
    """Convolution, batch-norm and a residual sum; a strided shortcut; a linear head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 6, 1, stride=2, bias=False)
        self.last = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + torch.relu(self.inner(x))
        return self.head(torch.relu(self.last(self.down(x))).mean((-2, -1)))


def make_mlp(draw):
    return nets.mlp([6, 8, 8, 3], generator=draw, dtype=DOUBLE)


def make_bn_mlp(draw):
    # no bias before batch-norm: its gradient is 0 up to rounding, which AdamW would blow up
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    return nets.initialise(net, draw).double()


def make_residual(draw):
    return nets.initialise(Residual(), draw).double()


def make_convnet(draw):
    return nets.convnet(1, (4, 6), 3, generator=draw, dtype=DOUBLE)


def data(n=40, image=False):
    draw = torch.Generator().manual_seed(5)
    x = torch.randn((n, 1, 4, 4) if image else (n, 6), generator=draw, dtype=DOUBLE)
    return x, torch.randint(0, 3, (n,), generator=draw)


def alone(make, lane, x, y, optimizer="sgd", masks=None, state=None, loss=F.cross_entropy):
    """One network trained by PyTorch's own optimiser, as a reader would write it."""
    model = make(generator(lane.seed, "weights"))
    if state is not None:
        model.load_state_dict(state)
    masks = masks or {}
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def mask_all(gradients=False):
        for name, mask in masks.items():
            (named[name].grad if gradients else named[name]).mul_(mask)

    mask_all()
    if optimizer == "sgd":
        descent = torch.optim.SGD(
            named.values(), lr=1.0, momentum=lane.momentum, weight_decay=lane.weight_decay
        )
    else:
        descent = torch.optim.AdamW(
            named.values(), lr=1.0, betas=(lane.momentum, 0.999), weight_decay=lane.weight_decay
        )
    labels = lanes.labels_with_noise(y, 3, lane.noise, lane.noise_seed)
    per_epoch = len(x) // lane.batch
    for step in range(lane.steps):
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(x), generator=generator(lane.order, "order", epoch))
        pick = order[place * lane.batch : (place + 1) * lane.batch]
        descent.param_groups[0]["lr"] = lane.rate(step)
        model.zero_grad()
        loss(model(x[pick]), labels[pick]).backward()
        mask_all(gradients=True)
        if lane.rho:
            kept = {n: b.clone() for n, b in model.named_buffers()}
            before = {n: p.detach().clone() for n, p in named.items()}
            norm = torch.sqrt(sum(p.grad.square().sum() for p in named.values()))
            with torch.no_grad():
                for p in named.values():
                    p.add_(lane.rho * p.grad / (norm + 1e-12))
            model.zero_grad()
            loss(model(x[pick]), labels[pick]).backward()
            mask_all(gradients=True)
            with torch.no_grad():
                for n, p in named.items():
                    p.copy_(before[n])
                for n, b in model.named_buffers():
                    b.copy_(kept[n])
        descent.step()
    return model.state_dict()


EVERYTHING = [
    Lane(seed=0, order=0, steps=9, batch=8, lr=0.1),
    Lane(seed=1, order=3, steps=23, batch=8, lr=0.05, schedule="cosine", momentum=0.5, horizon=30),
    Lane(seed=2, order=3, steps=17, batch=20, weight_decay=0.02, noise=0.25, noise_seed=4),
    Lane(seed=3, order=5, steps=12, batch=8, rho=0.3, drops=(0.3,), factor=0.5),
    Lane(seed=4, order=5, steps=12, batch=8, rho=0.05, noise=0.1, schedule="linear"),
    Lane(seed=4, order=6, steps=23, batch=8, lr=0.2, momentum=0.0, schedule="constant"),
    Lane(seed=6, order=7, steps=9, batch=8, width=0.5),
]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("make", [make_mlp, make_bn_mlp, make_residual, make_convnet])
def test_lanes_equal_runs_of_their_own_with_all_options(make, optimizer):
    x, y = data(image=make in (make_residual, make_convnet))
    lr = 1.0 if optimizer == "sgd" else 0.05
    several = [Lane(**{**vars(lane), "lr": lane.lr * lr}) for lane in EVERYTHING]
    start = lane_nets.initial(make, [lane.seed for lane in several])
    weight = next(name for name, t in start.items() if t.dim() > 2)
    draw = torch.Generator().manual_seed(9)
    masks = {weight: (torch.rand(start[weight].shape, generator=draw) < 0.6).to(DOUBLE)}
    found = train(make, several, x, y, masks=masks, optimizer=optimizer, chunk=3)
    narrow = lane_nets.width_masks(make(generator(0)), [lane.width for lane in several])
    both = lane_nets.join_masks(masks, narrow)
    for m, lane in enumerate(several):
        own = alone(make, lane, x, y, optimizer, {name: mask[m] for name, mask in both.items()})
        for name, tensor in own.items():
            torch.testing.assert_close(found.states[name][m], tensor, atol=1e-10, rtol=1e-10)


def rows_for(count, n, size=40):
    """Examples (count, n) of each lane: drawn with replacement, so some come twice."""
    return torch.randint(0, size, (count, n), generator=torch.Generator().manual_seed(count))


def assert_lanes_equal(found, several, own, tolerance=1e-10):
    for m, lane in enumerate(several):
        for name, tensor in own(m, lane).items():
            torch.testing.assert_close(found.states[name][m], tensor, atol=tolerance,
                                       rtol=tolerance)  # fmt: skip


@pytest.mark.parametrize(
    ("make", "optimizer"), [(make_bn_mlp, "sgd"), (make_bn_mlp, "adamw"), (make_convnet, "sgd")]
)
def test_lanes_with_rows_equal_runs_on_those_examples(make, optimizer):
    x, y = data(image=make is make_convnet)
    # label noise belongs to the training set, not to a lane's part of it: tested below
    several = [Lane(**{**vars(lane), "noise": 0.0}) for lane in EVERYTHING if lane.width == 1]
    several = [Lane(**{**vars(lane), "lr": 0.05}) for lane in several]
    rows = rows_for(len(several), 27)
    found = train(make, several, x, y, rows=rows, optimizer=optimizer, chunk=3)
    assert_lanes_equal(
        found, several, lambda m, lane: alone(make, lane, x[rows[m]], y[rows[m]], optimizer)
    )


def test_rows_choose_among_labels_that_carry_the_noise():
    x, y = data()
    several = [Lane(seed=s, order=s, steps=7 + s, batch=8, noise=0.3, noise_seed=s)
               for s in range(3)]  # fmt: skip
    rows = rows_for(3, 20)
    found = train(make_mlp, several, x, y, rows=rows)

    def own(m, lane):
        noisy = lanes.labels_with_noise(y, 3, 0.3, lane.noise_seed)[rows[m]]
        clean = Lane(**{**vars(lane), "noise": 0.0})
        return alone(make_mlp, clean, x[rows[m]], noisy)

    assert_lanes_equal(found, several, own)


def test_rows_of_all_examples_are_no_rows():
    x, y = data()
    several = [Lane(seed=s, order=s, steps=12, batch=8) for s in range(3)]
    plain = train(make_mlp, several, x, y)
    whole = train(make_mlp, several, x, y, rows=torch.arange(40).expand(3, -1))
    for name, tensor in plain.states.items():
        assert torch.equal(whole.states[name], tensor)
    torch.testing.assert_close(whole.loss, plain.loss, atol=0, rtol=0)


def make_chain(draw):
    # a layer without bias, two linear layers in a row, and what changes nothing
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7, bias=False), nn.Identity(),
        nn.Linear(7, 8), nn.ReLU(inplace=True), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip
    return nets.initialise(net, draw).double()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("make", [make_mlp, make_chain])
def test_a_chain_by_hand_equals_the_general_way(make, alike, optimizer, monkeypatch):
    x, y = data()
    x = x.view(40, 2, 3) if make is make_chain else x
    several = EVERYTHING
    if alike:  # fused updates
        shared = {"batch": 8, "horizon": 100, "rho": 0.2, "noise": 0.2}
        several = [Lane(seed=s, order=s, steps=9 + s, **shared) for s in range(4)]
    several = [Lane(**{**vars(lane), "lr": lane.lr / 4}) for lane in several]
    draw = torch.Generator().manual_seed(9)
    start = lane_nets.initial(make, [lane.seed for lane in several])
    weight = next(name for name, t in start.items() if t.dim() > 2)
    masks = {weight: (torch.rand(start[weight].shape, generator=draw) < 0.6).to(DOUBLE)}
    rows = rows_for(len(several), 27)
    asked = {"masks": masks, "rows": rows, "optimizer": optimizer, "snapshots": (7,), "chunk": 3}
    calls = []
    real = chains.Chain.__call__
    monkeypatch.setattr(chains.Chain, "__call__",
                        lambda self, *a: calls.append(1) or real(self, *a))  # fmt: skip
    found = train(make, several, x, y, **asked)
    assert calls
    monkeypatch.setattr(steps, "chain", lambda *a: None)
    calls.clear()
    general = train(make, several, x, y, **asked)
    assert not calls
    close = {"atol": 1e-12, "rtol": 1e-10}
    for name, tensor in general.states.items():
        torch.testing.assert_close(found.states[name], tensor, **close)
        torch.testing.assert_close(found.snapshots[7][name], general.snapshots[7][name], **close)
    torch.testing.assert_close(found.loss, general.loss, **close)


def test_a_loss_of_its_own_and_compiling_take_the_general_way():
    x, y = data()
    state, net = lane_nets.initial(make_mlp, [0]), lanes.LaneNet(make_mlp(generator(0)))
    given = (net, [Lane(batch=8)], x, y, 3, state, {}, "sgd")
    assert steps.Stepper(*given, False).chain is not None
    assert steps.Stepper(*given, True).chain is None
    assert steps.Stepper(*given, False, loss=losses_of_lanes.cross_entropy).chain is None


class Doubled(nn.Linear):
    """A linear layer with a forward pass of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def sequence(*changed, **layers):
    made = {"first": nn.Linear(6, 4), "relu": nn.ReLU(), "last": nn.Linear(4, 3)} | layers
    net = nn.Sequential(*made.values()).double()
    for change in changed:
        change(net)
    return net


def share(net):
    net[2] = net[0]


def tie(net):
    net[2].bias = net[0].bias


class Renamed(nn.Sequential):
    """A subclass, whose forward pass could be anything."""


@pytest.mark.parametrize(
    "net",
    [
        sequence(first=Doubled(6, 4)),
        sequence(relu=nn.Tanh()),
        sequence(relu=nn.Sequential(nn.ReLU())),
        sequence(lambda net: net[1].register_forward_hook(lambda *a: None)),
        sequence(lambda net: net[0].register_forward_pre_hook(lambda *a: None)),
        sequence(lambda net: net.register_full_backward_hook(lambda *a: None)),
        sequence(lambda net: setattr(net[1], "forward", torch.tanh)),
        sequence(lambda net: net[0].requires_grad_(False)),
        sequence(lambda net: nn.utils.parametrizations.weight_norm(net[0])),
        sequence(share, first=nn.Linear(6, 6), last=nn.Linear(6, 6)),
        sequence(tie, last=nn.Linear(4, 4)),
        sequence().float(),
        Renamed(nn.Linear(6, 3)).double(),
        nn.Sequential(nn.ReLU()),
        nn.Sequential(),
        nn.Linear(6, 3).double(),
    ],
)
def test_only_plain_chains_are_taken_for_chains(net):
    x, y = data()
    assert chains.chain(sequence(), x, y) is not None
    assert chains.chain(net, x, y) is None


def test_a_chain_over_tokens_or_with_labels_left_out_takes_the_general_way():
    x, y = data()
    tokens = torch.stack([x, x], 1)
    assert chains.chain(sequence(), tokens, y) is None
    assert chains.chain(sequence(), x, torch.where(y == 0, -100, y)) is None
    with torch.autocast("cpu"):
        assert chains.chain(sequence(), x, y) is None


LENGTHS = [Lane(seed=0, order=0, steps=9, batch=8), Lane(seed=1, order=3, steps=23, batch=8),
           Lane(seed=2, order=3, steps=17, batch=20), Lane(seed=3, order=5, steps=12, batch=8),
           Lane(seed=4, order=1, steps=12, batch=8, rho=0.2),
           Lane(seed=5, order=2, steps=23, batch=20, lr=0.05)]  # fmt: skip


@pytest.mark.parametrize(("per_example", "chunk"), [(True, 2), (False, 6)])
def test_a_loss_that_depends_on_the_lane_equals_runs_with_that_loss(per_example, chunk):
    x, y = data()
    strength = torch.arange(1, 7, dtype=DOUBLE)

    def loss(logits, labels, numbers):
        assert logits.shape[:2] == labels.shape
        assert numbers.shape == labels.shape[:1]
        powers = strength[numbers].view(-1, 1, 1)
        value = -(powers * logits).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        return value if per_example else value.mean(1)

    rows = rows_for(6, 31)
    found = train(make_mlp, LENGTHS, x, y, rows=rows, loss=loss, chunk=chunk, workers=1)

    def own(m, lane):
        scaled = lambda z, t: F.cross_entropy((m + 1) * z, t)  # noqa: E731
        return alone(make_mlp, lane, x[rows[m]], y[rows[m]], loss=scaled)

    assert_lanes_equal(found, LENGTHS, own)


def modules(kind):
    """One loss per lane of LENGTHS, each with numbers of its own."""
    draw = torch.Generator().manual_seed(1)
    priors = torch.randn(6, 3, generator=draw, dtype=DOUBLE).mul(1.5).softmax(1)
    if kind is losses.ClassBalancedLoss:
        return [kind((1000 * p).ceil(), 0.99) for p in priors]
    return [kind(p) for p in priors]


KINDS = [losses.LogitAdjustedLoss, losses.LADELoss, losses.ClassBalancedLoss]


@pytest.mark.parametrize("kind", KINDS)
def test_one_module_per_lane_equals_runs_with_each_module(kind):
    x, y = data()
    own = modules(kind)
    found = train(make_mlp, LENGTHS, x, y, loss=lanes.lane_loss(own), chunk=2, workers=1)
    assert_lanes_equal(found, LENGTHS, lambda m, lane: alone(make_mlp, lane, x, y, loss=own[m]))
    reported = train(make_mlp, LENGTHS[:1], x, y, loss=lanes.lane_loss(own[:1])).loss
    torch.testing.assert_close(found.loss[:1], reported)


def test_modules_of_several_kinds_equal_runs_with_each_module():
    x, y = data()
    adjusted, lade = modules(losses.LogitAdjustedLoss), modules(losses.LADELoss)
    own = [adjusted[0], losses.FocalLoss(1.0), lade[2], losses.FocalLoss(3.0), adjusted[4],
           nn.CrossEntropyLoss()]  # fmt: skip
    rows = rows_for(6, 31)
    for chunk in (2, 6):
        loss = lanes.lane_loss(own)
        found = train(make_mlp, LENGTHS, x, y, rows=rows, loss=loss, chunk=chunk, workers=1)
        assert_lanes_equal(
            found,
            LENGTHS,
            lambda m, lane: alone(make_mlp, lane, x[rows[m]], y[rows[m]], loss=own[m]),
        )


class Sharpened(nn.Module):
    """A loss whose setting is in a module inside."""

    def __init__(self, gamma):
        super().__init__()
        self.inner = losses.FocalLoss(gamma)

    def forward(self, logits, labels):
        return self.inner(logits, labels)


@pytest.mark.parametrize(
    "own",
    [
        [Sharpened(1.0), Sharpened(3.0)],
        [losses.FocalLoss(), losses.FocalLoss(weight=torch.tensor([1.0, 2, 3], dtype=DOUBLE))],
    ],
)
def test_modules_that_only_look_alike_are_kept_apart(own):
    z, y = torch.randn(2, 5, 3, dtype=DOUBLE), torch.randint(0, 3, (2, 5))
    found = lanes.lane_loss(own)(z, y, torch.arange(2))
    for m in range(2):
        torch.testing.assert_close(found[m], own[m](z[m], y[m]))


def test_one_module_per_lane_works_with_several_workers():
    x, y = data()
    own = modules(losses.LADELoss)
    several = [Lane(seed=m % 6, order=m, steps=40, batch=8) for m in range(12)]
    one = train(make_mlp, several, x, y, loss=lanes.lane_loss(own * 2), workers=1)
    for _ in range(3):  # a race need not show every time
        two = train(make_mlp, several, x, y, loss=lanes.lane_loss(own * 2), workers=3, chunk=1)
        for name, tensor in one.states.items():
            torch.testing.assert_close(two.states[name], tensor, atol=1e-10, rtol=0)


def test_the_modules_of_lane_loss_are_left_alone():
    own = modules(losses.LADELoss)
    before = [m.prior.clone() for m in own]
    loss = lanes.lane_loss(own)
    z, y = torch.randn(2, 5, 3, dtype=DOUBLE), torch.randint(0, 3, (2, 5))
    found = loss(z, y, torch.tensor([4, 1]))
    for k, m in enumerate((4, 1)):
        torch.testing.assert_close(found[k], own[m](z[k], y[k]))
    assert all(torch.equal(m.prior, b) for m, b in zip(own, before, strict=True))


def make_frozen(draw):
    net = make_bn_mlp(draw)
    net[0].requires_grad_(False)
    net[1].bias.requires_grad_(False)
    return net


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_parameters_stay_as_they_are_and_decay_nothing(optimizer):
    x, y = data()
    several = [Lane(seed=s, order=s, steps=9 + s, batch=8, weight_decay=0.5, lr=0.05, rho=0.1 * s)
               for s in range(3)]  # fmt: skip
    start = lane_nets.initial(make_frozen, [0, 1, 2])
    start["1.bias"] += 0.3
    found = train(make_frozen, several, x, y, states=start, optimizer=optimizer)
    for name in ("0.weight", "1.bias"):
        assert torch.equal(found.states[name], start[name])
    for name in ("1.weight", "3.weight", "3.bias"):
        assert not torch.equal(found.states[name], start[name])
    assert not torch.equal(found.states["1.running_mean"], start["1.running_mean"])
    assert_lanes_equal(
        found,
        several,
        lambda m, lane: alone(make_frozen, lane, x, y, optimizer,
                              state={n: t[m] for n, t in start.items()}),
    )  # fmt: skip


def test_a_narrow_lane_cuts_frozen_layers_too():
    x, y = data()
    start = lane_nets.initial(make_frozen, [0])
    found = train(make_frozen, [Lane(steps=4, batch=8, width=0.5)], x, y).states
    for name in ("0.weight", "1.weight", "1.bias"):
        assert not found[name][0, 4:].any(), name
    assert torch.equal(found["0.weight"][0, :4], start["0.weight"][0, :4])


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunks_do_not_change_the_result(chunk):
    x, y = data()
    several = [Lane(seed=s, order=s, steps=5 + 3 * s, batch=8) for s in range(5)]
    whole = train(make_mlp, several, x, y, chunk=5)
    parts = train(make_mlp, several, x, y, chunk=chunk)
    for name, tensor in whole.states.items():
        torch.testing.assert_close(parts.states[name], tensor, atol=1e-12, rtol=0)
    torch.testing.assert_close(parts.loss, whole.loss)


def test_workers_do_not_change_the_result_and_leave_the_threads_as_they_were():
    x, y = data(image=True)
    several = [Lane(seed=s, order=s, steps=5 + 3 * s, batch=8) for s in range(5)]
    one = train(make_convnet, several, x, y, chunk=1, workers=1)
    before = torch.get_num_threads()
    two = train(make_convnet, several, x, y, chunk=1, workers=2)
    assert torch.get_num_threads() == before
    for name, tensor in one.states.items():
        torch.testing.assert_close(two.states[name], tensor, atol=1e-12, rtol=0)


def test_equal_lanes_are_equal():
    x, y = data()
    result = train(make_mlp, [Lane(seed=1, order=2, steps=7, batch=8)] * 3, x, y)
    for tensor in result.states.values():
        assert torch.equal(tensor[0], tensor[1])
        assert torch.equal(tensor[0], tensor[2])
    # convolution libraries treat channels in blocks, so lanes may round differently
    x, y = data(image=True)
    result = train(make_convnet, [Lane(seed=1, order=2, steps=7, batch=8)] * 3, x, y)
    for tensor in result.states.values():
        torch.testing.assert_close(tensor[0], tensor[2], atol=1e-12, rtol=0)


def test_order_changes_the_end_but_not_the_start():
    x, y = data()
    pair = [Lane(seed=1, order=o, steps=4, batch=8) for o in (0, 1)]
    result = train(make_mlp, pair, x, y, snapshots=(0, 4))
    assert torch.equal(*result.snapshots[0]["0.weight"])
    assert not torch.equal(*result.snapshots[4]["0.weight"])


def test_a_snapshot_equals_a_run_that_stops_there():
    x, y = data()
    long = train(make_mlp, [Lane(seed=1, steps=20, batch=8)], x, y, snapshots=(6, 20))
    short = train(make_mlp, [Lane(seed=1, steps=6, batch=8, horizon=20)], x, y)
    for name, tensor in short.states.items():
        torch.testing.assert_close(long.snapshots[6][name], tensor, atol=0, rtol=0)
        assert torch.equal(long.snapshots[20][name], long.states[name])


def test_masked_entries_stay_zero_under_momentum_and_weight_decay():
    x, y = data()
    start = lane_nets.initial(make_mlp, [0, 1])
    masks = {"2.weight": torch.zeros_like(start["2.weight"])}
    masks["2.weight"][1, 3] = 1
    lanes_ = [Lane(seed=s, steps=100, batch=8, weight_decay=0.1) for s in (0, 1)]
    for optimizer in ("sgd", "adamw"):
        result = train(make_mlp, lanes_, x, y, masks=masks, optimizer=optimizer)
        assert torch.equal(result.states["2.weight"] != 0, masks["2.weight"] != 0)


def test_sam_of_radius_zero_is_sgd_and_its_step_has_the_radius(monkeypatch):
    x, y = data()
    plain = train(make_mlp, [Lane(steps=5, batch=8)] * 2, x, y)
    # radius 0 beside another lane that has one goes through SAM's two passes
    from toolkit.core.lanes.steps import Stepper

    seen = []
    real = Stepper._gradient

    def spy(self, weights, buffers, x, y):
        seen.append([w.clone() for w in weights])
        return real(self, weights, buffers, x, y)

    monkeypatch.setattr(Stepper, "_gradient", spy)
    state, net = lane_nets.initial(make_mlp, [0, 0]), lanes.LaneNet(make_mlp(generator(0)))
    pair = [Lane(steps=5, batch=8, rho=0.0), Lane(steps=5, batch=8, rho=0.25)]
    done = Stepper(net, pair, x, y, 3, state, {}, "sgd", False).run((), lambda n: None)
    for name in net.parameters:
        torch.testing.assert_close(done[f"final/{name}"][0], plain.states[name][0],
                                   atol=1e-12, rtol=0)  # fmt: skip
    moved = torch.stack([
        (b - a).flatten(1).square().sum(1) for a, b in zip(seen[0], seen[1], strict=True)
    ]).sum(0).sqrt()  # fmt: skip
    torch.testing.assert_close(moved, torch.tensor([0.0, 0.25], dtype=DOUBLE), atol=1e-9, rtol=0)


def test_a_narrow_lane_computes_what_the_narrow_network_computes():
    wide = lane_nets.stack([make_bn_mlp(generator(0))])
    masks = lane_nets.width_masks(make_bn_mlp(generator(0)), [0.5])
    for name, mask in masks.items():
        wide[name] = wide[name] * mask
    narrow = nn.Sequential(
        nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)
    ).double()
    cut = {"0.weight": (slice(4),), "3.weight": (slice(None), slice(4))}
    cut |= {f"1.{n}": (slice(4),) for n in ("weight", "bias", "running_mean", "running_var")}
    state = {name: t[0][cut[name]] if name in cut else t[0] for name, t in wide.items()}
    narrow.load_state_dict(state)
    x, _ = data()
    got = lane_nets.LaneNet(make_bn_mlp(generator(0)))(wide, x[None])
    torch.testing.assert_close(got[0], narrow.eval()(x))


def test_a_diverging_lane_is_marked_and_the_others_go_on():
    x, y = data()
    fine = Lane(seed=0, steps=30, batch=8)
    broken = Lane(seed=1, steps=30, batch=8, lr=1e200, schedule="constant")
    both = train(make_mlp, [fine, broken], x, y)
    own = train(make_mlp, [fine], x, y)
    assert both.diverged[0] == -1
    assert 0 < both.diverged[1] < 30
    for name, tensor in own.states.items():
        torch.testing.assert_close(both.states[name][0], tensor[0], atol=1e-12, rtol=0)


def test_label_noise_changes_exactly_its_share():
    y = torch.arange(3).repeat(40)
    noisy = lanes.labels_with_noise(y, 3, 0.2, seed=1)
    assert int((noisy != y).sum()) == 24
    assert set(noisy.tolist()) == {0, 1, 2}
    assert torch.equal(noisy, lanes.labels_with_noise(y, 3, 0.2, seed=1))
    assert not torch.equal(noisy, lanes.labels_with_noise(y, 3, 0.2, seed=2))


def test_batch_norm_statistics_are_estimated_anew():
    x, _ = data(image=True)
    models = [make_convnet(generator(s)) for s in (0, 1)]
    net = lane_nets.LaneNet(models[0])
    fresh = net.restate(lane_nets.stack(models), x, batch=16)
    for m, model in enumerate(models):
        norm = model.train().blocks[0][1]
        mean, var, seen = torch.zeros(4, dtype=DOUBLE), torch.zeros(4, dtype=DOUBLE), 0
        for part in x.split(16):
            out = model.blocks[0][0](part).transpose(0, 1).flatten(1)
            share = len(part) / (seen + len(part))
            mean = (1 - share) * mean + share * out.mean(1)
            var = (1 - share) * var + share * out.var(1)
            seen += len(part)
        name = "blocks.0.1.running_mean"
        torch.testing.assert_close(fresh[name][m], mean.detach())
        torch.testing.assert_close(fresh["blocks.0.1.running_var"][m], var.detach())
        assert norm.momentum == 0.1
    assert all(n.momentum == 0.1 for n in net.norms)


def test_finished_chunks_are_not_run_again(tmp_path, monkeypatch):
    x, y = data()
    several = [Lane(seed=s, order=s, steps=6, batch=8) for s in range(4)]
    first = train(make_mlp, several, x, y, folder=tmp_path, chunk=2, snapshots=(3,))
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    files[0].write_bytes(files[0].read_bytes()[:100])  # a damaged file is run again
    ran = []
    real = steps.Stepper.run
    monkeypatch.setattr(steps.Stepper, "run",
                        lambda self, *a: ran.append(len(self.lanes)) or real(self, *a))  # fmt: skip
    again = train(make_mlp, several, x, y, folder=tmp_path, chunk=2, snapshots=(3,))
    assert ran == [2]
    assert torch.equal(first.states["0.weight"], again.states["0.weight"])
    assert torch.equal(first.snapshots[3]["2.weight"], again.snapshots[3]["2.weight"])
    train(make_mlp, several, x + 1, y, folder=tmp_path, chunk=2, snapshots=(3,))
    assert ran == [2, 2, 2]


def test_a_kept_chunk_is_not_taken_for_one_of_other_rows_or_frozen_layers(tmp_path):
    x, y = data()
    several = [Lane(seed=s, order=s, steps=6, batch=8) for s in range(2)]
    rows, others = rows_for(2, 20), rows_for(2, 20).flip(1)
    # the same examples in another order, others, none at all, and a layer that does not train
    runs = [
        (make_bn_mlp, rows),
        (make_bn_mlp, others),
        (make_bn_mlp, None),
        (make_bn_mlp, rows.flip(0)),
        (make_frozen, rows),
    ]
    kept = [train(make, several, x, y, rows=r, folder=tmp_path) for make, r in runs]
    for (make, r), result in zip(runs, kept, strict=True):
        fresh = train(make, several, x, y, rows=r)
        again = train(make, several, x, y, rows=r, folder=tmp_path)
        for name, tensor in fresh.states.items():
            torch.testing.assert_close(result.states[name], tensor, atol=1e-12, rtol=0)
            assert torch.equal(again.states[name], result.states[name])
    chunks = {p.name for p in tmp_path.iterdir()}
    train(make_bn_mlp, several, x, y, rows=rows, folder=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == chunks  # nothing was run again


def test_the_bar_counts_every_step():
    x, y = data()
    counts = []
    from toolkit.core.lanes.steps import Stepper

    several = [Lane(seed=s, steps=s, batch=8) for s in (70, 41, 3)]
    net = lanes.LaneNet(make_mlp(generator(0)))
    state = lane_nets.initial(make_mlp, [0, 1, 2])
    Stepper(net, several, x, y, 3, state, {}, "sgd", False).run((41, 10), counts.append)
    assert sum(counts) == 70 + 41 + 3


def test_compiled_steps_give_the_same_weights():
    x, y = data()
    several = [Lane(seed=s, steps=6, batch=8) for s in range(3)]
    plain = train(make_mlp, several, x, y)
    fast = train(make_mlp, several, x, y, compile=True)
    for name, tensor in plain.states.items():
        torch.testing.assert_close(fast.states[name], tensor, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: train(make_mlp, [], x, y), "lanes is empty"),
        (lambda x, y: train(make_mlp, [Lane(batch=99)], x, y), "batch=99"),
        (lambda x, y: train(make_mlp, [Lane()], x, y, optimizer="adam"), 'choose "sgd" or "adamw"'),
        (lambda x, y: train(make_mlp, [Lane()], x, y[:-1]), "one label each"),
        (lambda x, y: train(make_mlp, [Lane()], x, y, snapshots=(5000,)), "no lane has that step"),
        (
            lambda x, y: train(make_mlp, [Lane()], x, y, masks={"nothing": x}),
            "must name a parameter",
        ),
        (
            lambda x, y: train(
                make_mlp, [Lane()], x, y, states=lane_nets.initial(make_mlp, [0, 1])
            ),
            "1 lanes need",
        ),
        (
            lambda x, y: train(make_mlp, [Lane()], x, y, memory_gib=1e-9),
            "Set memory_gib to at least",
        ),
        (
            lambda x, y: train(make_mlp, [Lane()] * 2, x, y, rows=torch.zeros(3, 40).long()),
            "rows has shape (3, 40): give (lanes, examples of each), here (2, n)",
        ),
        (
            lambda x, y: train(make_mlp, [Lane()], x, y, rows=torch.arange(40)),
            "rows has shape (40,)",
        ),
        (
            lambda x, y: train(make_mlp, [Lane()], x, y, rows=torch.zeros(1, 0).long()),
            "rows has shape (1, 0)",
        ),
        (
            lambda x, y: train(make_mlp, [Lane()], x, y, rows=torch.arange(1, 41)[None]),
            "rows must hold whole numbers from 0 to 39",
        ),
        (
            lambda x, y: train(make_mlp, [Lane()], x, y, rows=torch.arange(40)[None] - 1),
            "rows must hold whole numbers from 0 to 39",
        ),
        (
            lambda x, y: train(make_mlp, [Lane()], x, y, rows=torch.zeros(1, 40)),
            "rows must hold whole numbers from 0 to 39",
        ),
        (
            lambda x, y: train(make_mlp, [Lane(batch=21)], x, y, rows=torch.arange(20)[None]),
            "larger than the 20 training examples",
        ),
        (
            lambda x, y: train(
                make_mlp, [Lane()], x, y, folder="unused", loss=lambda z, t, m: z.sum((1, 2))
            ),
            "folder and loss",
        ),
        (lambda x, y: lanes.lane_loss([]), "losses is empty"),
        (lambda x, y: Lane(lr=math.nan), "lr=nan"),
        (lambda x, y: Lane(width=0.0), "width=0.0"),
        (lambda x, y: Lane(schedule="steps"), "schedule='steps'"),
        (lambda x, y: lane_nets.stack([]), "models is empty"),
        (
            lambda x, y: lane_nets.stack([make_mlp(generator(0)), make_bn_mlp(generator(0))]),
            "not of one architecture",
        ),
        (lambda x, y: lane_nets.LaneNet(nn.Sequential(nn.Dropout(0.1))), "dropout with p=0.1"),
        (lambda x, y: lane_nets.width_masks(make_mlp(generator(0)), [2.0]), "width=2.0"),
    ],
)
def test_bad_input_is_named(change, words):
    x, y = data()
    with pytest.raises(ValueError) as error:
        change(x, y)
    assert words in str(error.value)


# ---- networks, inputs and labels of other kinds


class Wrapped(nn.Module):
    """A linear layer whose logits go through ``end``."""

    def __init__(self, end, norm=None):
        super().__init__()
        self.layer, self.norm, self.end = nn.Linear(6, 3), norm or nn.Identity(), end

    def forward(self, x):
        return self.end(self.layer(self.norm(x)))


def making(build):
    return lambda draw: nets.initialise(build(), draw).double()


@dataclasses.dataclass
class Output:
    logits: torch.Tensor


PAIR = [Lane(seed=s, order=s, steps=7, batch=8) for s in range(2)]


def alike(found, expected):
    torch.testing.assert_close(found.loss, expected.loss)
    for name, tensor in expected.states.items():
        torch.testing.assert_close(found.states[name], tensor)


@pytest.mark.parametrize("end", [Output, lambda z: {"logits": z, "hidden": None}, lambda z: (z,)])
def test_logits_are_found_in_what_a_network_returns(end):
    x, y = data()
    found = train(making(lambda: Wrapped(end)), PAIR, x, y)
    alike(found, train(making(lambda: Wrapped(lambda z: z)), PAIR, x, y))


@pytest.mark.parametrize("end", [lambda z: (z, z), lambda z: [z], lambda z: {"out": z}])
def test_a_network_without_logits_is_named(end):
    with pytest.raises(TypeError, match="lanes need its logits"):
        train(making(lambda: Wrapped(end)), PAIR, *data())


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (lambda z: F.dropout(z, 0.5), "draws random numbers"),
        (lambda z: z if z.sum() > 0 else -z, "looks at what it computes"),
        (lambda z: z @ torch.ones(2), "calling it with x"),
        (lambda z: z[:, 0], "returns shape (8,)"),
        (lambda z: z[:, :2], "y hold 2"),
    ],
)
def test_a_network_that_lanes_cannot_train_is_named(end, words):
    with pytest.raises(ValueError) as error:
        train(making(lambda: Wrapped(end)), PAIR, *data())
    assert words in str(error.value)


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.int8])
def test_labels_and_inputs_may_be_of_any_kind(kind):
    x, y = data()
    alike(train(make_mlp, PAIR, x, y.to(kind)), train(make_mlp, PAIR, x, y))
    alike(train(make_mlp, PAIR, x.numpy(), y.numpy()), train(make_mlp, PAIR, x, y))


@pytest.mark.parametrize("make", [make_mlp, making(lambda: Wrapped(lambda z: z))])
def test_examples_of_label_minus_100_do_not_count(make):
    x, y = data()
    y[::3] = -100
    found = train(make, PAIR, x, y).states
    for m, model in enumerate(separate(make, PAIR, x, y)):
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(found[name][m], tensor)


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y[:, None],
        lambda y: F.one_hot(y),
        lambda y: F.one_hot(y).double(),
        lambda y: y.double(),
        lambda y: y > 0,
        lambda y: y + 1,
        lambda y: y - 1,
        lambda y: y.clone().fill_(-100),
    ],
)
def test_labels_that_name_no_class_are_refused(change):
    x, y = data()
    with pytest.raises(ValueError, match=r"y hold|y have"):
        train(make_mlp, PAIR, x, change(y))


def test_noise_is_for_classes():
    x, y = data()
    y[0] = -100
    with pytest.raises(ValueError, match="noise"):
        train(make_mlp, [Lane(batch=8, noise=0.1)], x, y)


class Tied(nn.Module):
    """Two layers with one weight, and an embedding's weight as the head's."""

    def __init__(self):
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.second.weight, self.head.weight = self.first.weight, self.table.weight

    @torch.no_grad()
    def draw(self, draw):
        for p in self.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=draw))
        return self.double()

    def forward(self, x):
        h = self.table(x).mean(1)
        return self.head(torch.tanh(self.second(torch.tanh(self.first(h)))))


def make_tied(draw):
    return Tied().draw(draw)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_tied_networks_over_tokens_stay_tied(kind):
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randint(9, (40, 5), generator=draw), torch.randint(9, (40,), generator=draw)
    lanes_ = [Lane(seed=s, lr=0.1 * (s + 1), steps=7, batch=8) for s in range(2)]
    found = train(make_tied, lanes_, x.to(kind), y, snapshots=(3,))
    assert found.loss.dtype == DOUBLE
    for states in (found.states, found.snapshots[3]):
        assert torch.equal(states["first.weight"], states["second.weight"])
        assert torch.equal(states["table.weight"], states["head.weight"])
    for m, model in enumerate(separate(make_tied, lanes_, x, y)):
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(found.states[name][m], tensor)


def test_tied_weights_that_differ_or_narrow_are_refused():
    x, y = torch.zeros(40, 5).long(), torch.zeros(40).long()
    start = lanes.initial(make_tied, [0])
    start["second.weight"] = start["second.weight"] + 1
    with pytest.raises(ValueError, match="ties them"):
        train(make_tied, [Lane()], x, y, states=start)
    with pytest.raises(ValueError, match="is tied"):
        train(make_tied, [Lane(width=0.5)], x, y)


@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_a_batch_norm_over_all_batches_is_that_of_runs_of_their_own(rho):
    def build():
        return Wrapped(lambda z: z, nn.BatchNorm1d(6, momentum=None))

    x, y = data()
    own = [Lane(seed=s, order=s, steps=7, batch=8, rho=rho) for s in range(2)]
    found = train(making(build), own, x, y).states
    net = lane_nets.LaneNet(build())
    fresh = net.restate(found, x, 8)
    for m, model in enumerate(separate(making(build), own, x, y)):
        if rho == 0:
            for name, tensor in model.state_dict().items():
                torch.testing.assert_close(found[name][m], tensor)
        # the mean over batches of one size
        mean = torch.stack([part.mean(0) for part in x.split(8)]).mean(0)
        torch.testing.assert_close(fresh["norm.running_mean"][m], mean)
    found["norm.num_batches_tracked"][0] = 2
    with pytest.raises(ValueError, match="differs between lanes"):
        train(making(build), own, x, y, states=found)


# ---- what a folder tells apart


def test_networks_of_one_repr_are_kept_apart(tmp_path):
    x, y = data()
    builds = [
        lambda: Wrapped(torch.relu),
        lambda: Wrapped(torch.tanh),
        lambda: Wrapped(lambda z: z),
        lambda: Wrapped(lambda z: 2 * z),
        lambda: Wrapped(functools.partial(torch.mul, other=2)),
        lambda: Wrapped(functools.partial(torch.mul, other=3)),
    ]
    for build in builds:
        kept = train(making(build), PAIR, x, y, folder=tmp_path)
        alike(kept, train(making(build), PAIR, x, y))
    assert len(list(tmp_path.iterdir())) == len(builds)
    for build in builds:  # and are known again
        train(making(build), PAIR, x, y, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(builds)


class Slotted(collections.abc.Callable):
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value

    def __call__(self, z):
        return z * self.value


@functools.lru_cache
def cached(z):
    return z


@functools.lru_cache
def cached_too(z):
    return z + 1


def scaled(factor):
    return lambda z: z * factor


def test_a_fingerprint_holds_code_and_data():
    def told(end, change=lambda m: None):
        network = Wrapped(end)
        change(network)
        return fingerprint(network)

    table = torch.ones(2)
    ends = [scaled(1), scaled(2), table, table * 2, np.ones(2), np.zeros(2), {"a": 1}, {"a": 2},
            {1, 2}, {1, 3}, nn.ReLU(), nn.Tanh(), torch.float32, Output(1), Output(2), F.relu,
            F.gelu, torch.Tensor.relu, Slotted(1), Slotted(2), cached, cached_too,
            1, 1.0, "1", [1], (1,), None]  # fmt: skip
    found = [told(end) for end in ends]
    assert len(set(found)) == len(ends)
    assert [told(end) for end in ends] == found
    changes = [
        lambda m: setattr(m, "forward", lambda x: x),
        lambda m: m.register_forward_hook(lambda *a: None),
        lambda m: m.register_buffer("table", torch.ones(2), persistent=False),
        lambda m: m.register_buffer("table", torch.zeros(2), persistent=False),
        lambda m: m.layer.bias.requires_grad_(False),
        lambda m: setattr(m, "norm", m.layer),
    ]
    assert len({told(None), *(told(None, change) for change in changes)}) == len(changes) + 1


def test_a_function_of_another_body_is_another_network(monkeypatch):
    before = fingerprint(Wrapped(calling))
    monkeypatch.setitem(globals(), "helper", lambda z: z + 1)
    assert fingerprint(Wrapped(calling)) != before


def helper(z):
    return z


def calling(z):
    return helper(z)


def test_what_cannot_be_told_apart_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"network\.end of the network is a lock"):
        fingerprint(Wrapped(threading.Lock()))


@pytest.mark.parametrize("how", ["no tensors", "other shape", "other number", "folder"])
def test_a_damaged_chunk_is_trained_again(tmp_path, how):
    x, y = data()
    first = train(make_mlp, PAIR, x, y, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    held = load_file(path)
    name = "final/0.weight"
    if how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "no tensors":
        save_file({}, path)
    else:
        held[name] = held[name][:1].clone() if how == "other shape" else held[name] + 1
        save_file(held, path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        alike(train(make_mlp, PAIR, x, y, folder=tmp_path), first)
    assert any("is a folder" in str(w.message) for w in said) == (how == "folder")


def test_a_chain_follows_weights_and_batches_that_are_other_tensors():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 4, generator=draw, dtype=torch.float64)
    y = torch.randint(2, (3, 5), generator=draw)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    whole = chains.chain(net, x[0], y[0])
    weights = [torch.randn(3, *p.shape, generator=draw, dtype=torch.float64)
               for p in net.parameters()]  # fmt: skip
    for other in (weights, [w * 2 for w in weights], weights):
        for batch in (x, x + 1, x[:, :2].contiguous()):
            labels = y[:, : batch.shape[1]]
            loss, grads = whole(other, batch, labels)
            again, expected = chains.chain(net, x[0], y[0])(other, batch, labels)
            assert torch.equal(loss, again)
            assert all(map(torch.equal, grads, expected))


def test_the_first_step_of_a_loss_that_is_not_finite_is_noted_once():
    diverged = torch.tensor([-1, -1, 3, -1])
    losses = torch.ones(4, 4)
    losses[2:, 1] = torch.nan
    losses[1, 2] = losses[0, 3] = torch.inf
    steps._note(diverged, losses, 10)
    assert diverged.tolist() == [-1, 12, 3, 10]


def test_logits_that_are_whole_numbers_are_refused():
    class Rounded(nn.Linear):
        def forward(self, x):
            return super().forward(x).long()

    with pytest.raises(ValueError, match=r"returns torch\.int64"):
        train(lambda _: Rounded(4, 3), [Lane(batch=8)], torch.randn(16, 4), torch.arange(16) % 3)
