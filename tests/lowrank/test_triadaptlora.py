"""What only TriAdaptLoRA must satisfy: core, starts, growth, score, schedule."""

from __future__ import annotations

import copy
import dataclasses
import math
from itertools import accumulate

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import toolkit
from toolkit import LoRA, TriAdaptLoRA, adapt
from toolkit.core.adapt.sites import describe
from toolkit.core.adapt.steps.orthogonality import orthogonality
from toolkit.labs.lowrank import triadaptlora as lab
from toolkit.lowrank.triadaptlora.triangular import modules_to_grow, planned

DOUBLE = torch.float64
INITS = ("zero_core", "identity", "gaussian")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=DOUBLE)


def network(dtype: torch.dtype = DOUBLE) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 6))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(draw(*p.shape, seed=i) / 2)
    return model.to(dtype)


# three layers, ranks 1 -> 9 in all, looks at 3, 5, 7, ... in 20 steps
METHOD = TriAdaptLoRA(target_rank=3, block=1, warmup=2, interval=2, alpha=6.0)

LATE = dataclasses.replace(METHOD, warmup=15, total_rank=4)  # no look in the first 16 steps


def attached(method: TriAdaptLoRA = METHOD, total_steps: int = 20, lr: float = 0.02, **options):
    """A small adapted network in float64 with Adam, its optimizer, and its step function."""
    adapted = adapt(network(), method, generator=generator(1))
    optimizer = torch.optim.Adam(adapted.parameters(), lr=lr)
    adapted.attach(optimizer, total_steps=total_steps, **options)
    x, y = draw(16, 9, seed=2), draw(16, 6, seed=3)

    def step() -> None:
        optimizer.zero_grad()
        (adapted(x) - y).square().mean().backward()
        optimizer.step()

    return adapted, optimizer, step


def lone(method: TriAdaptLoRA, widths=(), m: int = 12, n: int = 11):
    """One layer of shape (m, n) in float64, grown by ``widths``, every number random."""
    adapted = adapt(nn.Sequential(nn.Linear(n, m)).double(), method, generator=generator(1))
    layer = adapted.adapters["0"]
    for width in widths:
        layer.grow(width)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(draw(*p.shape, seed=10 + i))
    return adapted, layer


def stacks(layer) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, n) and B (m, r), without graph."""
    A, B = layer.blocks("A"), layer.blocks("B")
    return torch.cat(A).detach(), torch.cat(B, 1).detach()


def placed(layer) -> torch.Tensor:
    """The core by definition, entry by entry."""
    r, C, ends = layer.rank, torch.zeros(layer.rank, layer.rank, dtype=DOUBLE), [0]
    ends += accumulate(layer.widths)
    for i, c in enumerate(layer.widths):
        L, U = (layer.get_parameter(f"{k}{i}").detach() for k in "LU")
        for a in range(c):
            for b in range(ends[i + 1]):
                C[ends[i] + a, b] += L[a, b]
                C[b, ends[i] + a] += U[b, a]
    assert ends[-1] == r
    return C


# --- one layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(), (1, 1, 1, 1), (2,), (3, 1, 2)])
@pytest.mark.parametrize("first", [1, 2])
def test_core_is_block_placement_and_the_difference_a_triple_loop(first, widths):
    method = TriAdaptLoRA(init_rank=first, target_rank=8, alpha=4.0)
    _, layer = lone(method, widths)
    C = placed(layer)
    torch.testing.assert_close(layer.core(), C, rtol=0, atol=1e-12)
    A = np.concatenate([layer.get_parameter(f"A{i}").detach() for i in range(len(layer.widths))], 0)
    B = np.concatenate([layer.get_parameter(f"B{i}").detach() for i in range(len(layer.widths))], 1)
    want = np.zeros((12, 11))
    for j in range(12):
        for k in range(11):
            for a in range(layer.rank):
                for b in range(layer.rank):
                    want[j, k] += B[j, a] * C[a, b].item() * A[b, k]
    np.testing.assert_allclose(layer.delta().detach(), 4.0 / 8 * want, atol=1e-12)


def test_core_of_width_one_blocks_is_a_lower_plus_an_upper_triangle():
    _, layer = lone(TriAdaptLoRA(), (1, 1, 1, 1))
    L, U = torch.zeros(5, 5, dtype=DOUBLE), torch.zeros(5, 5, dtype=DOUBLE)
    for i in range(5):
        L[i, : i + 1] = layer.get_parameter(f"L{i}").detach()[0]
        U[: i + 1, i] = layer.get_parameter(f"U{i}").detach()[:, 0]
    assert torch.equal(L.tril(), L)
    assert torch.equal(U.triu(), U)
    torch.testing.assert_close(layer.core(), L + U)


def test_the_diagonal_moves_twice_as_fast_as_the_rest_under_sgd():
    _, layer = lone(TriAdaptLoRA(), (1, 1))
    G = draw(3, 3, seed=7)
    (layer.core() * G).sum().backward()
    with torch.no_grad():
        before = layer.core()
        for p in layer.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
        moved = layer.core() - before
    torch.testing.assert_close(moved, -0.1 * G * (1 + torch.eye(3, dtype=DOUBLE)))


def test_gradients_are_those_of_the_product():
    adapted, layer = lone(TriAdaptLoRA(target_rank=4, alpha=8.0), (2, 1))
    x, y = draw(5, 11, seed=3), draw(5, 12, seed=4)
    (adapted(x) * y).sum().backward()
    G = y.T @ x  # gradient with respect to the weight
    A, B = stacks(layer)
    C, s = layer.core().detach(), 8.0 / 4
    dC = s * B.T @ G @ A.T
    ends = list(accumulate(layer.widths))
    for i, (c, e) in enumerate(zip(layer.widths, ends, strict=True)):
        block = slice(e - c, e)
        grads = {k: layer.get_parameter(f"{k}{i}").grad for k in "ABLU"}
        torch.testing.assert_close(grads["L"], dC[block, :e])
        torch.testing.assert_close(grads["U"], dC[:e, block])
        torch.testing.assert_close(grads["A"], (s * C.T @ B.T @ G)[block])
        torch.testing.assert_close(grads["B"], (s * G @ A.T @ C.T)[:, block])


def test_merged_equals_unmerged_after_growth():
    adapted, layer = lone(TriAdaptLoRA(), (2, 1))
    x = draw(4, 11, seed=5)
    before = adapted(x).detach()
    base = adapted.sites["0"].layer.base
    torch.testing.assert_close(layer.merged(base)["weight"], base.weight + layer.delta())
    torch.testing.assert_close(adapted.merge()(x), before, rtol=1e-12, atol=1e-12)


def test_numbers_are_counted_by_the_formula_at_the_start_and_after_growth():
    method = TriAdaptLoRA(init_rank=2)
    adapted, layer = lone(method)
    assert method.count(adapted.sites["0"].site) == 2 * (12 + 11) + 2 * 2 * 2
    assert sum(p.numel() for p in layer.parameters()) == 2 * 23 + 8
    for width in (1, 3, 2):
        layer.grow(width)
    formula = 8 * 23 + 2 * (2 * 2 + 1 * 3 + 3 * 6 + 2 * 8)
    assert sum(p.numel() for p in layer.parameters()) == formula
    assert formula < 8 * 23 + 2 * 8 * 8  # what the author's files report


# --- starts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
def test_every_start_is_the_base_and_can_learn(init):
    adapted = adapt(network(), dataclasses.replace(METHOD, init=init), generator=generator())
    x, y = draw(8, 9), draw(8, 6, seed=1)
    assert torch.equal(adapted(x), network()(x))
    asleep = {name for name, _ in adapted.named_parameters()}
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = (adapted(x) - y).square().mean()
        losses.append(loss.item())
        loss.backward()
        asleep -= {n for n, p in adapted.named_parameters() if p.grad.any()}
        optimizer.step()
    assert not asleep
    assert losses[1] < losses[0]


@pytest.mark.parametrize("init", ["abc0", "cb0"])
def test_the_dead_starts_are_refused_and_the_reason_is_given(init):
    with pytest.raises(ValueError, match=rf"init='{init}'.*never learn.*B and C, are 0.*zero_core"):
        TriAdaptLoRA(init=init)


def test_the_dead_starts_are_dead():
    """What the refusal says: with B = C = 0 no gradient ever comes, whatever A is."""
    adapted = adapt(network(), dataclasses.replace(METHOD, init="identity"), generator=generator())
    with torch.no_grad():
        for layer in adapted.adapters.values():
            for k in "BLU":
                layer.get_parameter(f"{k}0").zero_()
    optimizer = torch.optim.Adam(adapted.parameters(), lr=0.1)
    before = [p.detach().clone() for p in adapted.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        (adapted(draw(8, 9)) - 1).square().mean().backward()
        assert all(p.grad.abs().max() == 0 for p in adapted.parameters())
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, adapted.parameters(), strict=True))


def test_zero_core_starts_with_a_gradient_of_the_core_alone():
    adapted = adapt(network(), METHOD, generator=generator())
    adapted(draw(8, 9)).square().sum().backward()
    for layer in adapted.adapters.values():
        assert layer.core().abs().max() == 0
        assert layer.L0.grad.all()
        assert torch.equal(layer.L0.grad, layer.U0.grad)
        assert not layer.A0.grad.any()
        assert not layer.B0.grad.any()


@pytest.mark.parametrize(
    ("init", "first", "later"),
    [("zero_core", "AB", "AB"), ("identity", "A", "A"), ("gaussian", "ALU", "ABLU")],
)
def test_what_is_drawn_has_standard_deviation_0_02_and_the_rest_is_constant(init, first, later):
    method = TriAdaptLoRA(init=init, init_rank=40, target_rank=80)
    layer = adapt(nn.Sequential(nn.Linear(300, 250)), method, generator=generator()).adapters["0"]
    layer.grow(40)
    for i, random in enumerate((first, later)):
        for k in "ABLU":
            t = layer.get_parameter(f"{k}{i}").detach()
            if k in random:
                assert t.std().item() == pytest.approx(0.02, rel=0.06), f"{k}{i}"
                assert abs(t.mean().item()) < 1.5e-3, f"{k}{i}"
            elif init == "identity" and k in "LU":
                assert torch.equal(t, torch.eye(*t.shape)), f"{k}{i}"
            else:
                assert not t.any(), f"{k}{i}"


def test_identity_blocks_of_later_growth_lie_off_the_diagonal():
    layer = adapt(nn.Sequential(nn.Linear(9, 9)), TriAdaptLoRA(init="identity")).adapters["0"]
    layer.grow(1)
    assert layer.core().tolist() == [[2.0, 1.0], [1.0, 0.0]]


def test_blocks_differ_between_layers_and_repeat_under_a_seed():
    drawn = []
    for seed in (1, 1, 2):
        adapted = adapt(
            nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)),
            TriAdaptLoRA(),
            generator=generator(seed),
        )
        for layer in adapted.adapters.values():
            layer.grow(2)
        drawn.append([p.detach().clone() for p in adapted.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not torch.equal(drawn[0][0], drawn[2][0])
    half = len(drawn[0]) // 2
    assert not torch.equal(drawn[0][0], drawn[0][half])  # A0 of the two layers
    first, later = drawn[0][0], drawn[0][4]  # A0 and A1 of one layer
    assert not torch.isin(first, later).any()


# --- growing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 3])
def test_growth_leaves_the_product_and_the_output_alone(width):
    adapted, layer = lone(TriAdaptLoRA(), (2,))
    x = draw(5, 11, seed=8)
    before, product = adapted(x).detach(), layer.delta().detach() / layer.scale
    layer.grow(width)
    torch.testing.assert_close(layer.delta() / layer.scale, product, rtol=0, atol=1e-12)
    torch.testing.assert_close(adapted(x), before, rtol=0, atol=1e-12)
    assert layer.rank == 3 + width


def test_dividing_by_the_current_rank_shrinks_what_was_learned():
    _, layer = lone(TriAdaptLoRA(rescale="rank", alpha=5.0), (1,))
    assert layer.scale == pytest.approx(5.0 / (2 + 1e-5))
    before = layer.delta().detach()
    layer.grow(3)
    torch.testing.assert_close(layer.delta(), before * (2 + 1e-5) / (5 + 1e-5))


def test_the_constant_factor_is_two_at_every_rank():
    _, layer = lone(TriAdaptLoRA(rescale="constant", alpha=5.0), (1, 2))
    A, B = stacks(layer)
    torch.testing.assert_close(layer.delta(), 2 * B @ layer.core() @ A)


@pytest.mark.parametrize("init", ["identity", "gaussian"])
def test_growth_of_the_other_starts_changes_the_output(init):
    adapted, layer = lone(TriAdaptLoRA(init=init))
    x = draw(5, 11, seed=8)
    before = adapted(x).detach()
    layer.grow(1)
    assert (adapted(x) - before).abs().max() > 1e-3


def test_growth_touches_neither_old_tensors_nor_their_adam_state():
    adapted, optimizer, step = attached()
    seen = 0
    for _ in range(20):
        state = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
        values = {n: (p, p.detach().clone()) for n, p in adapted.named_parameters()}
        ranks, grow = adapted.controller.ranks(), adapted.controller.grow

        def growing(*growth, grow=grow, state=state, values=values):
            state.update(
                {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
            )
            values.update({n: (p, p.detach().clone()) for n, p in adapted.named_parameters()})
            grow(*growth)

        adapted.controller.grow = growing
        step()
        adapted.controller.grow = grow
        if adapted.controller.ranks() == ranks:
            continue
        seen += 1
        now = dict(adapted.named_parameters())
        for name, (p, value) in values.items():
            assert now[name] is p
            assert torch.equal(p, value)
            assert all(torch.equal(v, optimizer.state[p][k]) for k, v in state[p].items())
        born = [p for n, p in now.items() if n not in values]
        assert born
        assert not any(p in optimizer.state and optimizer.state[p] for p in born)
        assert all(
            sum(p is q for group in optimizer.param_groups for q in group["params"]) == 1
            for p in now.values()
        )
    assert seen >= 3


def test_new_blocks_follow_the_rate_of_the_old_and_do_not_decay():
    adapted = adapt(network(), METHOD, generator=generator(1))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.3, weight_decay=0.4)
    adapted.attach(optimizer, total_steps=20)
    for _ in range(12):
        optimizer.zero_grad()
        adapted(draw(4, 9)).square().mean().backward()
        optimizer.step()
    filled = [g for g in optimizer.param_groups[1:] if g["params"]]
    assert filled
    assert all(g["weight_decay"] == 0 for g in filled)
    born = filled[0]["params"][0]
    optimizer.param_groups[0]["lr"] = 0.05
    optimizer.zero_grad()
    adapted(draw(4, 9)).square().mean().backward()
    adapted.controller.add_penalty()
    grad, before = born.grad.clone(), born.detach().clone()
    adapted.controller.add_penalty = lambda: None
    optimizer.step()
    torch.testing.assert_close(born.detach(), before - 0.05 * grad)


def test_given_draws_are_taken():
    _, layer = lone(TriAdaptLoRA(), (1,))
    draws = {"A": draw(2, 11), "B": draw(12, 2), "L": draw(2, 4), "U": draw(4, 2)}
    new = layer.grow(2, draws)
    assert {k: tuple(p.shape) for k, p in new.items()} == {
        "A2": (2, 11), "B2": (12, 2), "L2": (2, 4), "U2": (4, 2)
    }  # fmt: skip
    for k, t in draws.items():
        assert torch.equal(new[f"{k}2"], t)
        assert new[f"{k}2"].data_ptr() != t.data_ptr()


def test_growth_that_does_not_fit_is_refused():
    _, layer = lone(TriAdaptLoRA())
    with pytest.raises(ValueError, match=r"'0' cannot grow by 11.*12 x 11.*grow by 1 to 10"):
        layer.grow(11)
    with pytest.raises(ValueError, match="cannot grow by 0"):
        layer.grow(0)
    with pytest.raises(
        ValueError, match=r"draws of layer '0': L has shape \(2, 2\).*'L': \(1, 2\)"
    ):
        layer.grow(1, {"L": draw(2, 2)})
    assert layer.rank == 1


# --- the score -----------------------------------------------------------------------------------


def test_the_score_is_the_rise_of_the_norm_per_block():
    adapted, _, step = attached(LATE)
    for _ in range(3):
        step()
    controller = adapted.controller
    want = [layer.core().norm().item() / 1 for layer in controller.layers]
    assert controller.measure().tolist() == pytest.approx(want)
    for layer in controller.layers:
        layer.grow(2)
    assert controller.measure().tolist() == pytest.approx([w / 2 for w in want])


def scores_of(controller) -> list[float]:
    """What the next look would rank by."""
    return (controller.measure() - controller.norms).tolist()


def test_a_tripled_core_scores_twice_its_old_norm_and_an_unchanged_one_0():
    adapted, _, step = attached(LATE)
    for _ in range(3):
        step()
    controller = adapted.controller
    controller.norms = controller.measure()
    assert scores_of(controller) == [0.0, 0.0, 0.0]
    old = controller.norms[1].item()
    with torch.no_grad():
        controller.layers[1].L0.mul_(3)
        controller.layers[1].U0.mul_(3)
    assert scores_of(controller) == pytest.approx([0.0, 2 * old, 0.0])


def test_the_score_does_not_see_rotations():
    adapted, _, _ = attached(TriAdaptLoRA(init_rank=4, target_rank=5, block=1))
    controller, layer = adapted.controller, adapted.adapters["2"]
    with torch.no_grad():
        layer.L0.copy_(draw(4, 4))
        before = controller.measure()
        left, right = (torch.linalg.qr(draw(4, 4, seed=s))[0] for s in (1, 2))
        layer.L0.copy_(left @ layer.L0 @ right)
    torch.testing.assert_close(controller.measure(), before)


def test_a_layer_that_just_grew_is_held_back():
    """The author's divisor counts blocks, so growth itself lowers the next score below 0."""
    adapted, _, step = attached(LATE)
    for _ in range(3):
        step()
    controller = adapted.controller
    controller.norms = controller.measure()
    controller.layers[0].grow(1)
    F = controller.norms[0].item()
    assert scores_of(controller) == pytest.approx([-F / 2, 0.0, 0.0])


@pytest.mark.parametrize("init", INITS)
def test_the_norm_before_the_first_look_is_that_of_the_start(init):
    adapted, _, _ = attached(dataclasses.replace(METHOD, init=init))
    want = [layer.core().norm() for layer in adapted.adapters.values()]
    torch.testing.assert_close(adapted.controller.norms, torch.stack(want).detach())
    assert (adapted.controller.norms.max() == 0) == (init == "zero_core")
    assert not adapted.controller.norms.requires_grad


def test_looks_rank_by_the_score_and_remember_the_norms_of_all():
    adapted, _, step = attached()
    controller = adapted.controller
    while not controller.allocating:
        step()
    before, start = controller.norms.clone(), controller.ranks()
    seen = []
    grow = controller.grow
    controller.grow = lambda *growth: (seen.append(controller.measure()), grow(*growth))
    step()
    rise = seen[0] - before
    grown = [r - start[n] for n, r in controller.ranks().items()]
    assert sum(grown) == 1
    assert grown[int(rise.argmax())] == 1
    torch.testing.assert_close(controller.norms, seen[0], rtol=0, atol=0)


def test_a_scorer_replaces_the_score():
    adapted, _, step = attached(scorer=lambda controller: [0.0, 0.0, 5.0])
    for _ in range(20):
        step()
    # the last layer takes all until its matrix is full, then the ties go in order
    assert adapted.controller.ranks() == {"0": 2, "2": 1, "4": 6}


def test_random_growth_by_a_scorer():
    source = generator(4)
    adapted, _, step = attached(scorer=lambda c: torch.rand(len(c.layers), generator=source))
    for _ in range(20):
        step()
    assert adapted.controller.total == 9


# --- the schedule --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "z", "growth", "count", "want"),
    [
        (30, 0.5, "linear", 100, 15),
        (30, 0.5, "exponential", 100, 5),
        (30, 0.37, "linear", 100, 11),
        (30, 0.37, "exponential", 100, 3),
        (30, 1e-9, "linear", 100, 1),
        (30, 1e-9, "exponential", 100, 1),
        (30, 1.0, "linear", 100, 30),
        (30, 1.0, "exponential", 100, 30),
        (30, 1.0, "linear", 12, 12),
        (30, 1.0, "exponential", 12, 12),
        (1, 0.5, "exponential", 9, 1),
        (5, 1.0, "exponential", 9, 5),
        (0, 0.5, "linear", 9, 0),
        (0, 0.5, "exponential", 9, 0),
        (-3, 0.5, "exponential", 9, 0),
    ],
)
def test_modules_to_grow_by_hand(missing, z, growth, count, want):
    assert modules_to_grow(missing, z, growth, count) == want


def test_exponential_growth_is_the_exponential_of_the_logarithm():
    for missing in range(1, 60):
        for z in (0.13, 0.41, 0.77):
            want = int(np.exp(z * np.log(missing)))
            assert modules_to_grow(missing, z, "exponential", 1000) == max(want, 1)


@pytest.mark.parametrize("growth", ["linear", "exponential"])
@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("total_rank", [None, 10])
def test_totals_end_at_the_target_and_no_layer_passes_its_limit(growth, block, total_rank):
    method = TriAdaptLoRA(
        target_rank=4, total_rank=total_rank, block=block, growth=growth, warmup=1, interval=2
    )
    adapted, _, step = attached(method, total_steps=40)
    target = total_rank or 12
    totals = []
    for _ in range(40):
        step()
        totals.append(adapted.controller.total)
        assert sum(p.numel() for p in adapted.parameters()) == sum(
            layer.rank * (layer.site.rows + layer.site.cols)
            + 2 * sum(c * e for c, e in zip(layer.widths, accumulate(layer.widths), strict=True))
            for layer in adapted.adapters.values()
        )
    assert totals[-1] == target
    assert totals == sorted(totals)
    assert all(layer.rank <= layer.limit for layer in adapted.adapters.values())
    plan = planned(3, target, 3, block=block, growth=growth, warmup=1, interval=2, total_steps=40)
    if block < 4:  # no ties, and no layer that is too full to take a whole block
        assert totals == plan
    assert plan[-1] == target


def test_growth_falls_on_the_looks():
    adapted, _, step = attached()
    when = []
    for t in range(20):
        before = adapted.controller.total
        step()
        if adapted.controller.total > before:
            when.append(t)
    assert when
    assert all(t > 2 and t % 2 == 0 for t in when)
    assert [record.step for record in adapted.controller.history[1:]] == when


def test_the_plan_has_no_look_at_the_end_of_the_warmup_itself():
    plan = planned(3, 9, 3, block=1, growth="linear", warmup=4, interval=2, total_steps=20)
    assert plan[:7] == [3, 3, 3, 3, 3, 3, 4]


def test_the_plan_tells_linear_from_exponential_where_much_is_missing():
    options = {"block": 1, "warmup": 0, "interval": 10, "total_steps": 1000}
    linear = planned(16, 64, 16, growth="linear", **options)
    exponential = planned(16, 64, 16, growth="exponential", **options)
    assert linear[-1] == exponential[-1] == 64
    # 48 z is far above 48^z in the middle of the way
    assert sum(linear) > sum(exponential) + 1000
    assert linear.index(64) < exponential.index(64)


def test_the_official_rule_passes_the_target_and_ours_meets_it():
    method = TriAdaptLoRA(total_rank=8, block=3, target_rank=4, interval=1)
    ends = []
    for overshoot in (False, True):
        adapted, _, step = attached(dataclasses.replace(method, overshoot=overshoot))
        for _ in range(20):
            step()
        ends.append(adapted.controller.total)
    assert ends == [8, 9]


def test_ties_all_grow_in_the_official_rule():
    method = TriAdaptLoRA(total_rank=4, target_rank=4, block=1, overshoot=True)
    adapted, _, step = attached(method, scorer=lambda c: [1.0, 1.0, 1.0])
    for _ in range(3):
        step()
    assert adapted.controller.ranks() == {"0": 2, "2": 2, "4": 2}
    adapted, _, step = attached(
        dataclasses.replace(method, overshoot=False), scorer=lambda c: [1.0, 1.0, 1.0]
    )
    for _ in range(3):
        step()
    assert adapted.controller.ranks() == {"0": 2, "2": 1, "4": 1}


def test_half_of_the_target_is_the_block_unless_given():
    assert [TriAdaptLoRA(target_rank=r).step_rank for r in (1, 2, 3, 8)] == [1, 1, 1, 4]
    assert TriAdaptLoRA(block=3).step_rank == 3


def test_nothing_grows_after_the_end_and_asking_is_refused():
    adapted, _, step = attached()
    for _ in range(24):
        step()
    assert adapted.controller.total == 9
    with pytest.raises(RuntimeError, match="total_steps=20"):
        adapted.controller.grow([1, 0, 0])


# --- the penalty ---------------------------------------------------------------------------------


def test_the_step_uses_gamma_times_the_penalty_on_the_stacked_factors():
    adapted = adapt(
        network(), dataclasses.replace(METHOD, orthogonality=0.3), generator=generator()
    )
    for layer in adapted.adapters.values():
        layer.grow(2)
    with torch.no_grad():
        for i, p in enumerate(adapted.parameters()):
            p.copy_(draw(*p.shape, seed=i))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1.0)
    adapted.attach(optimizer, total_steps=20)
    pairs = [
        (torch.cat(layer.blocks("B"), 1), torch.cat(layer.blocks("A")))
        for layer in adapted.adapters.values()
    ]
    torch.testing.assert_close(adapted.controller.penalty(), orthogonality(pairs))
    loss = adapted(draw(6, 9)).square().mean()
    total = loss + 0.3 * orthogonality(pairs)
    want = torch.autograd.grad(total, adapted.parameters(), retain_graph=True)
    start = [p.detach().clone() for p in adapted.parameters()]
    loss.backward()
    optimizer.step()
    for p, old, g in zip(adapted.parameters(), start, want, strict=True):
        torch.testing.assert_close(p.detach(), old - g)


def test_without_the_penalty_gradients_are_left_alone():
    adapted = adapt(
        network(), dataclasses.replace(METHOD, orthogonality=0.0), generator=generator()
    )
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1.0)
    adapted.attach(optimizer, total_steps=20)
    adapted(draw(6, 9)).square().mean().backward()
    before = [p.grad.clone() for p in adapted.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(adapted.parameters(), before, strict=True))


# --- going on, and going wrong -------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"restart": True}, {"rescale": "rank"}], ids=str)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, options):
    """Saved in the middle of growth, with Adam's moments and a scheduler, bit for bit."""
    method = dataclasses.replace(METHOD, **options)
    x, y = draw(16, 9, seed=2), draw(16, 6, seed=3)

    def start(adapted):
        optimizer = torch.optim.Adam(adapted.parameters(), lr=0.02)
        adapted.attach(optimizer, total_steps=20)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 25)
        return optimizer, scheduler

    def train(adapted, optimizer, scheduler, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (adapted(x) - y).square().mean().backward()
            optimizer.step()
            scheduler.step()

    whole = adapt(network(), method, generator=generator(1))
    train(whole, *start(whole), 20)
    first = adapt(network(), method, generator=generator(1))
    optimizer, scheduler = start(first)
    train(first, optimizer, scheduler, 9)
    assert 3 < first.controller.total < 9
    first.save(tmp_path / "half.safetensors", resume=True)
    moments, clock = copy.deepcopy(optimizer.state_dict()), scheduler.state_dict()
    second = toolkit.load(network(), tmp_path / "half.safetensors")
    optimizer, scheduler = start(second)
    optimizer.load_state_dict(moments)
    scheduler.load_state_dict(clock)
    assert second.controller.step == 9
    assert torch.equal(second.controller.norms, first.controller.norms)
    train(second, optimizer, scheduler, 11)
    assert second.controller.ranks() == whole.controller.ranks()
    pd.testing.assert_frame_equal(second.controller.table(), whole.controller.table())
    ours, theirs = dict(second.named_parameters()), dict(whole.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_that_passed_its_target_is_resumed(tmp_path):
    method = TriAdaptLoRA(total_rank=8, block=3, target_rank=4, overshoot=True)
    adapted, _, step = attached(method)
    for _ in range(9):
        step()
    assert adapted.controller.total == 9
    adapted.save(tmp_path / "a.safetensors", resume=True)
    again = toolkit.load(network(), tmp_path / "a.safetensors")
    again.attach(torch.optim.Adam(again.parameters()), total_steps=20)
    assert again.controller.target == 8
    assert again.controller.total == 9
    assert not again.controller.allocating


def test_grown_adapters_are_saved_loaded_and_take_on_any_widths(tmp_path):
    adapted, _, step = attached()
    for _ in range(20):
        step()
    adapted.save(tmp_path / "a.safetensors")
    again = toolkit.load(network(), tmp_path / "a.safetensors")
    x = draw(5, 9)
    torch.testing.assert_close(again(x), adapted(x), rtol=0, atol=0)
    layer, other = adapted.adapters["0"], lone(METHOD, (3, 1), m=8, n=9)[1]
    other.resize(layer.state_dict())
    assert other.widths == layer.widths
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other.delta(), layer.delta(), rtol=0, atol=0)
    fewer = lone(METHOD, m=8, n=9)[1]
    other.resize(fewer.state_dict())
    assert [name for name, _ in other.named_parameters()] == ["A0", "B0", "L0", "U0"]
    other.load_state_dict(fewer.state_dict())
    torch.testing.assert_close(other.delta(), fewer.delta(), rtol=0, atol=0)


def test_the_core_follows_its_layer_to_another_dtype_and_a_copy():
    _, layer = lone(METHOD, (2,))
    twin = copy.deepcopy(layer).to(torch.float32)
    torch.testing.assert_close(twin.core(), layer.core().float())
    twin.grow(1)
    assert twin.A2.dtype == torch.float32
    assert layer.rank == 3
    assert twin.rank == 4
    assert twin.to("meta").where.device.type == "meta"  # the index travels with the blocks


def test_total_steps_must_be_given():
    adapted = adapt(network(), METHOD)
    optimizer = torch.optim.Adam(adapted.parameters())
    with pytest.raises(ValueError, match=r"total_steps=T"):
        adapted.attach(optimizer)
    assert adapted.controller is None
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("warmup", [20, 25])
def test_a_warmup_that_leaves_no_step_is_refused(warmup):
    with pytest.raises(ValueError, match=rf"warmup={warmup}.*total_steps=20"):
        attached(dataclasses.replace(METHOD, warmup=warmup))


def test_a_schedule_that_ends_below_the_target_is_refused():
    with pytest.raises(ValueError, match=r"interval=15.*block=1.*add up to 6 of the 9 wanted"):
        attached(dataclasses.replace(METHOD, interval=15))
    attached(dataclasses.replace(METHOD, interval=15, block=2))


def test_a_target_below_the_start_is_refused():
    with pytest.raises(ValueError, match=r"target_rank=2.*init_rank=3"):
        TriAdaptLoRA(init_rank=3, target_rank=2)
    with pytest.raises(ValueError, match=r"2 ranks in all is below the 3"):
        attached(dataclasses.replace(METHOD, total_rank=2))


def test_a_target_above_what_the_matrices_hold_is_refused():
    with pytest.raises(ValueError, match=r"30 ranks in all is above the 21"):
        attached(dataclasses.replace(METHOD, total_rank=30))


def test_a_target_equal_to_the_start_never_grows():
    adapted, _, step = attached(dataclasses.replace(METHOD, total_rank=3))
    for _ in range(20):
        step()
    assert adapted.controller.ranks() == {"0": 1, "2": 1, "4": 1}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("growth", "quadratic"),
        ("init", "zeros"),
        ("rescale", "sqrt"),
        ("block", 0),
        ("init_rank", 0),
        ("interval", 0),
        ("warmup", -1),
        ("alpha", 0.0),
        ("orthogonality", -1.0),
        ("dropout", 1.0),
    ],
)
def test_bad_values_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        TriAdaptLoRA(**{name: value})


def test_an_initial_rank_above_the_layer_is_taken_with_a_warning_and_never_grows():
    method = TriAdaptLoRA(init_rank=7, block=1, total_rank=22)
    with pytest.warns(UserWarning, match=r"rank 7 .*'4'.*at most 6"):
        adapted = adapt(network(), method, generator=generator())
    optimizer = torch.optim.Adam(adapted.parameters())
    adapted.attach(optimizer, total_steps=20)
    assert adapted.controller.rooms() == [1, 0, 0]
    for _ in range(3):
        optimizer.zero_grad()
        adapted(draw(4, 9)).square().mean().backward()
        optimizer.step()
    assert adapted.controller.ranks() == {"0": 8, "2": 7, "4": 7}
    for site in adapted.sites.values():
        fresh = method.build(site.site, generator())
        assert sum(p.numel() for p in fresh.parameters()) == method.count(site.site)


def test_a_step_before_any_gradient_is_refused_and_changes_nothing():
    adapted, optimizer, _ = attached()
    before = [p.detach().clone() for p in adapted.parameters()]
    with pytest.raises(RuntimeError, match="backward"):
        optimizer.step()
    assert adapted.controller.step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, adapted.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_at_a_look_is_refused_and_changes_nothing():
    adapted, optimizer, step = attached()
    while not adapted.controller.allocating:
        step()
    adapted(draw(2, 9)).sum().backward()
    adapted.adapters["2"].B0.grad[0, 0] = float("nan")
    before = [p.detach().clone() for p in adapted.parameters()]
    with pytest.raises(FloatingPointError, match=r"'2\.B0'"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, adapted.parameters(), strict=True))


def test_a_core_that_is_not_finite_grows_nothing():
    adapted, _, step = attached()
    while not adapted.controller.allocating:
        step()
    controller = adapted.controller
    with torch.no_grad():
        adapted.adapters["4"].L0.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"'4'.*nothing has grown"):
        controller.look()
    assert controller.total == 3


def test_gradients_that_a_scaler_left_scaled_are_refused():
    adapted, optimizer, _ = attached()
    adapted(draw(2, 9)).sum().backward()
    optimizer.grad_scale = torch.tensor(1024.0)
    with pytest.raises(RuntimeError, match="unscale_"):
        optimizer.step()


def test_a_scheduler_that_exists_already_is_refused():
    adapted = adapt(network(), METHOD)
    optimizer = torch.optim.Adam(adapted.parameters())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
    with pytest.raises(ValueError, match=r"build the scheduler after attach"):
        adapted.attach(optimizer, total_steps=20)


def test_an_optimizer_without_weight_decay_is_accepted():
    adapted = adapt(network(), METHOD, generator=generator())
    optimizer = torch.optim.Rprop(adapted.parameters(), lr=0.01)
    for group in optimizer.param_groups:
        group.pop("weight_decay", None)
    optimizer.defaults.pop("weight_decay", None)
    adapted.attach(optimizer, total_steps=20)
    assert len(optimizer.param_groups) > 1


def test_equals_lora_with_the_core_folded_in():
    ours, theirs = network(), network()
    tri = adapt(ours, TriAdaptLoRA(init_rank=3, target_rank=3, alpha=6.0), generator=generator())
    lora = adapt(theirs, LoRA(rank=3, alpha=6.0))
    with torch.no_grad():
        for i, p in enumerate(tri.parameters()):
            p.copy_(draw(*p.shape, seed=i))
        for name, layer in tri.adapters.items():
            B, CA = layer.factors()
            lora.adapters[name].A.copy_(CA)
            lora.adapters[name].B.copy_(B)
    x = draw(5, 9)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_report_says_rank_and_blocks():
    adapted, _, step = attached()
    for _ in range(20):
        step()
    report = adapted.report().set_index("layer")
    assert report["rank"].to_dict() == adapted.controller.ranks()
    assert (report["blocks"] == report["rank"]).all()  # blocks of width 1
    site = describe(nn.Linear(9, 8))
    assert math.isclose(METHOD.count(site), 17 + 2)


def test_the_labs_square_core_is_a_trained_square_matrix():
    square = lab.SquareCore(target_rank=3, block=1, orthogonality=0.0)
    layer = adapt(nn.Sequential(nn.Linear(6, 5)), square).adapters["0"]
    layer.grow(1)
    layer.grow(1)
    plain = nn.Parameter(torch.zeros(3, 3))
    ours = torch.optim.Adam([*layer.blocks("L"), *layer.blocks("U")], lr=0.1)
    theirs = torch.optim.Adam([plain], lr=0.1)
    target = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        for optimizer, core in ((ours, layer.core()), (theirs, plain)):
            optimizer.zero_grad()
            (core - target).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(layer.core(), plain)


def test_the_lab_counts_the_planted_pieces_that_ranks_can_hold():
    assert lab.held([2] * 5) == 50.0
    assert lab.held([1, 5, 1, 2, 1]) == 87.5
    assert lab.held([9, 0, 9, 0, 9]) == 0.0


def test_the_lab_grows_by_need_and_at_once():
    right, all_at_once = (
        lab.planted_grown(arm, 10, 1e-2, seed=0, steps=12) for arm in ("right", "everywhere")
    )
    assert right["ranks"] == [1, 6, 1, 1, 1]
    assert all_at_once["ranks"] == [2] * 5
    assert all_at_once["path"][:5] == [1] * 5
    assert all_at_once["path"][5:10] == [2] * 5
