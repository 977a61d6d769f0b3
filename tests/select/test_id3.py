"""ID3: counts, bits that stay, choices equal to a plain dense loop, resume, and refusals."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

import toolkit
from toolkit import ID3, LoRA, adapt
from toolkit.select.id3 import choice
from toolkit.select.id3.tensors import put, unmask

STEPS = 6


def network(dtype: torch.dtype = torch.float64, bias: bool = False) -> nn.Sequential:
    generator = torch.Generator().manual_seed(1)
    layers = (
        nn.Linear(6, 9, bias=bias), nn.Tanh(), nn.Linear(9, 7, bias=bias), nn.Tanh(),
        nn.Linear(7, 4, bias=bias),
    )  # fmt: skip
    model = nn.Sequential(*layers).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def batch(number: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + number)
    x = torch.randn(10, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(10, 4, generator=generator, dtype=torch.float64).to(dtype)


def loss(model: nn.Module, number: int) -> Tensor:
    x, y = batch(number, next(model.parameters()).dtype)
    return (model(x) - y).square().mean()


def sgd(ps, **more):
    return torch.optim.SGD(ps, **{"lr": 0.1, **more})


def momentum(ps):
    return sgd(ps, momentum=0.9)


def adamw(ps):
    return torch.optim.AdamW(ps, lr=0.05, weight_decay=0.3)


def plain(
    make,
    budget: int,
    total: int,
    exponent: float,
    epsilon: float,
    steps: int = 0,
    bias=False,
    schedule: list[int] | None = None,
    sign: int = -1,
    model: nn.Module | None = None,
) -> tuple[nn.Module, list[set]]:
    """The card's loop in the plainest words, dense: (model, sets of what was unmasked by then)."""
    model = network(bias=bias) if model is None else model
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer, free, history = make(names.values()), set(), []
    every, more = divmod(budget, total)
    schedule = schedule or [every + (t < more) for t in range(total)]
    for t in range(steps or total):
        optimizer.zero_grad()
        loss(model, t).backward()
        ranked = [
            (float(p.grad.view(-1)[i].abs() / (p.view(-1)[i].abs() + epsilon) ** exponent), n, i)
            for n, p in names.items()
            for i in range(p.numel())
            if (n, i) not in free
        ]
        ranked.sort(key=lambda row: sign * row[0])
        join = schedule[t] if t < total else 0
        free |= {(n, i) for _, n, i in ranked[:join]}
        history.append(set(free))
        before = {n: p.detach().clone() for n, p in names.items()}
        masks = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in names.items()}
        for n, i in free:
            masks[n].view(-1)[i] = True
        for n, p in names.items():
            p.grad *= masks[n]
        optimizer.step()
        with torch.no_grad():  # weight decay reaches the unmasked only
            for n, p in names.items():
                p.copy_(torch.where(masks[n], p, before[n]))
    return model, history


def run(method: ID3, make, total: int = STEPS, steps: int = 0, model=None, **options):
    adapted = adapt(network() if model is None else model, method)
    optimizer = make(adapted.parameters())
    adapted.attach(optimizer, total_steps=total, **options)
    history = [advance(adapted, optimizer, t) for t in range(steps or total)]
    return adapted, optimizer, history


def advance(adapted, optimizer, number: int) -> set:
    optimizer.zero_grad()
    loss(adapted.model, number).backward()
    optimizer.step()
    return entries(adapted)


def entries(adapted) -> set:
    return {
        (f"{name}.weight", int(i)) for name, layer in adapted.adapters.items() for i in layer.index
    }


def weights(adapted) -> dict[str, Tensor]:
    return {
        f"{name}.weight": placed.layer.adapter.merged(placed.layer.base)["weight"].detach()
        for name, placed in adapted.sites.items()
    }


def same(adapted, model: nn.Module, tolerance: float = 1e-12) -> None:
    for name, value in weights(adapted).items():
        expected = model.get_parameter(name).detach()
        torch.testing.assert_close(value, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("make", [sgd, momentum, adamw])
@pytest.mark.parametrize(
    ("exponent", "epsilon"), [(0.0, 1e-3), (1.0, 1.0), (2.0, 0.1), (-1.0, 0.0)]
)
def test_choices_and_weights_are_those_of_the_plain_dense_loop(make, exponent, epsilon):
    model, expected = plain(make, 20, STEPS, exponent, epsilon)
    method = ID3(budget=20, exponent=exponent, epsilon=epsilon)
    adapted, _, history = run(method, make)
    assert history == expected
    same(adapted, model)


SPENT = {  # 20 scalars in 6 steps, written out
    "uniform": [4, 4, 3, 3, 3, 3],
    "once": [20, 0, 0, 0, 0, 0],
    "back": [0, 2, 3, 3, 5, 7],
    "front": [7, 5, 3, 3, 2, 0],
}


@pytest.mark.parametrize("factors", [False, True], ids=["layers", "factors"])
@pytest.mark.parametrize(("order", "sign"), [("highest", -1), ("lowest", 1)])
@pytest.mark.parametrize("schedule", SPENT)
def test_both_orders_and_all_schedules_are_the_plain_dense_loop(schedule, order, sign, factors):
    method = ID3(budget=20, schedule=schedule, order=order)
    beside = {"schedule": SPENT[schedule], "sign": sign}
    if not factors:
        model, expected = plain(adamw, 20, STEPS, 1.0, 1.0, **beside)
        adapted, _, history = run(method, adamw)
        assert history == expected
        same(adapted, model)
        return
    pair = []
    for _ in range(2):
        adapted = adapt(network(), LoRA(rank=3), generator=torch.Generator().manual_seed(2))
        with torch.no_grad():  # else B = 0 and A has no gradient, a tie among all
            for p in adapted.parameters():
                p.add_(0.1)
        pair.append(adapted)
    model, expected = plain(adamw, 20, STEPS, 1.0, 1.0, model=pair[0].model, **beside)
    trained = {n: p for n, p in pair[1].model.named_parameters() if p.requires_grad}
    optimizer = adamw(trained.values())
    rule = unmask(method, trained, optimizer, STEPS)
    for t in range(STEPS):
        optimizer.zero_grad()
        loss(pair[1].model, t).backward()
        optimizer.step()
        found = {(n, int(i)) for n, m in rule.masks().items() for i in m.view(-1).nonzero()}
        assert found == expected[t]
    for name, p in trained.items():
        torch.testing.assert_close(p, model.get_parameter(name), rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [momentum, adamw])
def test_over_all_tensors_of_a_model_it_is_the_plain_dense_loop_too(make):
    expected, history = plain(make, 25, STEPS, 1.0, 0.1, bias=True)
    model = network(bias=True)
    optimizer = make(model.parameters())
    rule = unmask(ID3(budget=25, epsilon=0.1), model.named_parameters(), optimizer, STEPS)
    for t in range(STEPS):
        optimizer.zero_grad()
        loss(model, t).backward()
        optimizer.step()
        found = {(n, int(i)) for n, m in rule.masks().items() for i in m.view(-1).nonzero()}
        assert found == history[t]
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, expected.get_parameter(name), rtol=0, atol=1e-12)
    assert any("bias" in name for name, _ in history[-1])


@pytest.mark.parametrize(("budget", "total"), [(20, 6), (3, 5), (12, 4), (1, 3)])
def test_counts_are_exact_and_masks_only_grow(budget, total):
    adapted, _, history = run(ID3(budget=budget), adamw, total, steps=total + 2)
    controller = adapted.controller
    for t, found in enumerate(history):
        assert len(found) == sum(controller.plan[: t + 1])
    assert all(a <= b for a, b in itertools.pairwise(history))
    assert len(history[-1]) == budget == controller.chosen == adapted.costs()["trained"]
    assert controller.joined().sum(1).tolist() == controller.plan


@pytest.mark.parametrize("make", [sgd, momentum, adamw])
@pytest.mark.parametrize("strategy", ["increment", "repeat", "renew"])
def test_masked_scalars_keep_their_bits(make, strategy):
    base = network()
    adapted, _, _ = run(ID3(budget=20, strategy=strategy), make)
    chosen = entries(adapted)
    changed = {
        (name, int(i))
        for name, value in weights(adapted).items()
        for i in (value != base.get_parameter(name)).view(-1).nonzero()
    }
    assert changed <= chosen
    assert len(changed) > 10


def test_exponent_0_ranks_by_gradient_and_a_large_one_by_smallness():
    model = network()
    loss(model, 0).backward()
    flat = torch.cat([p.grad.view(-1).abs() for p in model.parameters()])
    small = torch.cat([p.detach().view(-1).abs() for p in model.parameters()])
    small[flat == 0] = math.inf
    for method, expected in (
        (ID3(budget=7, exponent=0.0), flat.topk(7).indices),
        (ID3(budget=7, exponent=60.0, epsilon=1e-12), (-small).topk(7).indices),
        (ID3(budget=7, score="magnitude"), (-small).topk(7).indices),
    ):
        adapted, _, _ = run(method, sgd, total=1)
        sizes = [p.numel() for p in model.parameters()]
        starts = [sum(sizes[:i]) for i in range(3)]
        pairs = zip(starts, adapted.adapters.values(), strict=True)
        found = torch.cat([layer.index + start for start, layer in pairs])
        assert set(found.tolist()) == set(expected.tolist())


@pytest.mark.parametrize("make", [momentum, adamw])
def test_the_whole_budget_in_one_step_is_a_step_of_the_optimizer(make):
    model = network()
    optimizer = make(model.parameters())
    loss(model, 0).backward()
    optimizer.step()
    adapted, _, _ = run(ID3(budget=sum(p.numel() for p in model.parameters())), make, total=1)
    same(adapted, model, 0.0)


def test_once_is_the_static_choice_and_costs_twice_the_updates():
    total, budget = 10, 20
    adapted, _, history = run(ID3(budget=budget, schedule="once"), adamw, total)
    assert all(found == history[0] for found in history)
    assert adapted.controller.updates == total * budget
    grown, _, _ = run(ID3(budget=budget), adamw, total)
    assert grown.controller.updates == (total + 1) * budget // 2


@pytest.mark.parametrize(("budget", "total"), [(7, 3), (100, 13), (2, 9), (5, 1)])
def test_every_schedule_spends_the_budget(budget, total):
    plans = {s: choice.planned(s, budget, total) for s in ("uniform", "front", "back", "once")}
    for plan in plans.values():
        assert sum(plan) == budget
        assert len(plan) == total
        assert min(plan) >= 0
    assert plans["front"] == plans["back"][::-1]
    if budget > total > 1:
        assert plans["front"][0] > plans["uniform"][0] > plans["back"][0]
    assert sorted(plans["uniform"], reverse=True) == plans["uniform"]


def test_a_given_schedule_is_followed_or_refused():
    _, _, history = run(ID3(budget=9), sgd, 3, schedule=[4, 0, 5])
    assert [len(found) for found in history] == [4, 4, 9]
    for wrong in ([4, 5], [4, 0, 4], [10, 0, -1]):
        with pytest.raises(ValueError, match=r"schedule.*budget=9"):
            run(ID3(budget=9), sgd, 3, schedule=wrong)


def test_ties_join_in_order_and_nobody_leaves():
    scores = [torch.ones(4), torch.full((3,), choice.LEFT_OUT), torch.ones(5)]
    found = choice.highest(scores, 6)
    assert [f.tolist() for f in found] == [[0, 1, 2, 3], [], [0, 1]]
    scores[2][4] = 2.0
    assert [f.tolist() for f in choice.highest(scores, 3)] == [[0, 1], [], [4]]
    assert sum(map(len, choice.highest(scores, 50))) == 9  # fewer where fewer can join

    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False))
    for p in model.parameters():
        nn.init.ones_(p)
    adapted = adapt(model, ID3(budget=8))
    optimizer = sgd(adapted.parameters(), lr=0.0)
    adapted.attach(optimizer, total_steps=4)
    seen: set = set()
    for t in range(4):
        optimizer.zero_grad()
        adapted(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        assert seen <= entries(adapted)
        seen = entries(adapted)
        assert len(seen) == 2 * (t + 1)


@pytest.mark.parametrize("line", [choice.LEFT_OUT, 0.5, 3.0, 100.0])
def test_a_guess_of_the_line_changes_nothing(line):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(50, generator=generator) * 4 for _ in range(3)]
    expected = set(torch.cat(scores).topk(11).indices.tolist())
    found = choice.highest(scores, 11, line)
    assert {50 * i + int(j) for i, own in enumerate(found) for j in own} == expected
    assert choice.line_of(scores, found) == float(torch.cat(scores).topk(11).values.min())


def test_what_lasts_has_the_length_of_the_choice():
    adapted, optimizer, _ = run(ID3(budget=20), adamw)
    for layer in adapted.adapters.values():
        state = optimizer.state[layer.values]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == layer.index.shape
        assert layer.values.grad.shape == layer.index.shape
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(p.grad is None for p in held if p.dim() == 2)
    assert {id(p) for p in adapted.parameters()} <= {id(p) for p in held}
    assert len(optimizer.state) == len(adapted.adapters)
    costs = adapted.costs()
    assert costs["changed"] == 20
    assert costs["stored_bytes"] == 20 * (8 + 8)


def test_a_file_gives_the_outputs_back_and_its_size_is_that_of_the_choice(tmp_path):
    wide = nn.Sequential(nn.Linear(300, 300, bias=False))
    adapted = adapt(copy.deepcopy(wide), ID3(budget=40))
    optimizer = adamw(adapted.parameters())
    adapted.attach(optimizer, total_steps=2)
    x = torch.randn(8, 300)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(x).square().mean().backward()
        optimizer.step()
    adapted.save(tmp_path / "a.safetensors")
    loaded = toolkit.load(wide, tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(x), adapted(x))
    assert (tmp_path / "a.safetensors").stat().st_size < 3000 < 300 * 300 * 4


@pytest.mark.parametrize("strategy", ["increment", "repeat"])
@pytest.mark.parametrize("clock", ["run", "own"])
def test_a_resumed_run_is_the_same_run(tmp_path, strategy, clock):
    method = ID3(budget=20, strategy=strategy, clock=clock, score="random")
    whole, _, _ = run(method, adamw)
    half, optimizer, _ = run(method, adamw, steps=3)
    half.save(tmp_path / "half.safetensors", resume=True)
    kept = copy.deepcopy(optimizer.state_dict())
    again = toolkit.load(network(), tmp_path / "half.safetensors")
    optimizer = adamw(again.parameters())
    again.attach(optimizer, total_steps=STEPS)
    optimizer.load_state_dict(kept)
    for t in range(3, STEPS):
        advance(again, optimizer, t)
    for name, value in weights(again).items():
        assert torch.equal(value, weights(whole)[name])
    assert again.controller.updates == whole.controller.updates
    assert torch.equal(again.controller.joined(), whole.controller.joined())


def test_a_state_dict_loaded_into_an_attached_model_goes_on():
    whole, _, _ = run(ID3(budget=20), adamw)
    half, optimizer, _ = run(ID3(budget=20), adamw, steps=3)
    again = adapt(network(), ID3(budget=20))
    other = adamw(again.parameters())
    again.attach(other, total_steps=STEPS)
    again.model.load_state_dict(half.model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for t in range(3, STEPS):
        advance(again, other, t)
    for name, value in weights(again).items():
        assert torch.equal(value, weights(whole)[name])


@pytest.mark.parametrize(("strategy", "distinct"), [("repeat", None), ("renew", 30)])
def test_repeat_freezes_what_it_leaves_where_it_stands(strategy, distinct):
    adapted = adapt(network(), ID3(budget=30, strategy=strategy))
    optimizer = adamw(adapted.parameters())
    adapted.attach(optimizer, total_steps=STEPS)
    before, known = weights(adapted), set()
    for t in range(STEPS):
        found = advance(adapted, optimizer, t)
        after = weights(adapted)
        moved = {(n, int(i)) for n in after for i in (after[n] != before[n]).view(-1).nonzero()}
        assert len(moved) == adapted.controller.plan[t] == 5
        assert known <= found
        before, known = after, found
    assert 5 < len(known) <= 30
    assert len(known) == (distinct or len(known))
    for layer, pool in zip(
        adapted.adapters.values(), adapted.controller.pools.values(), strict=True
    ):
        assert not optimizer.state[layer.values]["exp_avg"][~pool.moves].any()


@pytest.mark.parametrize("strategy", ["repeat", "renew"])
def test_over_whole_tensors_repeat_chooses_the_same(strategy):
    method = ID3(budget=30, strategy=strategy)
    adapted, _, history = run(method, adamw)
    model = network()
    optimizer = adamw(model.parameters())
    rule = unmask(method, model.named_parameters(), optimizer, STEPS)
    for t in range(STEPS):
        optimizer.zero_grad()
        loss(model, t).backward()
        optimizer.step()
        found = {(n, int(i)) for n, m in rule.masks().items() for i in m.view(-1).nonzero()}
        assert found == history[t]
    same(adapted, model)


def test_the_whole_budget_at_every_step_changes_more_than_the_budget():
    adapted, _, _ = run(ID3(budget=20, strategy="repeat", schedule="every"), adamw)
    assert adapted.controller.updates == STEPS * 20
    assert adapted.controller.chosen > 20


def test_micro_batches_rank_by_their_sum():
    def accumulated(parts: int):
        adapted = adapt(network(), ID3(budget=20))
        optimizer = adamw(adapted.parameters())
        adapted.attach(optimizer, total_steps=STEPS)
        for t in range(STEPS):
            optimizer.zero_grad()
            for part in range(parts):
                x, y = (each.chunk(parts)[part] for each in batch(t))
                ((adapted(x) - y).square().mean() / parts).backward()
            optimizer.step()
        return adapted

    whole, parts = accumulated(1), accumulated(2)
    assert entries(whole) == entries(parts)
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(parts)[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("to_none", [True, False])
def test_a_backward_pass_that_was_thrown_away_leaves_nothing(to_none):
    adapted = adapt(network(), ID3(budget=20))
    optimizer = adamw(adapted.parameters())
    adapted.attach(optimizer, total_steps=STEPS)
    for t in range(STEPS):
        (1e6 * loss(adapted.model, 50 + t)).backward()
        optimizer.zero_grad(set_to_none=to_none)
        loss(adapted.model, t).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
    expected, _, _ = run(ID3(budget=20), adamw)
    assert entries(adapted) == entries(expected)
    for name, value in weights(adapted).items():
        torch.testing.assert_close(value, weights(expected)[name], rtol=0, atol=1e-12)


def test_scaled_gradients_are_unscaled_before_they_join():
    model = network(torch.float32)
    expected, _, _ = run(ID3(budget=20), momentum, model=copy.deepcopy(model))
    adapted = adapt(model, ID3(budget=20))
    optimizer = momentum(adapted.parameters())
    adapted.attach(optimizer, total_steps=STEPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in [-1, *range(STEPS)]:
        optimizer.zero_grad()
        value = loss(adapted.model, t) * (float("inf") if t < 0 else 1)
        scaler.scale(value).backward()
        scaler.step(optimizer)  # left out while gradients overflow
        scaler.update()
    assert adapted.controller.step == STEPS
    assert entries(adapted) == entries(expected)
    for name, value in weights(adapted).items():
        torch.testing.assert_close(value, weights(expected)[name])


def test_numbers_that_are_not_finite_are_refused_by_name_and_change_nothing():
    adapted = adapt(network(), ID3(budget=20))
    optimizer = adamw(adapted.parameters())
    adapted.attach(optimizer, total_steps=STEPS)
    advance(adapted, optimizer, 0)
    before, chosen = weights(adapted), entries(adapted)
    optimizer.zero_grad()
    (loss(adapted.model, 1) * float("nan")).backward()
    with pytest.raises(FloatingPointError, match=r"gradient of '0.*step 1"):
        optimizer.step()
    assert entries(adapted) == chosen
    assert all(torch.equal(value, before[name]) for name, value in weights(adapted).items())
    advance(adapted, optimizer, 1)
    assert adapted.controller.chosen == sum(adapted.controller.plan[:2])


def test_a_layer_that_the_loss_does_not_reach_is_no_candidate():
    model = nn.ModuleDict({"used": nn.Linear(6, 4), "idle": nn.Linear(6, 4)})
    adapted = adapt(model, ID3(budget=4))
    optimizer = adamw(adapted.parameters())
    adapted.attach(optimizer, total_steps=2)
    for t in range(2):
        optimizer.zero_grad()
        x, y = batch(t, torch.float32)
        (model["used"](x) - y).square().mean().backward()
        optimizer.step()
    assert len(adapted.adapters["used"].index) == 4
    assert not len(adapted.adapters["idle"].index)


class OwnAdam:
    """Adam with a step count per scalar, in the plainest words."""

    def __init__(self, lr: float, decay: float):
        self.lr, self.decay, self.known = lr, decay, {}

    def step(self, key, value: float, gradient: float) -> float:
        s, m, v = self.known.get(key, (0, 0.0, 0.0))
        s, m, v = s + 1, 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        self.known[key] = s, m, v
        root = math.sqrt(v / (1 - 0.999**s)) + 1e-8
        return value * (1 - self.lr * self.decay) - self.lr * (m / (1 - 0.9**s)) / root


@pytest.mark.parametrize("tensors", [False, True])
def test_the_own_clock_is_adam_with_a_count_per_scalar(tensors):
    method, model = ID3(budget=20, clock="own"), network()
    adapted = None if tensors else adapt(model, method)
    optimizer = adamw((adapted or model).parameters())
    if adapted is None:
        rule = unmask(method, model.named_parameters(), optimizer, STEPS)
    else:
        adapted.attach(optimizer, total_steps=STEPS)

    def now() -> dict[str, Tensor]:
        return weights(adapted) if adapted else {n: p.detach() for n, p in model.named_parameters()}

    copied, reference = network(), OwnAdam(0.05, 0.3)
    for t in range(STEPS):
        optimizer.zero_grad()
        loss(model, t).backward()
        optimizer.step()
        copied.zero_grad()
        loss(copied, t).backward()
        chosen = (
            entries(adapted) if adapted
            else {(n, int(i)) for n, m in rule.masks().items() for i in m.view(-1).nonzero()}
        )  # fmt: skip
        for n, i in chosen:
            p = copied.get_parameter(n)
            with torch.no_grad():
                new = reference.step((n, i), float(p.view(-1)[i]), float(p.grad.view(-1)[i]))
                p.view(-1)[i] = new
        for n, value in now().items():
            torch.testing.assert_close(value, copied.get_parameter(n), rtol=0, atol=1e-10)


def test_a_late_scalar_makes_a_first_step_that_is_larger_under_the_clock_of_the_run():
    def first_move(clock: str) -> float:
        method = ID3(budget=2, clock=clock)
        adapted = adapt(network(), method)
        optimizer = torch.optim.Adam(adapted.parameters(), lr=1e-3)
        adapted.attach(optimizer, total_steps=300, schedule=[1, *[0] * 298, 1])
        for t in range(300):
            before = weights(adapted)
            known = entries(adapted)
            advance(adapted, optimizer, t % 5)
        ((name, i),) = entries(adapted) - known
        return float((weights(adapted)[name] - before[name]).view(-1)[i].abs()) / 1e-3

    assert first_move("own") == pytest.approx(1.0, abs=1e-3)
    exact = 0.1 / math.sqrt(0.001 / (1 - 0.999**300))  # what is left of the correction
    assert first_move("run") == pytest.approx(exact, rel=1e-3)
    assert exact > 1.6


def test_on_loras_factors(tmp_path):
    adapted = adapt(network(), LoRA(rank=3), generator=torch.Generator().manual_seed(2))
    start = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    optimizer = adamw(adapted.parameters())
    rule = unmask(ID3(budget=24), adapted.named_parameters(), optimizer, STEPS)
    for t in range(STEPS):
        optimizer.zero_grad()
        loss(adapted.model, t).backward()
        optimizer.step()
        masks = rule.masks()
        assert sum(int(m.sum()) for m in masks.values()) == sum(rule.plan[: t + 1])
    now = dict(adapted.named_parameters())
    for name, mask in masks.items():
        assert torch.equal(now[name][~mask], start[name][~mask])
        assert not optimizer.state[now[name]]["exp_avg"][~mask].any()
    assert sum(int((now[n] != start[n]).sum()) for n in now) > 20
    other = adapt(network(), LoRA(rank=3), generator=torch.Generator().manual_seed(2))
    put(dict(other.named_parameters()), rule.entries())
    x, _ = batch(0)
    assert torch.equal(other(x), adapted(x))
    with pytest.raises(ValueError, match="fit no tensor"):
        put({}, rule.entries())
    rule.remove()
    optimizer.step()
    assert sum(int((now[n] != start[n]).sum()) for n in now) > 60  # decay reaches all again


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": 0}, r"budget must lie in \[1"),
        ({"budget": -3}, "budget"),
        ({"share": 0.0}, "share"),
        ({"share": 1.0}, "share"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"exponent": math.nan}, "exponent"),
        ({"schedule": "sometimes"}, "schedule"),
        ({"schedule": "every"}, r"strategy='repeat'"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        ID3(**settings)


def test_runs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"budget=1000.* 145 scalars"):
        run(ID3(budget=1000), sgd)
    for total in (None, 0, -2):
        adapted = adapt(network(), ID3(budget=3))
        with pytest.raises(ValueError, match="total_steps"):
            adapted.attach(sgd(adapted.parameters()), total_steps=total)
        assert len(adapted.parameters()) == 3
    with pytest.raises(ValueError, match=r"clock='own'.*SGD"):
        run(ID3(budget=3, clock="own"), sgd)
    adapted = adapt(network(), ID3(budget=3))
    optimizer = sgd(adapted.parameters())
    adapted.attach(optimizer, total_steps=3)
    with pytest.raises(RuntimeError, match="backward"):
        optimizer.step()


def test_tensors_that_cannot_be_chosen_from_are_refused():
    model = network()
    optimizer = sgd(model.parameters())
    with pytest.raises(ValueError, match="no tensor"):
        unmask(ID3(budget=3), {}, optimizer, 3)
    with pytest.raises(ValueError, match="optimizer holds none"):
        unmask(ID3(budget=3), {"x": nn.Parameter(torch.zeros(3))}, optimizer, 3)
    with pytest.raises(ValueError, match="requires_grad"):
        unmask(ID3(budget=3), {"x": nn.Parameter(torch.zeros(3), False)}, optimizer, 3)


def test_a_schedule_of_another_length_is_refused(tmp_path):
    half, _, _ = run(ID3(budget=20), adamw, steps=3)
    state = half.controller.state()
    other = adapt(network(), ID3(budget=20))
    other.attach(adamw(other.parameters()), total_steps=STEPS)
    with pytest.raises(ValueError, match="the same file"):
        other.controller.load(state)


def test_copies_start_unattached_and_taking_off_frees_the_optimizer():
    adapted, optimizer, _ = run(ID3(budget=20), adamw, steps=3)
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert all(layer.seen is None for layer in twin.adapters.values())
        again = adamw(twin.parameters())
        twin.attach(again, total_steps=STEPS)
        advance(twin, again, 3)
        assert twin.controller.step == 4
    adapted.unload()
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(p.dim() == 1 for p in held)


def test_a_state_never_holds_a_tensor_without_numbers(tmp_path):
    """Accelerate leaves such tensors out of its files, and cannot load them then."""
    adapted = adapt(network(), ID3(budget=1))
    optimizer = adamw(adapted.parameters())
    adapted.attach(optimizer, total_steps=STEPS)
    assert all(value.numel() for value in adapted.model.state_dict().values())
    advance(adapted, optimizer, 0)
    state = adapted.model.state_dict()
    assert all(value.numel() for value in state.values())
    again = adapt(network(), ID3(budget=1))
    again.model.load_state_dict(state)
    same(again, adapted.merge(), 0.0)
    assert sum(p.numel() for p in again.parameters()) == 1


class Twice(torch.optim.SGD):
    """Perturbs the tensors and calls its closure twice."""

    def step(self, closure):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(1.01)
        closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(1.01)
        return closure()


def test_a_second_call_of_a_closure_is_refused_and_nothing_was_chosen():
    base = network()
    adapted = adapt(network(), ID3(budget=20))
    optimizer = Twice(adapted.parameters(), lr=0.1)
    adapted.attach(optimizer, total_steps=STEPS)
    with pytest.raises(RuntimeError, match="more than once"):
        optimizer.step(lambda: loss(adapted.model, 0).backward())
    assert entries(adapted) == set()
    same(adapted, base, 0.0)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in adapted.parameters()} <= held


def test_an_old_loss_that_is_still_held_does_no_harm():
    adapted = adapt(network(), ID3(budget=20))
    optimizer = adamw(adapted.parameters())
    adapted.attach(optimizer, total_steps=STEPS)
    held = []
    for t in range(STEPS):
        optimizer.zero_grad()
        held.append(loss(adapted.model, t))
        held[-1].backward()
        optimizer.step()
    expected, _, _ = run(ID3(budget=20), adamw)
    assert entries(adapted) == entries(expected)
