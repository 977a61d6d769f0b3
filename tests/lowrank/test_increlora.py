"""What only IncreLoRA must satisfy: scores, growth, reserves, late tensors, penalty, resume."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import toolkit
from toolkit import IncreLoRA, adapt
from toolkit.core.adapt.sites import describe
from toolkit.core.adapt.weight_gradient import weight_gradient
from toolkit.labs.beds import tasks as beds
from toolkit.lowrank.increlora.score import Scratch

DOUBLE = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator(len(p))) / 2)
    return model.to(DOUBLE)


METHOD = IncreLoRA(
    target_rank=3, top=1, interval=2, warmup=3, restart_warmup=4, alpha=6.0, orthogonality=0.1
)
T = 30
X = torch.randn(16, 5, generator=generator(2), dtype=DOUBLE)
Y = torch.randn(16, 5, generator=generator(3), dtype=DOUBLE)


def started(method: IncreLoRA = METHOD, make=torch.optim.Adam, total_steps: int = T, **options):
    """A small adapted network in float64, its optimizer and its step function."""
    adapted = adapt(network(), method, generator=generator(1))
    optimizer = make(adapted.parameters(), lr=0.02)
    adapted.attach(optimizer, total_steps=total_steps, **options)
    return adapted, optimizer, lambda: step(adapted, optimizer)


def step(adapted, optimizer, x=X, y=Y) -> None:
    optimizer.zero_grad()
    (adapted(x) - y).square().mean().backward()
    optimizer.step()


def backward(adapted, x=X, y=Y) -> None:
    (adapted(x) - y).square().mean().backward()


def wake(adapted, seed: int = 7) -> None:
    """Give every lambda that trains a value, as some training would."""
    with torch.no_grad():
        for adapter in adapted.adapters.values():
            for key, p in adapter.named_parameters():
                p.copy_(torch.randn(p.shape, generator=generator(seed + len(key)), dtype=p.dtype))


def explicit_delta(adapter) -> torch.Tensor:
    """The sum over components, one by one."""
    Bs, As = adapter.blocks()
    B, A, lam = torch.cat(Bs, 1), torch.cat(As), adapter.lambdas()[:, 0]
    return adapter.scale * sum(lam[i] * torch.outer(B[:, i], A[i]) for i in range(len(lam)))


def members(optimizer) -> list[list[int]]:
    return [[id(p) for p in group["params"]] for group in optimizer.param_groups]


# --- the start -----------------------------------------------------------------------------------


@pytest.mark.parametrize("attach", [False, True])
def test_starts_at_the_base_up_to_the_reserves(attach):
    for method in (METHOD, dataclasses.replace(METHOD, reserve=0.0)):
        base, adapted = network(), adapt(network(), method, generator=generator(1))
        if attach:
            adapted.attach(torch.optim.Adam(adapted.parameters()), total_steps=T)
        for name, adapter in adapted.adapters.items():
            bound = adapter.scale * method.reserve * adapter.B1.norm() * adapter.A1.norm()
            change = torch.linalg.matrix_norm(adapter.delta(), 2)
            assert change <= bound * (1 + 1e-12), name
            assert (change > 0) == (method.reserve > 0)
        if not method.reserve:
            assert torch.equal(adapted(X), base(X))


def test_without_advance_learning_the_start_is_exact_and_reserves_do_not_train():
    method = dataclasses.replace(METHOD, advance=False)
    adapted = adapt(network(), method, generator=generator(1))
    assert torch.equal(adapted(X), network()(X))
    assert {n.rpartition(".")[2] for n, _ in adapted.named_parameters()} == {"A0", "B0", "E0"}


def test_shapes_draws_and_counted_numbers():
    site = describe(nn.Linear(400, 300), "big")
    method = IncreLoRA(rank=20, growth=60)
    layer = method.build(site, generator())
    assert layer.A0.shape == (20, 400)
    assert layer.B0.shape == (300, 20)
    assert torch.equal(layer.E0, torch.zeros(20, 1))
    assert layer.A1.shape == (60, 400)
    assert layer.B1.shape == (300, 60)
    assert torch.equal(layer.reserve, torch.full((60, 1), 1e-5))
    for t in (layer.A0, layer.B0, layer.A1, layer.B1):
        assert t.std().item() == pytest.approx(0.02, rel=0.03)
    counted = sum(p.numel() for p in layer.parameters())
    assert method.count(site) == counted == 80 * 700 + 20
    assert layer.rank == 20  # reserves do not count
    assert IncreLoRA(rank=20, growth=60, advance=False).count(site) == 20 * 701


def test_a_reserve_is_no_wider_than_the_matrix_allows():
    layer = IncreLoRA(rank=3, growth=4).build(describe(nn.Linear(5, 8), "small"), generator())
    assert layer.A1.shape == (2, 5)
    layer.grow(2)
    assert (layer.rank, len(layer.reserve), layer.width) == (5, 0, 2)


# --- the score -----------------------------------------------------------------------------------


def conv1d_class() -> type[nn.Module]:
    class Conv1D(nn.Module):
        def __init__(self, nf: int, nx: int):
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight = nn.Parameter(torch.randn(nx, nf))
            self.bias = nn.Parameter(torch.zeros(nf))

        def forward(self, x):
            return x @ self.weight + self.bias

    return Conv1D


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(9), dtype=DOUBLE)


LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), floats(5, 4)),
    "linear, sequence": (lambda: nn.Linear(4, 6), floats(2, 3, 4)),
    "linear, one vector": (lambda: nn.Linear(4, 6), floats(4)),
    "conv1d_hf": (lambda: conv1d_class()(6, 4), floats(2, 3, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), floats(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 6, (3, 2), padding=(1, 2), dilation=2), floats(2, 3, 8, 7)),
    "conv2d unbatched": (lambda: nn.Conv2d(3, 6, 3), floats(3, 8, 7)),
    "conv2d same": (lambda: nn.Conv2d(3, 6, 4, padding="same"), floats(2, 3, 8, 7)),
    "conv2d valid": (lambda: nn.Conv2d(3, 6, 2, padding="valid"), floats(2, 3, 8, 7)),
    "conv2d circular": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", groups=2),
        floats(2, 4, 6, 5),
    ),
    "conv3d": (
        lambda: nn.Conv3d(2, 4, 2, padding=1, padding_mode="replicate"),
        floats(2, 2, 3, 4, 5),
    ),
    "embedding": (lambda: nn.Embedding(7, 5), torch.tensor([[0, 3, 3], [6, 1, 0]])),
    "padded": (lambda: nn.Embedding(7, 5, padding_idx=3), torch.tensor([[0, 3, 3], [6, 1, 0]])),
}


@pytest.mark.parametrize("like", ["code", "paper", "library"])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_score_is_that_of_a_dense_leaf(kind, like):
    make, x = LAYERS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(make()).to(DOUBLE)
    method = IncreLoRA(rank=2, growth=1, like=like)
    adapted = adapt(model, method, targets="0", generator=generator(1))
    wake(adapted)
    layer = adapted.sites["0"].layer
    layer.adapter.listening = True
    y = adapted(x)
    weight = torch.cos(torch.arange(y.numel(), dtype=DOUBLE)).view(y.shape)
    (weight * y).sum().backward()

    leaf = layer.adapter.merged(layer.base)["weight"].detach().requires_grad_()
    (weight * functional_call(layer.base, {"weight": leaf}, (x,))).sum().backward()
    site = adapted.sites["0"].site
    m, n = site.rows, site.cols
    # gradients of W and of its change are the same; padding rows have none
    product = explicit_delta(layer.adapter) * site.to_matrix(leaf.grad)
    want = product.abs().sum() / (m * n if like == "paper" else math.sqrt(m * n))
    torch.testing.assert_close(layer.adapter.score, want.detach(), rtol=1e-10, atol=0)
    if site.kind in ("linear", "conv") and x.is_floating_point():
        G = weight_gradient(layer.base, site, x, weight)
        torch.testing.assert_close(G, site.to_matrix(leaf.grad))


def test_attention_is_scored_at_the_weights_it_reads():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(6, 2, batch_first=True).to(DOUBLE)
    model = nn.Sequential(attention)
    adapted = adapt(model, IncreLoRA(rank=2), generator=generator(1), targets=["0", "0.out_proj"])
    wake(adapted)
    for adapter in adapted.adapters.values():
        adapter.listening = True
    x = floats(2, 3, 6)
    attention = model[0]
    attention(x, x, x, need_weights=False)[0].square().sum().backward()
    merged = {
        name: site.layer.adapter.merged(site.layer.base) for name, site in adapted.sites.items()
    }
    plain = nn.MultiheadAttention(6, 2, batch_first=True).to(DOUBLE)
    plain.load_state_dict(
        {k.replace("base.", ""): v for k, v in attention.state_dict().items() if "adapter" not in k}
    )
    with torch.no_grad():
        plain.in_proj_weight.copy_(merged["0"]["in_proj_weight"])
        plain.out_proj.weight.copy_(merged["0.out_proj"]["weight"])
    plain(x, x, x, need_weights=False)[0].square().sum().backward()
    for name, G in (("0", plain.in_proj_weight.grad), ("0.out_proj", plain.out_proj.weight.grad)):
        adapter = adapted.adapters[name]
        want = (explicit_delta(adapter) * G).abs().sum() / math.sqrt(G.numel())
        torch.testing.assert_close(adapter.score, want.detach(), rtol=1e-10, atol=0)


def test_the_score_of_a_layer_called_twice_is_the_sum_of_its_calls():
    layer = nn.Linear(4, 4).to(DOUBLE)
    adapted = adapt(nn.Sequential(layer, nn.Tanh(), layer), METHOD, generator=generator(1))
    wake(adapted)
    adapter = adapted.adapters["0"]
    adapter.listening = True
    x = floats(5, 4)
    W = adapter.merged(layer)["weight"].detach()
    one, two = W.clone().requires_grad_(), W.clone().requires_grad_()
    F.linear(torch.tanh(F.linear(x, one, layer.bias)), two, layer.bias).square().sum().backward()
    adapted(x).square().sum().backward()
    D = explicit_delta(adapter)
    want = ((D * one.grad).abs().sum() + (D * two.grad).abs().sum()) / 4
    torch.testing.assert_close(adapter.score, want.detach(), rtol=1e-10, atol=0)


def scores_now(adapted) -> list:
    return [None if a.score is None else float(a.score) for a in adapted.adapters.values()]


def test_only_a_backward_pass_in_training_mode_is_heard():
    adapted, optimizer, _ = started()
    wake(adapted)
    backward(adapted)
    heard = scores_now(adapted)
    assert all(s > 0 for s in heard)
    adapted.model.eval()
    backward(adapted)
    with torch.no_grad():
        adapted(X)
    adapted.model.train()
    adapted(X)  # no backward pass
    torch.func.grad(lambda x: adapted(x).sum())(X)
    assert scores_now(adapted) == heard
    optimizer.step()
    assert scores_now(adapted) == [None] * 3


def test_micro_batches_add_up():
    parts = []
    for rows in (slice(0, 8), slice(8, 16)):
        adapted, _, _ = started()
        wake(adapted)
        backward(adapted, X[rows], Y[rows])
        parts.append(scores_now(adapted))
    adapted, _, _ = started()
    wake(adapted)
    for rows in (slice(0, 8), slice(8, 16)):
        backward(adapted, X[rows], Y[rows])
    np.testing.assert_allclose(scores_now(adapted), np.sum(parts, 0), rtol=1e-12)


def test_scores_in_bfloat16_are_close_and_the_gradients_are_the_same():
    results = []
    for dtype in (None, torch.bfloat16):
        adapted, _, _ = started(score_dtype=dtype)
        wake(adapted)
        backward(adapted)
        results.append((scores_now(adapted), [p.grad for p in adapted.parameters()]))
    (full, ours), (half, theirs) = results
    assert full != half
    np.testing.assert_allclose(half, full, rtol=5e-3)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_penalty_is_not_in_the_score():
    results = []
    for gamma in (0.0, 5.0):
        adapted, _, _ = started(dataclasses.replace(METHOD, orthogonality=gamma))
        wake(adapted)
        backward(adapted)
        results.append(scores_now(adapted))
    assert results[0] == results[1]


def test_averages_equal_a_plain_numpy_loop():
    method = dataclasses.replace(METHOD, beta1=0.7, beta2=0.9, warmup=10)
    adapted, optimizer, _ = started(method)
    I, U = np.zeros(3), np.zeros(3)
    for t in range(8):
        optimizer.zero_grad()
        backward(adapted)
        S = np.array(scores_now(adapted))
        assert (S[0] < 1e-6) == (t == 0)  # at the first step only the reserve has a lambda
        optimizer.step()
        I = 0.7 * I + 0.3 * S
        U = 0.9 * U + 0.1 * np.abs(S - I)
        np.testing.assert_allclose(adapted.controller.importance, I, rtol=1e-12)
        np.testing.assert_allclose(adapted.controller.uncertainty, U, rtol=1e-12)
        np.testing.assert_allclose(adapted.controller.scores(), I * U, rtol=1e-12)


@pytest.mark.parametrize("window", [1, 3, 4, 7, 50])
def test_a_window_scores_only_the_last_steps_up_to_a_look(window):
    method = dataclasses.replace(METHOD, interval=4, warmup=5, window=window, total_rank=5)
    adapted, optimizer, _ = started(method)
    heard = []
    for t in range(T):
        optimizer.zero_grad()
        backward(adapted)
        if scores_now(adapted)[0] is not None:
            heard.append(t)
        before = adapted.controller.importance.clone()
        optimizer.step()
        moved = not torch.equal(before, adapted.controller.importance)
        assert moved == (t in heard)
    # looks at 8 and 12, where the target is reached
    want = [t for t in range(13) if (8 if t <= 8 else 12) - t < window]
    assert heard == want
    assert adapted.controller.total == 5


@pytest.mark.weekly  # every run: the contract works_compiled
def test_compiled_training_is_scored_like_any_other():
    torch._dynamo.reset()
    results = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="aot_eager")):
        adapted, optimizer, _ = started()
        model = wrap(adapted.model)
        for _ in range(5):
            optimizer.zero_grad()
            (model(X) - Y).square().mean().backward()
            optimizer.step()
        results.append((adapted.controller.scores().tolist(), adapted.controller.ranks()))
    torch._dynamo.reset()
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-9)
    assert results[0][1] == results[1][1]


def test_a_scaled_loss_gives_the_same_scores_when_the_scaler_is_known():
    plain, optimizer, _ = started()
    wake(plain)
    backward(plain)
    optimizer.step()
    want = plain.controller.importance.clone()

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled, optimizer, _ = started(scaler=scaler)
    wake(scaled)
    scaler.scale((scaled(X) - Y).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(scaled.controller.importance, want, rtol=1e-9, atol=0)
    # a step that is skipped for inf leaves no trace in the averages
    optimizer.zero_grad()
    scaler.scale((scaled(X * float("inf")) - Y).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaled.controller.step == 1
    optimizer.zero_grad()
    scaler.scale((scaled(X) - Y).square().mean()).backward()
    scaler.step(optimizer)
    assert scaled.controller.step == 2
    assert torch.isfinite(scaled.controller.importance).all()


# --- growth --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reserve", [1e-5, 0.0, 0.5])
@pytest.mark.parametrize("growth", [1, 2])
def test_growth_keeps_the_function(reserve, growth):
    method = dataclasses.replace(METHOD, reserve=reserve, growth=growth)
    adapted = adapt(network(), method, generator=generator(1))
    wake(adapted)
    for adapter in adapted.adapters.values():
        before, width = adapter.delta().detach().clone(), adapter.width
        adapter.grow(growth)
        B, A = getattr(adapter, f"B{width}"), getattr(adapter, f"A{width}")
        added = adapter.scale * reserve * B @ A
        torch.testing.assert_close(adapter.delta(), before + added, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(adapter.delta(), explicit_delta(adapter))
        if reserve == 0:
            assert torch.equal(adapter.delta(), before)


def test_with_the_official_divisor_growth_rescales_by_r_over_r_plus_c():
    method = dataclasses.replace(METHOD, rescale=True, reserve=0.0, growth=2, rank=2)
    adapted = adapt(network(), method, generator=generator(1))
    wake(adapted)
    for adapter in adapted.adapters.values():
        before = adapter.delta().detach().clone()
        assert adapter.scale == 6.0 / (2 + 1e-5)
        adapter.grow(2)
        torch.testing.assert_close(
            adapter.delta(), before * (2 + 1e-5) / (4 + 1e-5), rtol=1e-12, atol=0
        )


def test_the_fixed_divisor_is_the_target():
    adapted, _, run = started()
    for _ in range(T):
        run()
    assert {a.scale for a in adapted.adapters.values()} == {6.0 / (3 + 1e-5)}


@pytest.mark.parametrize("top", [1, 2, 3])
@pytest.mark.parametrize("growth", [1, 2])
def test_the_total_never_falls_grows_by_top_times_growth_and_ends_at_the_target(top, growth):
    method = dataclasses.replace(METHOD, top=top, growth=growth, total_rank=8)
    adapted, _, run = started(method)
    totals = []
    for t in range(T):
        run()
        totals.append(adapted.controller.total)
        counted = [sum(len(p) for n, p in a.named_parameters() if n[0] == "E") for a in
                   adapted.adapters.values()]  # fmt: skip
        assert list(adapted.controller.ranks().values()) == counted
        rise = totals[-1] - (totals[-2] if t else 3)
        assert 0 <= rise <= top * growth
        assert rise == 0 or (t > 3 and t % 2 == 0)
    assert totals[3] == 3  # warm-up
    assert totals[-1] == 8
    history = adapted.controller.history
    assert [record.step for record in history[1:]] == list(range(4, 4 + 2 * len(history[1:]), 2))


def test_at_the_target_reserves_leave_the_output_and_scoring_ends():
    adapted, optimizer, run = started()
    while adapted.controller.growing:
        run()
    for adapter in adapted.adapters.values():
        assert not adapter.reserve.any()
        assert not adapter.listening
        trained = adapter.delta()
        with torch.no_grad():
            for key in (f"A{adapter.width - 1}", f"B{adapter.width - 1}"):
                if len(adapter.reserve):
                    getattr(adapter, key).add_(1.0)  # the last block is the reserve
        assert torch.equal(adapter.delta(), trained)
    assert sum(len(a.reserve) for a in adapted.adapters.values()) >= 2
    backward(adapted)
    assert scores_now(adapted) == [None] * 3
    importance = adapted.controller.importance.clone()
    optimizer.step()
    assert torch.equal(adapted.controller.importance, importance)


def test_the_run_ends_without_reserves_even_if_growth_by_hand_stopped_early():
    adapted, _, run = started(scorer=lambda c: [0.0] * 3)
    adapted.controller.interval = 1000  # no look any more
    for _ in range(T):
        run()
    assert adapted.controller.total == 3
    assert not any(a.reserve.any() for a in adapted.adapters.values())
    run()  # steps beyond the schedule train on and grow nothing
    assert adapted.controller.step == T + 1
    with pytest.raises(RuntimeError, match=r"after the end of the schedule"):
        adapted.controller.grow([1, 0, 0])


def test_the_highest_scores_grow():
    adapted, _, run = started(scorer=lambda c: [1.0, 3.0, 2.0])
    for _ in range(5):
        run()
    assert list(adapted.controller.ranks().values()) == [1, 2, 1]
    adapted, _, run = started(
        dataclasses.replace(METHOD, top=2), scorer=lambda c: torch.tensor([1.0, 3.0, 2.0])
    )
    for _ in range(5):
        run()
    assert list(adapted.controller.ranks().values()) == [1, 2, 2]


def test_equal_scores_all_grow():
    adapted, _, run = started(dataclasses.replace(METHOD, top=50), scorer=lambda c: [0.0] * 3)
    for _ in range(5):
        run()
    assert list(adapted.controller.ranks().values()) == [2, 2, 2]


def test_the_budget_is_met_exactly_unless_overshoot_is_asked_for():
    for overshoot, total in ((False, 4), (True, 6)):
        method = dataclasses.replace(METHOD, total_rank=4, top=3, overshoot=overshoot)
        adapted, _, run = started(method, scorer=lambda c: [0.0] * 3)
        for _ in range(10):
            run()
        assert adapted.controller.total == total
        assert not any(a.reserve.any() for a in adapted.adapters.values())


def test_a_target_equal_to_the_start_grows_nothing():
    adapted, optimizer, run = started(dataclasses.replace(METHOD, target_rank=1))
    assert torch.equal(adapted(X), network()(X))  # reserves are out from the start
    for _ in range(T):
        run()
    assert list(adapted.controller.ranks().values()) == [1, 1, 1]
    assert len(optimizer.param_groups) == 1


def test_a_full_layer_leaves_its_turn_to_the_next():
    method = dataclasses.replace(METHOD, total_rank=9)
    adapted, _, run = started(method, scorer=lambda c: [9.0, 5.0, 1.0])
    for _ in range(T):
        run()
    assert list(adapted.controller.ranks().values()) == [5, 3, 1]  # the first matrix is 7 x 5
    assert len(adapted.adapters["0"].reserve) == 0


def test_growth_finds_the_layer_that_needs_rank():
    method = IncreLoRA(total_rank=7, target_rank=2, top=1, interval=20, warmup=40, restart=False)
    _, record = beds.planted_train(
        method, 1e-2, 0, steps=200, ranks=(0, 5, 0), widths=(16, 24, 24, 8)
    )
    assert record["ranks"][1] >= 4
    assert sum(record["ranks"]) == 7


def test_each_growth_is_recorded_with_the_scores_that_decided_it():
    adapted, optimizer, _ = started()
    kept = {}
    for t in range(T):
        optimizer.zero_grad()
        backward(adapted)
        optimizer.step()
        if t and adapted.controller.history[-1].step == t:
            kept[t] = adapted.controller.ranks(), adapted.controller.scores().clone()
    history = adapted.controller.history
    assert (history[0].step, [*history[0].ranks.values()]) == (0, [1, 1, 1])
    assert [r.step for r in history[1:]] == list(kept) == [4, 6, 8, 10, 12, 14]
    for before, record in itertools.pairwise(history):
        ranks, scores = kept[record.step]
        assert record.ranks == ranks
        assert record.total == sum(ranks.values())
        assert torch.equal(torch.cat([*record.scores.values()]), scores.float())
        for name in ranks:
            grew = record.ranks[name] > before.ranks[name]
            full = before.ranks[name] == adapted.adapters[name].limit
            assert grew == (not full and float(record.scores[name]) >= record.threshold)


def test_a_rank_above_the_matrix_is_taken_and_never_grows():
    with pytest.warns(UserWarning, match=r"rank 7 is more.*'2'"):
        adapted = adapt(
            network(), dataclasses.replace(METHOD, rank=7, total_rank=21), generator=generator(1)
        )
    optimizer = torch.optim.Adam(adapted.parameters(), lr=0.02)
    adapted.attach(optimizer, total_steps=T)
    for _ in range(6):
        step(adapted, optimizer)
    assert adapted.controller.rooms() == [0, 0, 0]
    assert [len(a.reserve) for a in adapted.adapters.values()] == [0, 0, 0]
    assert adapted.controller.total == 21
    with pytest.raises(ValueError, match=r"has rank 7 and cannot grow"):
        adapted.controller.grow([1, 0, 0])


def test_a_run_that_passed_its_target_is_resumed(tmp_path):
    method = dataclasses.replace(METHOD, total_rank=4, top=3, overshoot=True)
    adapted, _, run = started(method)
    adapted.controller.scorer = lambda c: [0.0] * 3
    for _ in range(8):
        run()
    assert adapted.controller.total == 6
    adapted.save(tmp_path / "a.safetensors", resume=True)
    again = toolkit.load(network(), tmp_path / "a.safetensors")
    again.attach(torch.optim.Adam(again.parameters()), total_steps=T)
    assert (again.controller.total, again.controller.growing) == (6, False)


def test_draws_can_be_given():
    adapted, _, run = started()
    run()
    A, B = floats(1, 5), floats(7, 1)
    adapted.controller.grow([1, 0, 0], draws={"0": {"A": A, "B": B}})
    adapter = adapted.adapters["0"]
    assert torch.equal(adapter.A2, A)
    assert torch.equal(adapter.B2, B)
    with pytest.raises(ValueError, match=r"draws of layer '0': A has shape \(7, 1\)"):
        adapted.controller.grow([1, 0, 0], draws={"0": {"A": B, "B": A}})
    with pytest.raises(ValueError, match=r"draws of layer '0': A3 has shape"):
        adapted.controller.grow([1, 0, 0], draws={"0": {"A3": A}})
    with pytest.raises(ValueError, match=r"'nought', which is no layer"):
        adapted.controller.grow([1, 0, 0], draws={"nought": {"A": A}})
    assert adapter.rank == 2  # what was refused changed nothing


def test_growth_is_the_same_for_the_same_seed():
    ends = []
    for _ in range(2):
        adapted, _, run = started()
        for _ in range(T):
            run()
        ends.append(dict(adapted.named_parameters()))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


# --- reserves and the optimizer ------------------------------------------------------------------


def test_reserves_train_ahead_and_their_lambda_does_not():
    adapted, _, run = started()
    before = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    for _ in range(3):
        run()
    for name, p in adapted.named_parameters():
        assert not torch.equal(p, before[name]), name
    for adapter in adapted.adapters.values():
        assert torch.equal(adapter.reserve, torch.full((1, 1), 1e-5, dtype=DOUBLE))
        assert not isinstance(adapter.reserve, nn.Parameter)


def test_without_advance_learning_reserves_train_from_their_growth_on():
    method = dataclasses.replace(METHOD, advance=False)
    adapted, optimizer, run = started(method, scorer=lambda c: [0.0, 0.0, 1.0])
    adapter = adapted.adapters["4"]
    A = adapter.A1.clone()
    for _ in range(4):
        run()
    assert torch.equal(adapter.A1, A)
    run()  # step 4 grows, before the optimizer acts: still no gradient
    assert isinstance(adapter.A1, nn.Parameter)
    assert torch.equal(adapter.A1, A)
    assert torch.equal(adapter.E1, torch.zeros(1, 1, dtype=DOUBLE))
    assert not isinstance(adapter.A2, nn.Parameter)
    assert members(optimizer)[1] == [id(adapter.A1), id(adapter.B1), id(adapter.E1)]
    run()  # the restarted rate is 0 here
    run()
    assert not torch.equal(adapter.A1, A)
    assert not torch.equal(adapter.E1, torch.zeros(1, 1, dtype=DOUBLE))
    assert not torch.equal(adapted.adapters["0"].A1, 0 * adapted.adapters["0"].A1)
    assert not isinstance(adapted.adapters["0"].A1, nn.Parameter)


def test_released_components_start_from_the_trained_reserve():
    adapted, optimizer, run = started(scorer=lambda c: [0.0, 0.0, 1.0])
    for _ in range(4):
        run()
    adapter = adapted.adapters["4"]
    A1 = adapter.A1
    run()
    assert adapter.A1 is A1
    assert adapter.E1.item() == 1e-5
    assert members(optimizer)[1] == [id(adapter.E1), id(adapter.A2), id(adapter.B2)]
    assert not optimizer.state[adapter.E1]


def test_no_tensor_is_in_the_optimizer_twice_and_all_are_there():
    adapted, optimizer, run = started()
    for _ in range(T):
        run()
        held = [key for group in members(optimizer) for key in group]
        assert len(held) == len(set(held))
        assert set(held) == {id(p) for p in adapted.parameters()}


def test_growth_leaves_old_moments_bitwise_alone():
    adapted, optimizer, run = started()
    for _ in range(5):
        run()
    old = {p: copy.deepcopy(optimizer.state[p]) for p in adapted.parameters() if optimizer.state[p]}
    values = {p: p.detach().clone() for p in old}
    adapted.controller.grow([1, 1, 1])
    assert len(old) == 15
    for p, state in old.items():
        assert torch.equal(p, values[p])
        assert all(torch.equal(state[key], optimizer.state[p][key]) for key in state)


@pytest.mark.parametrize("scheduled", [False, True])
def test_new_tensors_warm_up_anew_and_end_with_the_others(scheduled):
    adapted, optimizer, _ = started()
    seen = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append([group["lr"] for group in optimizer.param_groups])
    )
    schedule = (
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / T) if scheduled else None
    )
    for _ in range(T):
        step(adapted, optimizer)
        if scheduled:
            schedule.step()
    births = adapted.controller.groups.births
    assert births == [4, 6, 8, 10, 12, 14]
    for i, tau in enumerate(births):
        for t in range(tau + 1, T):
            u, end = t - tau - 1, T - tau - 1
            want = 0.02 * (u / 4 if u < 4 else (end - u) / (end - 4))
            assert seen[t][1 + i] == pytest.approx(want)
        assert seen[tau + 1][1 + i] == 0.0
    assert [row[0] for row in seen] == pytest.approx(
        [0.02 * (1 - t / T) if scheduled else 0.02 for t in range(T)]
    )
    assert adapted.controller.groups.rates(T) == [0.0] * 6


def test_a_scheduler_built_before_attach_is_refused():
    adapted = adapt(network(), METHOD, generator=generator(1))
    optimizer = torch.optim.Adam(adapted.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
    with pytest.raises(ValueError, match=r"after attach\(\)"):
        adapted.attach(optimizer, total_steps=T)
    assert adapted.controller is None


# --- the penalty ---------------------------------------------------------------------------------


def autograd_penalty(adapted, squared: bool, alone: bool) -> list[torch.Tensor]:
    terms = []
    for adapter in adapted.adapters.values():
        Bs, As = adapter.blocks()
        if not alone:
            Bs, As = [torch.cat(Bs, 1)], [torch.cat(As)]
        for B, A in zip(Bs, As, strict=True):
            for gram in (B.T @ B, A @ A.T):
                gap = gram - torch.eye(len(gram), dtype=DOUBLE)
                terms.append(gap.square().sum() if squared else gap.norm())
    total = torch.stack(terms).sum() / (1 if squared else len(terms))
    tensors = [p for n, p in adapted.named_parameters() if ".E" not in n]
    return torch.autograd.grad(total, tensors)


@pytest.mark.parametrize("like", ["code", "paper", "library"])
@pytest.mark.parametrize("advance", [True, False])
def test_the_penalty_is_over_all_blocks_together(like, advance):
    method = dataclasses.replace(METHOD, like=like, orthogonality=0.3, advance=advance)
    adapted, _, _ = started(method)
    adapted.controller.grow([1, 0, 0])
    adapted.controller.grow([1, 1, 0])
    wake(adapted)
    for p in adapted.parameters():
        p.grad = torch.ones_like(p)
    want = iter(autograd_penalty(adapted, like == "paper", like == "library"))
    value = adapted.controller.penalty()
    tensors = [p for n, p in adapted.named_parameters() if ".E" not in n]
    for a, b in zip(
        torch.autograd.grad(value, tensors),
        autograd_penalty(adapted, like == "paper", like == "library"),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    adapted.controller.before_step()
    torch.testing.assert_close(adapted.controller.last_penalty, value.detach())
    for name, p in adapted.named_parameters():
        if ".E" in name:
            assert torch.equal(p.grad, torch.ones_like(p))
        else:
            torch.testing.assert_close(p.grad, 1 + 0.3 * next(want), rtol=1e-10, atol=1e-12)


def test_blocks_alone_never_become_orthogonal_to_each_other():
    for like in ("code", "library"):
        adapted, _, _ = started(dataclasses.replace(METHOD, like=like))
        adapter = adapted.adapters["0"]
        with torch.no_grad():
            adapter.A1.copy_(adapter.A0 + 0.01 * floats(1, 5))
        start = F.cosine_similarity(adapter.A0, adapter.A1).item()
        for _ in range(400):
            for p in adapted.parameters():
                p.grad = torch.zeros_like(p)
            adapted.controller.add_penalty()
            with torch.no_grad():
                for p in adapted.parameters():
                    p.sub_(p.grad, alpha=0.5)
        end = F.cosine_similarity(adapter.A0, adapter.A1).item()
        assert abs(start) > 0.5
        if like == "library":
            assert end == pytest.approx(start, rel=1e-9)
        else:
            assert abs(end) < 0.05


def test_no_penalty_when_its_weight_is_zero():
    adapted, optimizer, _ = started(dataclasses.replace(METHOD, orthogonality=0.0, reserve=0.0))
    backward(adapted)
    grads = [p.grad.clone() for p in adapted.parameters()]
    optimizer.step()
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, adapted.parameters(), strict=True))


# --- life after growth ---------------------------------------------------------------------------


def test_a_grown_adapter_is_saved_loaded_compacted_and_merged(tmp_path):
    for advance in (True, False):
        adapted, _, run = started(dataclasses.replace(METHOD, advance=advance, growth=2))
        for _ in range(T):
            run()
        want, ranks = adapted(X).detach(), adapted.controller.ranks()
        adapted.save(tmp_path / "a.safetensors")
        again = toolkit.load(network(), tmp_path / "a.safetensors")
        assert torch.equal(again(X), want)
        assert {n: a.rank for n, a in again.adapters.items()} == ranks
        kinds = [[n for n, _ in t.named_parameters()] for t in (adapted, again)]
        assert sorted(kinds[0]) == sorted(kinds[1])
        for adapter in again.adapters.values():
            adapter.compact()
            assert (adapter.width, len(adapter.reserve)) == (1, 0)
            assert len(adapter.E0) == adapter.rank
        torch.testing.assert_close(again(X), want, rtol=1e-12, atol=1e-12)
        again.save(tmp_path / "b.safetensors")
        small = toolkit.load(network(), tmp_path / "b.safetensors")
        assert torch.equal(small(X), again(X))
        assert small.costs()["stored_bytes"] < adapted.costs()["stored_bytes"]
        adapted.merge()
        torch.testing.assert_close(adapted.model(X), want, rtol=1e-12, atol=1e-12)


def resumed(path, make):
    second = toolkit.load(network(), path)
    optimizer = make(second.parameters(), lr=0.02)
    second.attach(optimizer, total_steps=T)
    return second, optimizer


@pytest.mark.parametrize("advance", [True, False])
@pytest.mark.parametrize("half", [2, 5, 9, 20])
def test_training_resumes_bit_for_bit_in_the_middle_of_growth(tmp_path, half, advance):
    method = dataclasses.replace(METHOD, advance=advance, growth=2, total_rank=8)

    def scheduled(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / T)

    def train(adapted, optimizer, scheduler, steps):
        for _ in range(steps):
            step(adapted, optimizer)
            scheduler.step()

    whole, optimizer, _ = started(method, torch.optim.AdamW)
    train(whole, optimizer, scheduled(optimizer), T)

    first, optimizer, _ = started(method, torch.optim.AdamW)
    scheduler = scheduled(optimizer)
    train(first, optimizer, scheduler, half)
    first.save(tmp_path / "half.safetensors", resume=True)
    states = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))

    second, optimizer = resumed(tmp_path / "half.safetensors", torch.optim.AdamW)
    scheduler = scheduled(optimizer)
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    assert second.controller.step == half
    assert second.controller.ranks() == first.controller.ranks()
    train(second, optimizer, scheduler, T - half)
    pd.testing.assert_frame_equal(second.controller.table(), whole.controller.table())
    ours, theirs = dict(second.named_parameters()), dict(whole.named_parameters())
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_nothing_is_scored_once_the_schedule_is_off():
    adapted, _, run = started()
    run()
    assert all(a.listening for a in adapted.adapters.values())
    adapted.merge()
    adapted.unmerge()
    backward(adapted)
    assert scores_now(adapted) == [None] * 3
    adapted.attach(torch.optim.Adam(adapted.parameters()), total_steps=T)
    backward(adapted)
    assert all(s is not None for s in scores_now(adapted))


def test_new_blocks_follow_a_model_that_was_moved():
    adapted = adapt(network().float(), METHOD, generator=generator(1))
    adapted.model.double()
    optimizer = torch.optim.Adam(adapted.parameters(), lr=0.02)
    adapted.attach(optimizer, total_steps=T)
    for _ in range(T):
        step(adapted, optimizer)
    assert adapted.controller.total == 9
    assert {p.dtype for p in adapted.parameters()} == {DOUBLE}


def test_a_copy_starts_unattached_and_can_go_on():
    adapted, _, run = started()
    for _ in range(6):
        run()
    twin = copy.deepcopy(adapted)
    assert not any(a.listening for a in twin.adapters.values())
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.02)
    twin.attach(optimizer, total_steps=T)
    total = twin.controller.total
    assert total == adapted.controller.total == 4
    for _ in range(T):
        step(twin, optimizer)
    assert twin.controller.total == 9
    assert adapted.controller.total == 4


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 3, "target_rank": 2}, r"target of 6.*below the 9"),
        ({"total_rank": 2}, r"target of 2.*below the 3.*total_rank"),
        ({"total_rank": 17}, r"target of 17.*above the 16"),
        ({"warmup": 30}, r"warmup=30.*total_steps=30"),
        ({"interval": 10}, r"2 growths.*add 2 ranks.*6 are missing"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        started(dataclasses.replace(METHOD, **change))


def test_total_steps_must_be_given():
    with pytest.raises(ValueError, match=r"total_steps=T"):
        started(total_steps=None)


@pytest.mark.parametrize(
    "change",
    [{"top": 0}, {"interval": 0}, {"growth": 0}, {"warmup": -1}, {"reserve": -1e-9},
     {"beta1": 1.0}, {"beta2": 0.0}, {"like": "max"}, {"restart_warmup": -1}],
)  # fmt: skip
def test_hyperparameters_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(METHOD, **change)


def test_growth_before_any_score_is_refused_with_the_remedy():
    adapted, optimizer, run = started()
    adapted.model.eval()
    for _ in range(4):
        run()
    before = [p.detach().clone() for p in adapted.parameters()]
    backward(adapted)
    with pytest.raises(RuntimeError, match=r"before any score.*model\.train\(\)"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, adapted.parameters(), strict=True))
    adapted.model.train()
    run()
    assert adapted.controller.total == 4


def test_a_step_before_any_gradient_is_refused():
    adapted, optimizer, _ = started()
    with pytest.raises(RuntimeError, match=r"before any backward pass"):
        optimizer.step()
    assert adapted.controller.step == 0


def test_what_is_not_finite_is_refused_at_growth_and_changes_nothing():
    adapted, optimizer, run = started()
    for _ in range(4):
        run()
    before = [p.detach().clone() for p in adapted.parameters()]
    optimizer.zero_grad()
    backward(adapted)
    adapted.adapters["2"].A0.grad[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"gradient of '2\.A0'.*step 4"):
        optimizer.step()
    adapted.controller.scorer = lambda c: [1.0, 2.0, float("nan")]
    optimizer.zero_grad()
    backward(adapted)
    with pytest.raises(FloatingPointError, match=r"score of '4'"):
        optimizer.step()
    adapted.controller.scorer = lambda c: [1.0, 2.0]
    with pytest.raises(ValueError, match=r"2 scores for 3 layers"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, adapted.parameters(), strict=True))
    assert (adapted.controller.step, adapted.controller.total) == (4, 3)
    adapted.controller.scorer = None
    run()
    assert adapted.controller.total == 4


def test_dropout_on_attention_is_refused():
    model = nn.Sequential(nn.MultiheadAttention(6, 2))
    adapted = adapt(model, IncreLoRA(dropout=0.1), targets="0")
    x = torch.randn(3, 2, 6)
    with pytest.raises(ValueError, match="dropout"):
        model[0](x, x, x)
    adapted.model.eval()
    model[0](x, x, x)


def test_layers_of_any_size_score_in_one_memory():
    scratch, draw = Scratch(), torch.Generator().manual_seed(0)
    for m, n, k in ((3, 4, 2), (5, 6, 3), (2, 2, 7)):
        a, b = torch.randn(m, k, generator=draw), torch.randn(k, n, generator=draw)
        held = scratch.product("gradient", a, b)
        other = scratch.product("difference", -a, b)
        assert torch.equal(held, a @ b)
        assert torch.equal(other, -a @ b)
        assert held.data_ptr() != other.data_ptr()
    scratch.clear()
    assert not scratch.held
