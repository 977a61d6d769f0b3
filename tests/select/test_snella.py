"""What only SNELLA must satisfy: kernels, competition in a layer and across layers, recomputing."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toolkit
from tests.contracts.contracts import CONTRACTS, check
from tests.contracts.rooms import ROOMS, Case
from toolkit import SNELL, SNELLA, LoRA, adapt
from toolkit.core.adapt.sites import describe
from toolkit.core.adapt.steps.budget import budget
from toolkit.select.snella.allocation import share_out
from toolkit.select.snella.competition import quantile, sparsify
from toolkit.select.snella.kernels import KERNELS, SCALARS, distances
from toolkit.select.snella.layer import KernelLayer

DOUBLE = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=DOUBLE).to(dtype)


def network(dtype: torch.dtype = DOUBLE) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(drawn(*p.shape, seed=len(p)) / 2)
    return model.to(dtype)


def run(method, steps: int, total: int | None = None, rate: float = 0.03, **options):
    """A small adapted network in float64 after some steps of Adam."""
    model = network()
    adapted = adapt(model, method, generator=generator(1))
    optimizer = torch.optim.Adam(adapted.parameters(), lr=rate)
    adapted.attach(optimizer, total_steps=total or steps, **options)
    x, y = drawn(16, 6, seed=2), drawn(16, 4, seed=3)
    for _ in range(steps):
        optimizer.zero_grad()
        (adapted(x) - y).square().mean().backward()
        optimizer.step()
    return adapted, optimizer


# --- kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(7, 5), (40, 30)])
def test_piecewise_kernel_is_the_written_sum(n, m):
    A, B, c = drawn(2, n, 3), drawn(2, m, 3, seed=1), torch.tensor([0.1, -0.1], dtype=DOUBLE)
    K = KERNELS["piecewise"](A, B, c)
    for j, i in ((0, 0), (n - 1, m - 1), (3, 2)):
        want = sum(c[p] * math.dist(A[p, j].tolist(), B[p, i].tolist()) for p in range(2))
        assert K[j, i].item() == pytest.approx(float(want), abs=1e-12)


def test_one_piece_is_a_scaled_matrix_of_distances():
    A, B = drawn(1, 7, 4), drawn(1, 5, 4, seed=1)
    K = KERNELS["piecewise"](A, B, torch.tensor([0.1], dtype=DOUBLE))
    torch.testing.assert_close(K, 0.1 * torch.cdist(A[0], B[0]))


def test_swapping_the_halves_of_both_factors_negates_the_kernel():
    A, B, c = drawn(2, 30, 3), drawn(2, 5, 3, seed=1), torch.tensor([0.1, -0.1], dtype=DOUBLE)
    one, other = KERNELS["piecewise"](A, B, c), KERNELS["piecewise"](A.flip(0), B.flip(0), c)
    torch.testing.assert_close(one, -other, rtol=0, atol=1e-15)


def test_mixed_kernel_takes_its_softmax_over_the_outputs():
    layer = build(SNELLA(rank=4), nn.Linear(7, 5))
    K = KERNELS["piecewise"](layer.A, layer.B, layer.c)
    with torch.no_grad():
        for name, value in (("alpha", 0.7), ("gamma", 1.3), ("beta", -0.2)):
            getattr(layer, name).fill_(value)
    rows = torch.stack([row + 0.7 * F.softmax(row / 1.3, dim=0) - 0.2 for row in K])
    torch.testing.assert_close(layer.change(), rows.T)
    assert {n: float(v) for n, v in SCALARS["mixed"].items()} == {"alpha": 1, "gamma": 1, "beta": 0}


def test_linear_kernel_is_lora():
    model, other = network(), network()
    ours = adapt(model, SNELL(rank=4, sparsity=0, kernel="linear"), generator=generator())
    theirs = adapt(other, LoRA(rank=4, alpha=4.0))
    with torch.no_grad():
        for name, layer in ours.adapters.items():
            theirs.adapters[name].A.copy_(layer.A.permute(0, 2, 1).flatten(0, 1))
            theirs.adapters[name].B.copy_(layer.B.transpose(0, 1).flatten(1))
    x = drawn(9, 6, seed=5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", ["sigmoid", "rbf"])
def test_the_other_kernels_are_their_formulas(kernel):
    layer = build(SNELL(rank=4, kernel=kernel, sparsity=0), nn.Linear(7, 5))
    A, B = (t.transpose(0, 1).flatten(1) for t in (layer.A, layer.B))
    alpha, beta, gamma = layer.alpha, layer.beta, layer.gamma
    if kernel == "sigmoid":
        want = alpha / (1 + torch.exp(-beta * (A @ B.T))) + gamma
    else:
        want = alpha * torch.exp(-beta * torch.cdist(A, B) ** 2) + gamma
    torch.testing.assert_close(layer.change(), want.T)


def test_distances_are_those_of_cdist_below_and_above_its_limit():
    for n, m in ((25, 25), (26, 3), (3, 26)):
        A, B = drawn(2, n, 4), drawn(2, m, 4, seed=1)
        torch.testing.assert_close(distances(A, B), torch.cdist(A, B))


def test_a_small_rank_gives_a_matrix_of_nearly_full_rank():
    layer = build(SNELL(rank=8, sparsity=0), nn.Linear(96, 96))
    assert torch.linalg.matrix_rank(layer.change()) >= 90
    layer = build(SNELL(rank=8, sparsity=0, kernel="linear"), nn.Linear(96, 96))
    assert torch.linalg.matrix_rank(layer.change()) == 8


def test_factors_start_within_kaimings_bound():
    layer = build(SNELLA(rank=32), nn.Linear(500, 300))
    for factor, rows in ((layer.A, 500), (layer.B, 300)):
        bound = 1 / math.sqrt(rows * 16)
        assert factor.shape == (2, rows, 16)
        assert bound * 0.99 < factor.abs().max().item() <= bound


def build(method, layer: nn.Linear, seed: int = 0) -> KernelLayer:
    return method.build(describe(layer.to(DOUBLE), "layer"), generator(seed))


# --- competition inside a layer ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("count", [1, 2, 10, 4096, 50_000])
def test_quantile_is_torchs_own(dtype, count):
    values = drawn(count, seed=count, dtype=dtype).abs()
    for share in (0.0, 0.1, 0.3, 0.5, 0.61, 0.9, 0.995, 1 - 1 / 3, 1.0):
        assert torch.equal(quantile(values, share), torch.quantile(values, share)), share


def test_quantile_takes_more_entries_than_torchs():
    values = torch.arange(2**24 + 9, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(values, 0.5)
    assert quantile(values, 0.5).item() == pytest.approx((2**24 + 8) / 2, abs=1)


@pytest.mark.parametrize("like", ["code", "paper", "hard"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.995])
def test_the_share_is_what_becomes_zero(like, share):
    change = drawn(30, 40)
    kept = sparsify(change, share, like)
    assert abs(int((kept != 0).sum()) - (1 - share) * 1200) <= 1
    gone = change.abs()[kept == 0]
    assert gone.max() < change.abs()[kept != 0].min()
    assert not sparsify(change, 1.0, like).any()


def test_what_is_kept_follows_each_formula():
    change = torch.tensor([[0.5, -0.2, 0.1, -1.0, 0.3]], dtype=DOUBLE)
    # the 0.6-quantile of 0.1 0.2 0.3 0.5 1.0 lies at place 2.4: 0.38
    zero = torch.zeros((), dtype=DOUBLE)
    for like, large, small in (("code", -1.0, 0.25), ("paper", -0.62, 0.06), ("hard", -1.0, 0.5)):
        got = sparsify(change, 0.6, like)[0]
        torch.testing.assert_close(got, torch.stack([
            torch.tensor(small, dtype=DOUBLE), zero, zero, torch.tensor(large, dtype=DOUBLE), zero,
        ]))  # fmt: skip


def test_gradients_hold_the_magnitude_or_the_limit_constant():
    change = drawn(6, 7).requires_grad_()
    kept = change.detach().abs() > torch.quantile(change.detach().abs(), 0.7)
    limit = torch.quantile(change.detach().abs(), 0.7)
    size = change.detach().abs()
    for like, want in (("code", size), ("paper", 2 * size - limit), ("hard", torch.ones(6, 7))):
        (grad,) = torch.autograd.grad(sparsify(change, 0.7, like).sum(), change)
        torch.testing.assert_close(grad, torch.where(kept, want.to(DOUBLE), 0.0))
    step = torch.zeros_like(change)
    step[tuple(kept.nonzero()[0])] = 1e-6  # the soft form, by finite differences at a fixed limit
    moved = (change + step) * ((change + step).abs() - limit).clamp_min(0)
    slope = (moved - sparsify(change, 0.7, "paper")).sum() / 1e-6
    assert slope.item() == pytest.approx((2 * size - limit)[tuple(kept.nonzero()[0])].item(), 1e-4)


# --- one layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("like", ["code", "paper", "hard"])
@pytest.mark.parametrize("size", [(7, 5), (60, 40)])
def test_output_is_that_of_the_changed_weight(like, size):
    base = nn.Linear(*size).to(DOUBLE)
    model = nn.Sequential(base)
    adapted = adapt(model, SNELLA(rank=4, start_sparsity=0.6, like=like), generator=generator())
    layer, x = adapted.adapters["0"], drawn(3, 2, size[0])
    change = layer.change()
    weight = base.weight + sparsify(change, 0.6, like)
    torch.testing.assert_close(adapted(x), x @ weight.T + base.bias, rtol=0, atol=1e-12)
    assert adapted.costs()["changed"] == int((weight != base.weight).sum())
    before = adapted(x).detach()
    torch.testing.assert_close(adapted.merge()(x), before, rtol=0, atol=1e-12)


def test_the_start_is_close_to_the_base():
    base = nn.Linear(768, 768)
    with torch.no_grad():
        weight, x = base.weight.clone(), torch.randn(32, 768, generator=generator())
        want = base(x)
        for method in (SNELL(rank=8, sparsity=0.9), SNELLA(rank=8)):
            adapted = adapt(nn.Sequential(base), method, generator=generator())
            gap = (adapted(x) - want).norm() / want.norm()
            assert 0 < gap < 2e-3
            adapted.unload()
    assert torch.equal(base.weight, weight)


def test_snell_without_sparsity_is_the_kernel_itself_unless_like_the_paper():
    layer = build(SNELL(rank=4, sparsity=0), nn.Linear(7, 5))
    assert torch.equal(layer.delta(), layer.change())
    layer = build(SNELL(rank=4, sparsity=0, like="paper"), nn.Linear(7, 5))
    assert (layer.delta().abs() < layer.change().abs()).all()
    layer = build(SNELLA(rank=4), nn.Linear(7, 5))  # never skips
    torch.testing.assert_close(layer.delta(), sparsify(layer.change(), 0.0))


@pytest.mark.parametrize("like", ["code", "paper"])
def test_counts_numbers_by_the_formula(like):
    for method, more in ((SNELL(rank=4, like=like), 0), (SNELLA(rank=4, like=like), 3)):
        adapted = adapt(network(), method, targets=["0"])
        want = 4 * (6 + 9) + more + (2 if like == "paper" else 0)
        assert sum(p.numel() for p in adapted.parameters()) == want
        assert method.count(adapted.sites["0"].site) == want


@pytest.mark.parametrize("size", [(7, 5), (60, 40)])
@pytest.mark.parametrize("like", ["code", "paper", "hard"])
def test_recomputing_changes_no_number(size, like):
    results = []
    for recompute in (False, True):
        model = nn.Sequential(nn.Linear(*size), nn.Tanh(), nn.Linear(size[1], 3))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(drawn(*p.shape, seed=1))
        method = SNELLA(rank=4, start_sparsity=0.7, like=like, recompute=recompute)
        adapted = adapt(model, method, generator=generator())
        x = drawn(6, size[0], dtype=torch.float32).requires_grad_()
        y = adapted(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *adapted.parameters()])])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_recomputing_keeps_no_matrix_of_the_layers_size():
    kept = {}
    for recompute in (False, True):
        adapted = adapt(nn.Sequential(nn.Linear(60, 50)), SNELLA(rank=4, recompute=recompute))
        sizes = []
        hooks = (lambda t, sizes=sizes: sizes.append(t.numel()) or t), lambda t: t
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            y = adapted(drawn(2, 60, dtype=torch.float32).requires_grad_())
        kept[recompute] = sum(size for size in sizes if size >= 3000) - 3000 * recompute
        y.sum().backward()
    assert kept[False] >= 4 * 3000
    assert kept[True] <= 0  # but for the frozen weight itself


def test_recomputing_reads_what_the_forward_pass_read():
    adapted = adapt(nn.Sequential(nn.Linear(6, 5)), SNELLA(rank=4), generator=generator())
    layer, x = adapted.adapters["0"], drawn(3, 6, dtype=torch.float32)
    state = {n: p.detach() * 2 for n, p in adapted.model.named_parameters() if "adapter" in n}
    state = {n: p.requires_grad_() for n, p in state.items()}
    y = torch.func.functional_call(adapted.model, state, (x,))
    layer.drop(0.5)  # an allocation between forward and backward
    got = torch.autograd.grad(y.sum(), list(state.values()))
    layer.drop(0.0)
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if name in state:
                parameter.copy_(state[name])
    want = torch.autograd.grad(adapted(x).sum(), list(layer.parameters()))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_dropout_acts_on_the_change_alone_and_paths_on_whole_examples():
    base = nn.Linear(20, 10)
    adapted = adapt(nn.Sequential(base), SNELL(rank=8, sparsity=0, drop_path=0.5))
    x = drawn(64, 20, dtype=torch.float32)
    torch.default_generator.manual_seed(0)
    with torch.no_grad():
        change, got = adapted(x) - base(x), None
        adapted.model.eval()
        got = adapted(x) - base(x)
        adapted.model.train()
    dropped = change.abs().amax(1) == 0
    assert 10 < int(dropped.sum()) < 54
    torch.testing.assert_close(change[~dropped], 2 * got[~dropped], rtol=1e-3, atol=1e-5)
    adapted.unload()
    model = nn.Sequential(nn.Embedding(6, 5))
    adapted = adapt(model, SNELL(rank=2, dropout=0.1), nn.Embedding)
    with pytest.raises(ValueError, match=r"dropout=0.1.*embedding layer '0'"):
        model(torch.tensor([1]))


# --- competition across layers -------------------------------------------------------------------


def test_the_budget_falls_along_a_cubic():
    b = [budget(t, 1000.0, 100.0, 10, 20, 100) for t in range(101)]
    assert b[:11] == [1000.0] * 11
    assert b[80:] == [100.0] * 21
    assert b[45] == int(100 + 900 * 0.5**3)
    assert all(now >= then for now, then in pairwise(b))


@pytest.mark.parametrize("volume", [10, 100, 777, 1400])
def test_shares_use_the_volume_up_and_fit_their_layers(volume):
    for seed in range(20):
        scores = drawn(4, seed=seed).abs()
        rooms = torch.tensor([100, 200, 300, 800])
        given = share_out(volume, scores, rooms)
        assert all(0 <= v <= room for v, room in zip(given, rooms.tolist(), strict=True))
        assert volume - 4 <= sum(given) <= volume
        assert given == share_out(volume, 1024 * scores, rooms)  # only their ratios count


def test_equal_scores_and_sizes_give_equal_shares():
    assert share_out(900, torch.ones(3), torch.full((3,), 400)) == [300, 300, 300]
    assert share_out(900, torch.zeros(3), torch.full((3,), 400)) == [300, 300, 300]


def test_a_dominant_score_fills_its_layer_and_the_rest_is_shared():
    given = share_out(600, torch.tensor([1000.0, 1.0, 3.0]), torch.full((3,), 400))
    assert given[0] == 400
    assert abs(given[1] - 50) <= 1  # whole numbers, cut down
    assert abs(given[2] - 150) <= 1
    assert share_out(600, torch.tensor([1.0, 0.0, 0.0]), torch.full((3,), 400)) == [400, 100, 100]
    assert share_out(1200, torch.tensor([1.0, 2.0, 3.0]), torch.full((3,), 400)) == [400] * 3


@pytest.mark.parametrize("scores", [[1.0, math.nan], [1.0, -1.0], [math.inf, 1.0]])
def test_scores_that_are_no_scores_are_refused(scores):
    with pytest.raises(ValueError, match="finite and not negative"):
        share_out(10, torch.tensor(scores), torch.tensor([10, 10]))


def test_importance_by_hand():
    method = SNELLA(rank=4, beta1=0.5, beta2=0.25, interval=50)
    adapted, _ = run(method, 1, total=100)
    layer, controller = adapted.adapters["0"], adapted.controller
    now = (layer.A * layer.A.grad).abs().detach()  # updated factors, the gradient that updated them
    torch.testing.assert_close(controller.importance[0], 0.5 * now)
    torch.testing.assert_close(controller.uncertainty[0], 0.75 * 0.5 * now)
    scores = controller.scores()
    IU = [i * u for i, u in zip(controller.importance, controller.uncertainty, strict=True)]
    torch.testing.assert_close(scores[1], IU[2].mean() + IU[3].mean())


def test_a_run_shrinks_to_its_budget_and_keeps_it():
    method = SNELLA(rank=4, target_sparsity=0.8, interval=5, final=10, warmup=5)
    adapted, _ = run(method, 40)
    table = adapted.controller.table()
    assert table.step.unique().tolist() == [10, 15, 20, 25, 30, 35]
    total = 6 * 9 + 9 * 8 + 8 * 4
    assert table.total.iloc[-1] == int(0.2 * total)
    kept = table[table.step == 35].set_index("layer").nonzero
    for name, layer in adapted.adapters.items():
        assert abs(layer.changed - kept[name]) <= 1
        room = layer.site.rows * layer.site.cols
        assert float(layer.sparsity) == pytest.approx(1 - kept[name] / room)
    assert int(0.2 * total) - 3 <= kept.sum() <= int(0.2 * total)
    assert adapted.costs()["changed"] == sum(a.changed for a in adapted.adapters.values())


def test_the_first_and_the_last_step_allocate_nothing():
    adapted, _ = run(SNELLA(rank=4, target_sparsity=0.8, interval=5), 20)
    assert adapted.controller.table().step.unique().tolist() == [5, 10, 15]
    left = (1 - 15 / 20) ** 3  # of the way: the target is not quite reached
    total = 6 * 9 + 9 * 8 + 8 * 4
    assert adapted.controller.volume == int(0.2 * total + 0.8 * total * left)


def test_the_optimizer_state_has_the_length_of_the_factors():
    _, optimizer = run(SNELLA(rank=2, interval=5), 10)
    state = sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.dim())
    assert state == 2 * sum(2 * (m + n) + 3 for n, m in ((6, 9), (9, 8), (8, 4)))


def test_another_scorer_takes_the_place_of_importance():
    adapted, _ = run(SNELLA(rank=4, interval=5), 10, scorer=lambda c: [0.0, 1.0, 0.0])
    shares = adapted.controller.shares()
    assert shares["2"] > shares["0"]
    assert shares["2"] > shares["4"]


def test_it_goes_on_from_a_file_as_if_it_had_not_stopped(tmp_path):
    method = SNELLA(rank=4, target_sparsity=0.8, interval=3)
    whole, _ = run(method, 12)
    half, optimizer = run(method, 7, total=12)
    half.save(tmp_path / "half.safetensors", resume=True)
    again = toolkit.load(network(), tmp_path / "half.safetensors")
    assert [float(a.sparsity) for a in again.adapters.values()] == [
        float(a.sparsity) for a in half.adapters.values()
    ]
    x, y = drawn(16, 6, seed=2), drawn(16, 4, seed=3)
    torch.testing.assert_close(again(x), half(x), rtol=0, atol=0)
    descent = torch.optim.Adam(again.parameters(), lr=0.03)
    again.attach(descent, total_steps=12)
    descent.load_state_dict(optimizer.state_dict())
    for _ in range(5):
        descent.zero_grad()
        (again(x) - y).square().mean().backward()
        descent.step()
    torch.testing.assert_close(again(x), whole(x), rtol=0, atol=1e-12)


def test_the_share_travels_in_a_models_state_dict():
    adapted, _ = run(SNELLA(rank=4, interval=3), 7, total=12)
    other = adapt(network(), SNELLA(rank=4, interval=3))
    other.model.load_state_dict(adapted.model.state_dict())
    x = drawn(5, 6, seed=4)
    torch.testing.assert_close(other(x), adapted(x), rtol=0, atol=0)


# --- bad input and the contracts of the default form ---------------------------------------------


@pytest.mark.parametrize(("values", "words"), [
    ({"rank": 5}, "multiple of pieces"),
    ({"rank": 8, "pieces": 3}, "multiple of pieces"),
    ({"target_sparsity": 1.1}, r"\[0.0, 1.0\]"),
    ({"start_sparsity": -0.1}, r"\[0.0, 1.0\]"),
    ({"beta1": 1.0}, r"\(0.0, 1.0\)"),
    ({"beta2": 0.0}, r"\(0.0, 1.0\)"),
    ({"kernel": "cubic"}, "kernel must be one of"),
])  # fmt: skip
def test_bad_values_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        SNELLA(**values)


def test_bad_shares_of_snell_are_refused():
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="sparsity must lie in"):
            SNELL(sparsity=share)


def test_a_schedule_that_does_not_fit_is_refused():
    for values, total, words in (
        ({"warmup": 5, "final": 5}, 10, "leave no step"),
        ({}, None, "total_steps=T"),
    ):
        adapted = adapt(network(), SNELLA(rank=4, **values))
        with pytest.raises(ValueError, match=words):
            adapted.attach(torch.optim.Adam(adapted.parameters()), total_steps=total)


def test_allocation_before_any_score_is_refused():
    adapted, _ = run(SNELLA(rank=4), 0, total=10)
    with pytest.raises(RuntimeError, match="no step has been scored"):
        adapted.controller.allocate(100)


def test_a_saved_share_that_is_none_is_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    adapted, _ = run(SNELLA(rank=4, interval=3), 7, total=12)
    path = tmp_path / "a.safetensors"
    adapted.save(path)
    with safe_open(path, framework="pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    tensors["adapter.0.sparsity"].fill_(1.5)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match="no share"):
        toolkit.load(network(), path)


# those of gradients compare with differences of the function, which hold nothing constant
KEPT = sorted(CONTRACTS.keys() - {"gradients_are_right", "second_gradients_are_right"})
QUICK = [name for name in KEPT if not name.startswith(("works_compiled", "refuses"))]


@pytest.mark.parametrize("method", [
    SNELLA(rank=4, interval=2), SNELLA(rank=4, interval=2, like="paper"), SNELL(rank=4),
], ids=["code", "paper", "snell"])  # fmt: skip
@pytest.mark.parametrize("contract", QUICK)
def test_contracts_of_the_published_forms(contract, method):
    assert ROOMS["linear"].kind == "linear"
    check(contract, Case(method, "linear"))
