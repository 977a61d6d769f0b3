"""What growing methods share: the choice of layers, late parameter groups and their clocks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

from tests.pairs import run_pair
from toolkit.core.adapt.steps.growth import block_generator, choose, draw_seed, looks
from toolkit.core.adapt.steps.growth_controller import GrowthController
from toolkit.core.adapt.steps.growth_groups import GrowthGroups
from toolkit.core.adapt.steps.hooks import register
from toolkit.core.adapt.steps.processes import average


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Stack(nn.Module):
    """A layer that grows by appending vectors."""

    def __init__(self, rank: int = 1, limit: int = 9):
        super().__init__()
        self.rank, self.limit, self.blocks = rank, limit, 1
        self.v0 = nn.Parameter(torch.ones(rank))

    def grow(self, amount: int, draws=None) -> dict[str, nn.Parameter]:
        new = nn.Parameter(torch.ones(amount) if draws is None else draws["v"])
        self.register_parameter(f"v{self.blocks}", new)
        self.blocks += 1
        self.rank += amount
        return {f"v{self.blocks - 1}": new}


def controller(layers=3, total_steps=20, optimizer=None, limit=9, **options):
    stacks = {f"layer{i}": Stack(limit=limit) for i in range(layers)}
    tensors = [p for s in stacks.values() for p in s.parameters()]
    optimizer = torch.optim.Adam(tensors, lr=0.1) if optimizer is None else optimizer(tensors)
    return grower(stacks, optimizer, total_steps, **options)


def grower(stacks, optimizer, total_steps, target=6, growth=1, **options):
    settings = {"warmup": 2, "interval": 3, "restart": True, "overshoot": False} | options
    method = SimpleNamespace(
        info=SimpleNamespace(title="Stacking"), start=1, total_rank=target, orthogonality=0,
        **settings,
    )  # fmt: skip
    return GrowthController(method, stacks, optimizer, total_steps, growth=growth)


# --- the choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "missing", "growth", "top", "rooms", "want"),
    [
        ([3, 1, 2], 9, 1, 1, [9, 9, 9], [1, 0, 0]),
        ([3, 1, 2], 9, 2, 2, [9, 9, 9], [2, 0, 2]),
        ([1, 1, 0], 9, 1, 1, [9, 9, 9], [1, 1, 0]),  # a tie at the threshold: both
        ([0, 0, 0], 9, 1, 7, [9, 9, 9], [1, 1, 1]),
        ([0, 0, 0], 2, 1, 7, [9, 9, 9], [1, 1, 0]),  # ties never pass the budget
        ([3, 1, 2], 3, 2, 2, [9, 9, 9], [2, 0, 1]),  # the last takes what is left
        ([3, 1, 2], 1, 2, 2, [9, 9, 9], [1, 0, 0]),
        ([3, 1, 2], 9, 2, 1, [0, 9, 9], [0, 0, 2]),  # a full layer is not ranked
        ([3, 1, 2], 9, 4, 1, [3, 9, 9], [3, 0, 0]),
        ([3, 1, 2], 9, 1, 1, [0, 0, 0], [0, 0, 0]),
        ([3, 1, 2], 0, 1, 1, [9, 9, 9], [0, 0, 0]),
    ],
)
def test_choice_by_hand(scores, missing, growth, top, rooms, want):
    chosen = choose(scores, missing, growth, top, rooms)
    assert chosen.amounts == want
    assert choose(torch.tensor(scores), missing, growth, top, rooms).amounts == want
    if any(want):
        assert all(
            (scores[i] >= chosen.threshold) == (want[i] > 0) or missing == sum(want) or not rooms[i]
            for i in range(3)
        )


def test_the_official_rule_may_pass_the_budget():
    assert choose([3, 1, 2], 3, 2, 2, [9, 9, 9], overshoot=True).amounts == [2, 0, 2]
    assert choose([0, 0, 0], 1, 2, 1, [9, 9, 1], overshoot=True).amounts == [2, 2, 1]
    assert choose([3, 1, 2], 0, 2, 2, [9, 9, 9], overshoot=True).amounts == [0, 0, 0]


@pytest.mark.parametrize("warmup", [0, 1, 3, 7, 8, 50])
@pytest.mark.parametrize("interval", [1, 2, 4, 30])
@pytest.mark.parametrize("total", [1, 8, 9, 25])
def test_looks_are_counted(warmup, interval, total):
    assert looks(warmup, interval, total) == sum(
        t > warmup and t % interval == 0 for t in range(total)
    )


# --- draws ---------------------------------------------------------------------------------------


def test_block_draws_depend_on_layer_and_block_only():
    seeds = [draw_seed(generator(s), torch.device("cpu")) for s in (0, 0, 1)]
    assert seeds[0].dtype == torch.int64
    assert torch.equal(seeds[0], seeds[1])
    assert not torch.equal(seeds[0], seeds[2])
    draws = [
        torch.randn(4, generator=block_generator(seed, i)) for seed in seeds for i in range(1, 4)
    ]
    for i in range(3):
        assert torch.equal(draws[i], draws[3 + i])
    distinct = {tuple(d.tolist()) for d in draws}
    assert len(distinct) == 6


def test_a_seed_may_come_from_the_global_generator():
    torch.manual_seed(4)
    first = draw_seed(None, torch.device("cpu"))
    torch.manual_seed(4)
    assert torch.equal(first, draw_seed(None, torch.device("cpu")))


def test_averaging_in_a_lone_process_does_nothing():
    t = torch.tensor([1.0, 2.0])
    average([t])
    assert t.tolist() == [1.0, 2.0]


# --- groups --------------------------------------------------------------------------------------


def groups_of(make=torch.optim.Adam, number=3, total_steps=20, lr=0.1, **options):
    p = {"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(2))}
    optimizer = make(list(p.values()), lr=lr)
    return GrowthGroups(optimizer, p, number, total_steps, **options), optimizer, p


def born(optimizer, groups, step, name="c", value=1.0):
    new = nn.Parameter(torch.full((2,), value))
    groups.fill({name: new}, step)
    return new


def test_a_scheduler_built_after_attach_follows_all_groups():
    groups, optimizer, p = groups_of()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 20)
    assert [len(g["params"]) for g in optimizer.param_groups] == [2, 0, 0, 0]
    for step in range(20):
        if step in (3, 5):
            born(optimizer, groups, step, f"n{step}")
        for t in (*p.values(), *(t for g in optimizer.param_groups for t in g["params"])):
            t.grad = torch.ones_like(t)
        groups.before_step(step)
        optimizer.step()
        groups.after_step()
        scheduler.step()
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(
            [0.1 * (19 - step) / 20] * 4
        )
    assert groups.free == 1


def test_a_recursive_scheduler_is_not_disturbed():
    groups, optimizer, _ = groups_of(restart=True, warmup=2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    born(optimizer, groups, 0)
    for step in range(5):
        groups.before_step(step)
        optimizer.step()
        groups.after_step()
        scheduler.step()
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.1 * 0.5**5)


def test_a_scheduler_built_before_is_refused():
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([p], lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
    with pytest.raises(ValueError, match=r"build the scheduler after attach\(\)"):
        GrowthGroups(optimizer, {"p": p}, 1, 20)
    assert len(optimizer.param_groups) == 1


def test_adapters_in_two_groups_are_refused():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([{"params": [a]}, {"params": [b]}], lr=0.1)
    with pytest.raises(ValueError, match=r"2 parameter groups.*one group"):
        GrowthGroups(optimizer, {"a": a, "b": b}, 1, 20)


def test_a_restarted_rate_follows_the_written_formula_and_ends_with_the_run():
    T, tau, w = 30, 7, 5
    groups, optimizer, _ = groups_of(total_steps=T, lr=0.2, restart=True, warmup=w)
    born(optimizer, groups, tau)
    end = T - tau - 1
    for t in range(tau + 1, T):
        u = t - tau - 1
        want = 0.2 * u / w if u < w else 0.2 * (end - u) / (end - w)
        assert groups.rate(t, tau) == pytest.approx(want)
    assert groups.rate(tau + 1, tau) == 0.0
    assert groups.rate(T - 1, tau) == pytest.approx(0.2 / (end - w))
    assert groups.rate(T, tau) == 0.0
    assert groups.rate(T + 50, tau) == 0.0
    assert groups.rate(tau, tau) == 0.0


def test_a_warmup_longer_than_what_is_left_only_rises():
    groups, _, _ = groups_of(total_steps=10, restart=True, warmup=50)
    rates = [groups.rate(t, 4) for t in range(5, 10)]
    assert rates == pytest.approx([0.1 * u / 50 for u in range(5)])


def test_without_warmup_a_restart_begins_at_the_full_rate():
    groups, _, _ = groups_of(total_steps=10, restart=True, warmup=0)
    assert groups.rate(5, 4) == pytest.approx(0.1)


def test_the_rate_is_the_groups_own_only_during_the_step():
    groups, optimizer, _ = groups_of(restart=True, warmup=4)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(optimizer.param_groups[1]["lr"]))
    born(optimizer, groups, 0)
    groups.before_step(3)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.1 * 2 / 4)
    groups.before_step(4)  # a step that was refused in between leaves nothing behind
    optimizer.step()
    groups.after_step()
    assert seen == [pytest.approx(0.1 * 3 / 4)]
    assert optimizer.param_groups[1]["lr"] == 0.1


def test_a_rate_that_is_a_tensor_stays_the_same_tensor():
    groups, optimizer, _ = groups_of(lr=torch.tensor(0.1), restart=True, warmup=4)
    tensors = [g["lr"] for g in optimizer.param_groups]
    assert len({id(t) for t in tensors}) == 4
    born(optimizer, groups, 0)
    groups.before_step(3)
    assert optimizer.param_groups[1]["lr"] is tensors[1]
    assert tensors[1].item() == pytest.approx(0.05)
    groups.after_step()
    assert tensors[1].item() == pytest.approx(0.1)


def test_without_restart_the_rate_is_that_of_the_adapters_at_the_step():
    groups, optimizer, _ = groups_of(restart=False)
    born(optimizer, groups, 2)
    optimizer.param_groups[0]["lr"] = 0.03  # a loop that sets its own group only
    assert groups.rates(5) == [0.03]
    groups.before_step(5)
    assert optimizer.param_groups[1]["lr"] == 0.03


def test_the_rate_before_a_schedulers_warmup_is_known():
    groups, optimizer, _ = groups_of(restart=True, warmup=0)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 20)
    assert optimizer.param_groups[0]["lr"] == 0.0
    assert groups.rate(1, 0) == pytest.approx(0.1)


def test_new_groups_take_the_settings_of_the_adapters_group():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW(
        [{"params": [b], "lr": 1.0}, {"params": [a], "betas": (0.5, 0.6), "weight_decay": 0.3}],
        lr=0.1,
    )
    GrowthGroups(optimizer, {"a": a}, 1, 20)
    new = optimizer.param_groups[2]
    assert (new["lr"], new["betas"], new["weight_decay"]) == (0.1, (0.5, 0.6), 0.3)
    other = torch.optim.AdamW([a], lr=0.1, weight_decay=0.3)
    GrowthGroups(other, {"a": a}, 1, 20, weight_decay=0.0)
    assert other.param_groups[1]["weight_decay"] == 0.0


def test_weight_decay_needs_an_optimizer_that_has_it():
    class Plain(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

    with pytest.raises(ValueError, match=r"weight_decay=0\.1.*Plain"):
        groups_of(Plain, weight_decay=0.1)
    groups_of(Plain, weight_decay=0.0)  # asks for nothing that Plain would do


def test_named_parameters_stay_named():
    p = {"a": nn.Parameter(torch.ones(2))}
    optimizer = torch.optim.Adam(p.items(), lr=0.1)
    groups = GrowthGroups(optimizer, p, 2, 20)
    born(optimizer, groups, 3, "c")
    assert [g["param_names"] for g in optimizer.param_groups] == [["a"], ["c"], []]
    again = torch.optim.Adam({**p, "c": optimizer.param_groups[1]["params"][0]}.items(), lr=0.1)
    fresh = GrowthGroups(
        again,
        {
            n: t
            for g in again.param_groups
            for n, t in [*zip(g["param_names"], g["params"], strict=True)]
        },
        0,
        20,
    )
    fresh.load(groups.state(), {"a": p["a"], "c": optimizer.param_groups[1]["params"][0]})
    assert [g["param_names"] for g in again.param_groups] == [["a"], ["c"], []]


def test_a_full_schedule_refuses_another_growth_and_changes_nothing():
    groups, optimizer, _ = groups_of(number=1)
    born(optimizer, groups, 0)
    with pytest.raises(RuntimeError, match=r"all 1 growths"):
        born(optimizer, groups, 1)
    assert [len(g["params"]) for g in optimizer.param_groups] == [2, 1]


def test_a_new_optimizer_is_laid_out_as_the_old_one_was():
    groups, optimizer, p = groups_of(number=3)
    p["c"], p["d"] = born(optimizer, groups, 4, "c"), born(optimizer, groups, 9, "d", 2.0)
    for t in p.values():
        t.grad = torch.ones_like(t)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    # a user makes the new optimizer from all tensors, in another order than they were born
    again = torch.optim.Adam([p["a"], p["d"], p["c"], p["b"]], lr=0.7)
    fresh = GrowthGroups(again, p, 1, 20)
    fresh.load(groups.state(), p)
    again.load_state_dict(saved)
    assert fresh.births == [4, 9]
    assert fresh.free == 1
    assert fresh.eta0 == 0.1
    for old, new in zip(optimizer.param_groups, again.param_groups, strict=True):
        assert [id(t) for t in old["params"]] == [id(t) for t in new["params"]]
    assert torch.equal(again.state[p["d"]]["exp_avg"], optimizer.state[p["d"]]["exp_avg"])
    # load_state_dict replaced the dictionaries: the clock must still reach them
    fresh.before_step(12)
    assert again.param_groups[1]["lr"] == pytest.approx(fresh.rate(12, 4))
    with pytest.raises(ValueError, match=r"'c' was born.*toolkit\.load"):
        fresh.load(groups.state(), {"a": p["a"], "b": p["b"]})


# --- the controller ------------------------------------------------------------------------------


def test_as_many_groups_are_reserved_as_can_be_needed():
    assert controller().groups.number == 3  # three ranks are missing, six looks
    assert controller(target=6, growth=2).groups.number == 2
    assert controller(target=18, interval=9, growth=9).groups.number == 2  # two looks
    assert controller(target=3).groups.number == 0
    # with a limit of 4 a layer takes 2 and then 1, so one more growth a layer may happen
    assert controller(target=12, growth=2, limit=4, interval=1).groups.number == 5 + 3


def test_growth_is_recorded():
    c = controller()
    assert [(r.step, r.total, [*r.ranks.values()]) for r in c.history] == [(0, 3, [1, 1, 1])]
    c.step = 3
    c.grow([0, 1, 1], torch.tensor([1.0, 4.0, 3.0]), 3.0)
    c.step = 6
    c.grow([0, 0, 0])
    c.grow([0, 1, 0])
    told = [(r.step, r.total, [*r.ranks.values()]) for r in c.history]
    assert told == [(0, 3, [1, 1, 1]), (3, 5, [1, 2, 2]), (6, 6, [1, 3, 2])]
    assert c.history[1].threshold == 3.0
    table = c.table()
    assert list(table.columns) == ["step", "total", "threshold", "layer", "score", "rank"]
    assert table[table.step == 3].score.tolist() == [1.0, 4.0, 3.0]
    assert table[table.step != 3].score.isna().all()  # nothing was scored at the start or by hand
    assert table["rank"].tolist() == [1, 1, 1, 1, 2, 2, 1, 3, 2]
    assert c.ranks() == {"layer0": 1, "layer1": 3, "layer2": 2}
    assert c.total == c.target == 6
    assert not c.growing
    assert c.groups.births == [3, 6]
    assert c.groups.members == [["layer1.v1", "layer2.v1"], ["layer1.v2"]]


def test_looks_come_after_the_warmup_until_the_target_or_the_end():
    c = controller(total_steps=14)
    due = []
    for _ in range(30):
        due.append(c.allocating)
        c.step += 1
    assert [t for t, look in enumerate(due) if look] == [3, 6, 9, 12]
    c = controller()
    c.step = 6
    assert c.allocating
    c.grow([1, 1, 1])
    assert not c.allocating


def test_state_goes_through_save_and_load():
    c = controller()
    c.step = 3
    c.grow([0, 1, 1])
    c.step = 5
    stacks = dict(zip(c.names, c.layers, strict=True))
    optimizer = torch.optim.Adam([p for s in c.layers for p in s.parameters()], lr=0.1)
    again = grower(stacks, optimizer, 20)
    again.load(c.state())
    assert again.step == 5
    pd.testing.assert_frame_equal(again.table(), c.table())
    assert [len(g["params"]) for g in optimizer.param_groups] == [3, 2, 0, 0]
    with pytest.raises(ValueError, match=r"saved at ranks \[1, 2, 2\].*\[1, 1, 1\]"):
        controller().load(c.state())
    with pytest.raises(ValueError, match=r"does not fit Stacking.*missing"):
        controller().load({"step": torch.tensor(3)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": None}, r"Stacking moves ranks over the run.*total_steps=T"),
        ({"total_steps": 2}, r"warmup=2.*total_steps=2"),
        ({"target": 2}, r"target of 2.*below the 3.*target_rank"),
        ({"target": 28}, r"target of 28.*above the 27"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        controller(**options)


def test_growth_by_hand_is_checked_before_anything_changes():
    c = controller(limit=2)
    for amounts in ([1, 1], [1, -1, 0], [2, 0, 0]):
        with pytest.raises(ValueError, match="amounts must be 3 numbers from 0 to growth=1"):
            c.grow(amounts)
    c.grow([0, 1, 0])
    with pytest.raises(ValueError, match=r"'layer1' has rank 2.*allows 2"):
        c.grow([1, 1, 0])
    assert c.ranks() == {"layer0": 1, "layer1": 2, "layer2": 1}
    c.step = 20
    with pytest.raises(RuntimeError, match=r"after the end.*total_steps=20"):
        c.grow([1, 0, 0])


def test_gradients_are_checked():
    c = controller()
    register(c.optimizer, c)
    with pytest.raises(RuntimeError, match=r"backward"):
        c.optimizer.step()
    p, before = c.layers[1].v0, [q.detach().clone() for x in c.layers for q in x.parameters()]
    p.grad = torch.full_like(p, float("inf"))
    with pytest.raises(FloatingPointError, match=r"gradient of 'layer1\.v0'.*step 0"):
        c.optimizer.step()
    p.grad = torch.ones(1).to_sparse()
    with pytest.raises(TypeError, match=r"'layer1\.v0' is sparse"):
        c.optimizer.step()
    p.grad = torch.ones(1)
    c.optimizer.grad_scale, c.optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    with pytest.raises(RuntimeError, match=r"scaler\.unscale_"):
        c.optimizer.step()
    after = [q for x in c.layers for q in x.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert c.step == 0
    assert not c.optimizer.state


def test_a_step_that_a_scaler_skips_is_none():
    c = controller(optimizer=lambda tensors: torch.optim.Adam(tensors, fused=True))
    register(c.optimizer, c)
    c.layers[0].v0.grad = torch.ones(1)
    c.optimizer.found_inf = torch.tensor(1.0)
    c.optimizer.step()
    assert c.step == 0
    c.optimizer.found_inf = torch.tensor(0.0)
    c.optimizer.step()
    assert c.step == 1


@pytest.mark.weekly  # every run: tests/contracts/test_two_processes.py
def test_what_is_born_stays_equal_on_two_processes(tmp_path):
    run_pair(Path(__file__).parents[1] / "lowrank/growing_pair.py", tmp_path)
    verdicts = json.loads((tmp_path / "verdicts.json").read_text())
    assert len(verdicts) == 9
    assert {k: v for k, v in verdicts.items() if v != "same"} == {}
