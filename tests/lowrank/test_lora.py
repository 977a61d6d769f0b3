"""What only LoRA must satisfy: its gradients, its rank, its scale and its two routes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from toolkit import LoRA, adapt
from toolkit.core.adapt.sites import describe

M, N, RANK, ALPHA = 7, 5, 3, 6.0  # rows, columns, rank, and a scale of 2


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def adapted_layer(method: LoRA, random: bool = True):
    """A float64 layer of shape (M, N) with LoRA on it; both factors random if asked."""
    base = nn.Sequential(nn.Linear(N, M)).double()
    with torch.no_grad():
        base[0].weight.copy_(draw(M, N, seed=6))  # the same base at every call
        base[0].bias.copy_(draw(M, seed=7))
    adapted = adapt(base, method, generator=generator(1))
    layer = adapted.adapters["0"]
    if random:
        with torch.no_grad():
            layer.B.copy_(draw(*layer.B.shape, seed=2))
    return adapted, layer


def test_the_start_is_the_base_bit_for_bit() -> None:
    base = nn.Sequential(nn.Linear(N, 16), nn.ReLU(), nn.Linear(16, M))
    x = torch.randn(9, N)
    before = base(x)
    adapted = adapt(base, LoRA(rank=RANK))
    assert torch.equal(adapted(x), before)
    assert all(torch.count_nonzero(a.B) == 0 for a in adapted.adapters.values())


def test_A_is_drawn_from_the_uniform_law_of_the_code() -> None:
    wide = adapt(nn.Sequential(nn.Linear(400, 300)), LoRA(rank=64), generator=generator())
    A = wide.adapters["0"].A
    bound = 1 / math.sqrt(400)
    assert A.abs().max() <= bound
    assert A.abs().max() > 0.99 * bound  # a Gaussian of this spread would go beyond
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert A.mean().item() == pytest.approx(0, abs=0.02 * bound)


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_gradients_follow_from_the_gradient_of_the_merged_weight(rank_stabilised: bool) -> None:
    method = LoRA(rank=RANK, alpha=ALPHA, rank_stabilised=rank_stabilised)
    adapted, layer = adapted_layer(method)
    x, y = draw(11, N, seed=3), draw(11, M, seed=4)
    F.mse_loss(adapted(x), y).backward()

    base = adapted.sites["0"].layer.base
    A, B, s = layer.A.detach(), layer.B.detach(), method.scale
    W = (base.weight + s * B @ A).detach().requires_grad_()
    (G,) = torch.autograd.grad(F.mse_loss(F.linear(x, W, base.bias), y), W)
    torch.testing.assert_close(layer.A.grad, s * B.T @ G, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(layer.B.grad, s * G @ A.T, rtol=1e-12, atol=1e-14)
    assert G.abs().max() > 1e-3


def test_at_the_start_only_B_has_a_gradient() -> None:
    adapted, layer = adapted_layer(LoRA(rank=RANK), random=False)
    F.mse_loss(adapted(draw(11, N)), draw(11, M, seed=4)).backward()
    assert torch.count_nonzero(layer.A.grad) == 0
    assert torch.count_nonzero(layer.B.grad) == layer.B.numel()


def test_one_small_step_moves_the_weight_as_the_first_order_formula_says() -> None:
    method = LoRA(rank=RANK, alpha=ALPHA)
    x, y = draw(11, N, seed=3), draw(11, M, seed=4)
    errors = []
    for rate in (1e-3, 1e-4):
        adapted, layer = adapted_layer(method)
        base, s = adapted.sites["0"].layer.base, method.scale
        before = layer.merged(base)["weight"].detach()
        A, B = layer.A.detach().clone(), layer.B.detach().clone()
        W = before.clone().requires_grad_()
        (G,) = torch.autograd.grad(F.mse_loss(F.linear(x, W, base.bias), y), W)
        optimizer = torch.optim.SGD(adapted.parameters(), lr=rate)
        F.mse_loss(adapted(x), y).backward()
        optimizer.step()
        moved = layer.merged(base)["weight"].detach() - before
        expected = -rate * s**2 * (B @ B.T @ G + G @ A.T @ A)
        errors.append((moved - expected).norm().item())
    assert errors[1] < 1.1e-2 * errors[0]  # what is left falls with the square of the rate
    assert errors[1] < 1e-3 * expected.norm().item()


def test_full_rank_represents_any_difference() -> None:
    target = draw(M, N, seed=5)
    adapted, layer = adapted_layer(LoRA(rank=min(M, N), alpha=float(min(M, N))), random=False)
    base = adapted.sites["0"].layer.base
    optimizer = torch.optim.LBFGS(adapted.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (layer.merged(base)["weight"] - target).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    assert loss().item() < 1e-6


def test_a_smaller_rank_cannot_do_better_than_the_best_approximation() -> None:
    adapted, layer = adapted_layer(LoRA(rank=2, alpha=2.0), random=False)
    base = adapted.sites["0"].layer.base
    difference = draw(M, N, seed=5)
    target = base.weight.detach() + difference
    optimizer = torch.optim.LBFGS(adapted.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (layer.merged(base)["weight"] - target).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    best = torch.linalg.svdvals(difference)[2:].square().sum().item()
    assert best > 1  # Eckart-Young: the directions left out
    assert loss().item() == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_rank_of_the_difference_is_at_most_r(rank: int) -> None:
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9)).double()
    base = copy.deepcopy(model)
    adapted = adapt(model, LoRA(rank=rank), generator=generator())
    optimizer = torch.optim.Adam(adapted.parameters(), lr=0.02)
    x, y = draw(40, 12), draw(40, 9, seed=1)
    for _ in range(20):
        optimizer.zero_grad()
        F.mse_loss(adapted(x), y).backward()
        optimizer.step()
    merged = adapted.merge()
    for name in (0, 2):
        difference = (merged[name].weight - base[name].weight).detach()
        values = torch.linalg.svdvals(difference)
        assert values[rank - 1] > 1e-4  # all r directions are in use
        assert values[rank] < 1e-12 * values[0]


def test_counted_numbers_equal_the_sum_of_r_times_m_plus_n() -> None:
    model = nn.Sequential(nn.Linear(12, 20), nn.Conv2d(4, 6, 3), nn.Linear(20, 9))
    adapted = adapt(model, LoRA(rank=4), targets=[nn.Linear, nn.Conv2d])
    expected = 4 * ((12 + 20) + (6 + 4 * 9) + (20 + 9))
    assert sum(p.numel() for p in adapted.parameters()) == expected == adapted.costs()["trained"]
    counts = [adapted.method.count(site.site) for site in adapted.sites.values()]
    assert counts == [4 * 32, 4 * 42, 4 * 29]


def test_merge_agrees_with_the_branch_and_unmerge_restores() -> None:
    adapted, layer = adapted_layer(LoRA(rank=RANK, alpha=ALPHA))
    W = adapted.sites["0"].layer.base.weight.detach().clone()
    x = draw(11, N, seed=3)
    beside = adapted(x)
    merged = adapted.merge()
    assert type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged(x), beside, rtol=0, atol=1e-12)
    torch.testing.assert_close(merged[0].weight - W, layer.delta(), rtol=0, atol=1e-12)
    adapted.unmerge()
    torch.testing.assert_close(adapted.sites["0"].layer.base.weight, W, rtol=0, atol=1e-12)
    torch.testing.assert_close(adapted(x), beside, rtol=0, atol=1e-12)


def test_a_second_merge_is_refused_and_adds_nothing() -> None:
    adapted, _ = adapted_layer(LoRA(rank=RANK))
    W = adapted.merge()[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"already merged.*unmerge"):
        adapted.merge()
    assert torch.equal(adapted.model[0].weight, W)


def test_eval_does_not_merge() -> None:
    adapted, _ = adapted_layer(LoRA(rank=RANK))
    base = adapted.sites["0"].layer.base
    W = base.weight.detach().clone()
    adapted.model.eval()
    assert torch.equal(base.weight, W)
    assert adapted.state == "adapted"


def test_dropout_acts_on_the_branch_only() -> None:
    adapted, layer = adapted_layer(LoRA(rank=RANK, dropout=0.5))
    base, x = adapted.sites["0"].layer.base, draw(2000, N, seed=3)
    torch.manual_seed(0)
    branch = adapted(x) - base(x)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)
    torch.testing.assert_close(branch, dropped @ layer.delta().T)
    assert (dropped == 0).double().mean().item() == pytest.approx(0.5, abs=0.02)

    with torch.no_grad():
        layer.B.zero_()
    assert torch.equal(adapted(x), base(x))  # the base path sees all of x, in training too
    with torch.no_grad():
        layer.B.copy_(draw(M, RANK, seed=2))
    adapted.model.eval()
    torch.testing.assert_close(adapted(x), adapted.sites["0"].layer.materialised(x))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_weight_and_bias_stay_bit_identical(optimizer: type) -> None:
    adapted, layer = adapted_layer(LoRA(rank=RANK))
    base = adapted.sites["0"].layer.base
    W, bias = base.weight.detach().clone(), base.bias.detach().clone()
    first = layer.A.detach().clone()
    descent = optimizer(adapted.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(3):
        descent.zero_grad()
        F.mse_loss(adapted(draw(11, N, seed=step)), draw(11, M, seed=9)).backward()
        descent.step()
    assert torch.equal(base.weight, W)
    assert torch.equal(base.bias, bias)
    assert base.bias.grad is None
    assert not base.bias.requires_grad
    assert not torch.equal(layer.A, first)


@pytest.mark.parametrize(("rank", "alpha"), [(1, 16.0), (4, 16.0), (8, 2.0)])
def test_the_scale_is_applied_once(rank: int, alpha: float) -> None:
    plain = LoRA(rank=rank, alpha=alpha)
    stable = LoRA(rank=rank, alpha=alpha, rank_stabilised=True)
    assert plain.scale == alpha / rank
    assert stable.scale == pytest.approx(alpha / math.sqrt(rank))
    for method in (plain, stable):
        adapted = adapt(nn.Sequential(nn.Linear(9, 8)).double(), method, generator=generator())
        layer, base = adapted.adapters["0"], adapted.sites["0"].layer.base
        with torch.no_grad():
            layer.B.copy_(draw(8, rank))
        x = draw(3, 9, seed=1)
        expected = F.linear(x, base.weight + method.scale * layer.B @ layer.A, base.bias)
        torch.testing.assert_close(adapted(x), expected)
        torch.testing.assert_close(adapted.merge()(x), expected)


def test_scale_and_rate_are_one_setting_under_sgd() -> None:
    """(s, rate, A, B) and (c s, rate / c, A / sqrt c, B / sqrt c) visit the same weights."""
    c, x, y, merged = 4.0, draw(20, N, seed=3), draw(20, M, seed=4), []
    for factor in (1.0, c):
        adapted, layer = adapted_layer(LoRA(rank=RANK, alpha=ALPHA * factor))
        with torch.no_grad():
            layer.A /= math.sqrt(factor)
            layer.B /= math.sqrt(factor)
        descent = torch.optim.SGD(adapted.parameters(), lr=0.02 / factor)
        for _ in range(10):
            descent.zero_grad()
            F.mse_loss(adapted(x), y).backward()
            descent.step()
        merged.append(layer.delta().detach())
    torch.testing.assert_close(merged[0], merged[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=r"rank must lie in \[1"):
        LoRA(rank=rank)


@pytest.mark.parametrize("rank", [2.0, "4", True])
def test_a_rank_that_is_no_whole_number_is_refused(rank: object) -> None:
    with pytest.raises(TypeError, match="rank must be int"):
        LoRA(rank=rank)


@pytest.mark.parametrize(
    "setting",
    [{"alpha": 0.0}, {"alpha": -1.0}, {"alpha": math.nan}, {"dropout": 1.0}, {"dropout": -0.1}],
)
def test_other_settings_outside_their_range_are_refused(setting: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        LoRA(**setting)


def test_a_rank_larger_than_the_layer_is_taken_as_given_with_a_warning() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 5))
    with pytest.warns(UserWarning, match=r"rank 8 .*'1'.*at most 5"):
        adapted = adapt(model, LoRA(rank=8))
    assert adapted.adapters["1"].B.shape == (5, 8)


def test_a_module_without_a_matrix_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot be adapted"):
        adapt(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), LoRA(rank=1), targets=nn.LayerNorm)
    with pytest.raises(TypeError, match="no weight matrix"):
        describe(nn.ReLU(), "act")


def test_a_tied_weight_is_merged_for_its_own_layer_with_a_warning() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    adapted = adapt(model, LoRA(rank=2), targets=["0"])
    nn.init.normal_(adapted.adapters["0"].B)
    shared = model[1].weight.detach().clone()
    with pytest.warns(UserWarning, match="share their weight"):
        adapted.merge()
    assert torch.equal(model[1].weight, shared)
    assert not torch.equal(model[0].weight, shared)
