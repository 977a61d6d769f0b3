"""What only AdaLoRA must satisfy: scores, budget, pruning, penalty and the life of a triplet."""

from __future__ import annotations

import copy
import dataclasses
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import toolkit
from toolkit import AdaLoRA, LoRA, adapt
from toolkit.core.adapt.steps.budget import budget
from toolkit.core.adapt.steps.orthogonality import orthogonality, value_and_gradients
from toolkit.lowrank.adalora.allocation import AllocationController


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator(len(p))) / 2)
    return model.to(dtype)


METHOD = AdaLoRA(rank=4, target_rank=2, alpha=8.0, warmup=3, final=4, interval=2)


def attached(method: AdaLoRA = METHOD, total_steps: int = 20, lr: float = 0.02, **options):
    """A small adapted network in float64 with Adam, and its step function."""
    model = network()
    adapted = adapt(model, method, generator=generator(1))
    optimizer = torch.optim.Adam(adapted.parameters(), lr=lr)
    adapted.attach(optimizer, total_steps=total_steps, **options)
    x = torch.randn(16, 5, generator=generator(2), dtype=torch.float64)
    y = torch.randn(16, 4, generator=generator(3), dtype=torch.float64)

    def step() -> None:
        optimizer.zero_grad()
        (adapted(x) - y).square().mean().backward()
        optimizer.step()

    return adapted, step


def lambdas(adapted) -> torch.Tensor:
    """Every lambda of the model, (b0,)."""
    return torch.cat([a.E.detach()[:, 0] for a in adapted.adapters.values()])


# --- one layer -----------------------------------------------------------------------------------


def test_starts_as_the_base_and_only_lambda_has_a_task_gradient():
    model, base = network(), network()
    adapted = adapt(model, METHOD, generator=generator())
    x = torch.randn(8, 5, dtype=torch.float64, generator=generator(1))
    torch.testing.assert_close(adapted(x), base(x), rtol=0, atol=0)
    adapted(x).square().sum().backward()
    for adapter in adapted.adapters.values():
        assert torch.equal(adapter.E.grad != 0, torch.ones_like(adapter.E, dtype=torch.bool))
        assert adapter.P.grad.abs().max() == 0
        assert adapter.Q.grad.abs().max() == 0
        assert torch.equal(adapter.E, torch.zeros_like(adapter.E))


def test_vectors_are_drawn_with_standard_deviation_0_02():
    model = nn.Sequential(nn.Linear(400, 300))
    adapter = adapt(model, AdaLoRA(rank=100, target_rank=8), generator=generator()).adapters["0"]
    for t in (adapter.P, adapter.Q):
        assert t.std().item() == pytest.approx(0.02, rel=0.02)
        assert abs(t.mean().item()) < 5e-4
    assert adapter.P.shape == (300, 100)
    assert adapter.Q.shape == (100, 400)


def test_delta_is_the_written_formula_and_its_divisor_stays_the_initial_rank():
    adapted, step = attached()
    for _ in range(20):
        step()
    assert sum(adapted.controller.ranks().values()) == 6
    for name, adapter in adapted.adapters.items():
        want = 8.0 / (4 + 1e-5) * adapter.P @ torch.diag(adapter.E[:, 0]) @ adapter.Q
        torch.testing.assert_close(adapter.delta(), want)
        base = adapted.sites[name].layer.base
        torch.testing.assert_close(adapter.merged(base)["weight"], base.weight + want)


def test_equals_lora_when_lambda_is_folded_into_q():
    ada, lora = network(), network()
    ours = adapt(ada, AdaLoRA(rank=3, target_rank=2), generator=generator())
    theirs = adapt(lora, LoRA(rank=3, alpha=ours.method.scale * 3))
    with torch.no_grad():
        for name, adapter in ours.adapters.items():
            adapter.E.normal_(generator=generator(5))
            theirs.adapters[name].B.copy_(adapter.P)
            theirs.adapters[name].A.copy_(adapter.E * adapter.Q)
    x = torch.randn(9, 5, dtype=torch.float64, generator=generator(6))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    ours.merge()
    torch.testing.assert_close(ada(x), lora(x), rtol=1e-12, atol=1e-12)


def test_counts_trained_numbers_by_the_formula():
    adapted = adapt(network(), METHOD)
    assert sum(p.numel() for p in adapted.parameters()) == 4 * (13 + 14 + 11)
    assert sum(METHOD.count(site.site) for site in adapted.sites.values()) == 4 * (13 + 14 + 11)


def test_compact_keeps_the_map_and_its_scale():
    adapted, step = attached()
    for _ in range(20):
        step()
    x = torch.randn(9, 5, dtype=torch.float64, generator=generator(6))
    before, ranks = adapted(x).detach(), adapted.controller.ranks()
    scales = [a.scale for a in adapted.adapters.values()]
    for adapter in adapted.adapters.values():
        adapter.compact()
    assert {n: len(a.E) for n, a in adapted.adapters.items()} == ranks
    assert [a.scale for a in adapted.adapters.values()] == scales
    assert sum(a.P.numel() + a.Q.numel() for a in adapted.adapters.values()) < 4 * (12 + 13 + 10)
    torch.testing.assert_close(adapted(x), before, rtol=1e-12, atol=1e-12)


def test_compact_of_a_layer_without_triplets_leaves_the_base():
    model, base = network(), network()
    adapted = adapt(model, METHOD, targets=["2"])
    assert adapted.costs()["changed"] == 6 * 7
    adapted.adapters["2"].compact()
    assert adapted.costs()["changed"] == 0
    assert adapted.adapters["2"].P.shape == (6, 0)
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(adapted(x), base(x))


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(2, 3, 3, stride=2), (2, 2, 6, 6)),
        (nn.Conv1d(4, 6, 3, groups=2), (4, 9)),
        (nn.Linear(4, 5), (3, 4)),
    ],
)
def test_a_layer_that_lost_all_triplets_runs_as_its_base(layer, shape, hooked, tmp_path):
    model, x = nn.Sequential(copy.deepcopy(layer)), torch.rand(shape)
    base, plain = model(x), copy.deepcopy(model)
    adapted = adapt(model, AdaLoRA(rank=2, target_rank=1), "0")
    adapted.adapters["0"].compact()
    adapted.calm()
    adapted.save(tmp_path / "none.safetensors")
    assert torch.equal(toolkit.load(plain, tmp_path / "none.safetensors")(x), base)
    if hooked:
        model[0].base.register_forward_hook(lambda *_: None)
    assert torch.equal(model(x), base)
    torch.testing.assert_close(adapted.merge()(x), base)


def test_a_compacted_adapter_is_saved_and_loaded(tmp_path):
    adapted, step = attached()
    for _ in range(20):
        step()
    x = torch.randn(9, 5, dtype=torch.float64, generator=generator(6))
    for adapter in adapted.adapters.values():
        adapter.compact()
    adapted.save(tmp_path / "a.safetensors")
    again = toolkit.load(network(), tmp_path / "a.safetensors")
    torch.testing.assert_close(again(x), adapted(x), rtol=0, atol=0)


# --- the budget b(t) -----------------------------------------------------------------------------

SCHEDULES = [(30, 10, 100, 500, 1500), (12, 0, 0, 0, 7), (9, 9, 2, 3, 20), (1000, 1, 5, 1, 50)]


@pytest.mark.parametrize(("initial", "target", "warmup", "final", "total"), SCHEDULES)
def test_budget_shrinks_from_the_initial_to_the_target(initial, target, warmup, final, total):
    b = [budget(t, initial, target, warmup, final, total) for t in range(total + 1)]
    assert b[: warmup + 1] == [initial] * (warmup + 1)
    assert b[total - final :] == [target] * (final + 1)
    assert all(now >= then for now, then in pairwise(b))
    assert all(isinstance(value, int) for value in b)


def test_budget_follows_the_cubic():
    # halfway between 10 and 30 the cube leaves an eighth of the way: 4 + 16 / 8
    assert budget(20, 20, 4, 10, 10, 40) == 6
    assert budget(15, 20, 4, 10, 10, 40) == int(4 + 16 * 0.75**3)


# --- scores --------------------------------------------------------------------------------------


def one_layer(P, E, Q, **options) -> tuple[AllocationController, nn.Module]:
    """A controller over one layer of the given P (m, r), E (r,), Q (r, n) that never prunes."""
    P, E, Q = (torch.tensor(t, dtype=torch.float64) for t in (P, E, Q))
    layer = nn.Module()
    layer.P, layer.Q = nn.Parameter(P), nn.Parameter(Q)
    layer.E = nn.Parameter(E[:, None])
    defaults = {"rank": len(E), "target_rank": len(E), "orthogonality": 0.0}
    method = AdaLoRA(**(defaults | options))
    optimizer = torch.optim.SGD(layer.parameters())
    return AllocationController(method, {"layer": layer}, optimizer, total_steps=100), layer


def give(layer, gP, gE, gQ) -> None:
    for tensor, grad in ((layer.P, gP), (layer.E, gE), (layer.Q, gQ)):
        tensor.grad = torch.tensor(grad, dtype=torch.float64).reshape(tensor.shape)


def test_two_steps_by_hand():
    controller, layer = one_layer(
        [[1.0], [2.0]], [3.0], [[4.0, -5.0, 0.0]], rank=1, beta1=0.5, beta2=0.25
    )
    give(layer, [[2.0], [1.0]], [1.0], [[1.0, 2.0, 7.0]])
    controller.before_step()
    controller.after_step()
    # I = |w g|: P 2, 2; E 3; Q 4, 10, 0.  Ibar = I / 2.  Ubar = 3/4 |I - Ibar| = 3/8 I.
    # s = Ibar Ubar = 3/16 I^2: P 0.75, 0.75; E 1.6875; Q 3, 18.75, 0
    assert controller.scores()[0].item() == pytest.approx(1.6875 + 0.75 + (3 + 18.75) / 3)
    give(layer, [[0.0], [1.0]], [-1.0], [[0.0, 0.0, 0.0]])
    controller.before_step()
    controller.after_step()
    # I = P 0, 2; E 3; Q 0, 0, 0
    # Ibar = P 0.5, 1.5; E 2.25; Q 1, 2.5, 0
    # Ubar = Ubar / 4 + 3/4 |I - Ibar|:
    #   P 0.1875 + 0.375, 0.1875 + 0.375; E 0.28125 + 0.5625; Q 0.375 + 0.75, 0.9375 + 1.875, 0
    want = 2.25 * 0.84375 + (0.5 * 0.5625 + 1.5 * 0.5625) / 2 + (1 * 1.125 + 2.5 * 2.8125) / 3
    assert controller.scores()[0].item() == pytest.approx(want)
    # the mean of the products is not the product of the means
    wrong = 2.25 * 0.84375 + 1.0 * 0.5625 + (3.5 / 3) * (3.9375 / 3)
    assert controller.scores()[0].item() != pytest.approx(wrong)


@pytest.mark.parametrize("score", ["full", "sensitivity", "magnitude"])
def test_scores_equal_a_plain_numpy_loop(score):
    rng = np.random.default_rng(0)
    r, m, n, b1, b2 = 3, 4, 5, 0.7, 0.9
    P, E, Q = rng.normal(size=(m, r)), rng.normal(size=r), rng.normal(size=(r, n))
    controller, layer = one_layer(P, E, Q, rank=r, beta1=b1, beta2=b2, score=score)
    mean = [np.zeros_like(t) for t in (P, E, Q)]
    spread = [np.zeros_like(t) for t in (P, E, Q)]
    for _ in range(6):
        grads = [rng.normal(size=t.shape) for t in (P, E, Q)]
        give(layer, *grads)
        controller.before_step()
        with torch.no_grad():  # what an optimizer does between the two hooks
            for t in (layer.P, layer.E, layer.Q):
                t -= 0.1 * t.grad
        controller.after_step()
        for k, g in enumerate(grads):
            (P, E, Q)[k][...] -= 0.1 * g
            now = np.abs((P, E, Q)[k] * g)
            mean[k] = b1 * mean[k] + (1 - b1) * now
            spread[k] = b2 * spread[k] + (1 - b2) * np.abs(now - mean[k])
    s = [i * u for i, u in zip(mean, spread, strict=True)] if score == "full" else mean
    want = s[1] + s[0].mean(0) + s[2].mean(1) if score != "magnitude" else np.abs(E)
    np.testing.assert_allclose(controller.scores()[0].numpy(), want, rtol=1e-12)


def test_scores_count_each_step_once_under_gradient_accumulation():
    adapted, _ = attached(dataclasses.replace(METHOD, orthogonality=0.0))
    controller = adapted.controller
    x = torch.randn(8, 5, dtype=torch.float64, generator=generator(4))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    controller.remove()
    adapted.controller = None
    adapted.attach(optimizer, total_steps=20)
    for half in (x[:4], x[4:]):
        adapted(half).square().sum().backward()
    optimizer.step()
    parts = adapted.controller.sensitivity
    assert adapted.controller.step == 1
    for t, s in zip(adapted.controller.tensors, parts, strict=True):
        torch.testing.assert_close(s, 0.15 * (t.detach() * t.grad).abs())


def test_scores_use_the_updated_parameter_and_the_gradient_that_updated_it():
    adapted, step = attached(dataclasses.replace(METHOD, orthogonality=0.0))
    step()
    for t, s in zip(adapted.controller.tensors, adapted.controller.sensitivity, strict=True):
        torch.testing.assert_close(s, 0.15 * (t.detach() * t.grad).abs())
    # lambda started at 0: scored before the step, its sensitivity would be 0
    assert adapted.controller.sensitivity[1].min() > 0


def test_scores_are_frozen_in_the_final_phase():
    adapted, step = attached()
    for _ in range(16):
        step()
    assert adapted.controller.step == 16
    before = [s.clone() for s in adapted.controller.scores()]
    for _ in range(4):
        step()
    for a, b in zip(before, adapted.controller.scores(), strict=True):
        assert torch.equal(a, b)


# --- pruning -------------------------------------------------------------------------------------


def test_after_each_allocation_as_many_lambdas_are_left_as_the_budget_says():
    adapted, step = attached()
    allocations = []
    for t in range(20):
        step()
        alive = int((lambdas(adapted) != 0).sum())
        pruned = t > 3 and (t % 2 == 0 or t > 16)
        if pruned:
            allocations.append(t)
            assert alive == budget(t, 12, 6, 3, 4, 20) == adapted.controller.budget
        elif t <= 3:
            assert alive == 12
    assert allocations == [4, 6, 8, 10, 12, 14, 16, 17, 18, 19]


def test_a_pruned_triplet_can_come_back_before_the_final_phase():
    adapted, step = attached(total_steps=40)
    back = 0
    for t in range(36):
        dead = lambdas(adapted) == 0
        step()
        if 4 < t < 35 and t % 2 == 1:  # no allocation ends this step
            back += int((dead & (lambdas(adapted) != 0)).sum())
    assert back > 0


def test_a_triplet_dropped_by_mistake_is_taken_back_when_its_score_rises():
    first, later = torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 2.0, 3.0])

    def scorer(controller):
        order = first if controller.step < 20 else later
        return [order + i / 10 for i in range(3)]

    adapted, step = attached(dataclasses.replace(METHOD, warmup=2), total_steps=40, scorer=scorer)
    for t in range(40):
        step()
        if t == 18:
            before = lambdas(adapted).view(3, 4)
    after = lambdas(adapted).view(3, 4)
    assert (before[:, 3] == 0).all()
    assert (before[:, :2] != 0).all()
    assert (after[:, :2] == 0).all()
    assert (after[:, 2:].abs() > 1e-3).all()  # not only chosen, but worth something again


def test_in_the_final_phase_the_pattern_never_changes():
    adapted, step = attached(total_steps=60)
    for _ in range(57):
        step()
    pattern, values = lambdas(adapted) != 0, lambdas(adapted)
    for _ in range(3):
        step()
        assert torch.equal(lambdas(adapted) != 0, pattern)
    assert not torch.equal(lambdas(adapted), values)  # those kept still train


def test_all_that_tie_at_the_threshold_go():
    controller, layer = one_layer([[1.0] * 4], [1.0] * 4, [[1.0]] * 4, rank=4)
    controller.scorer = lambda c: [torch.tensor([0.5, 0.0, 0.5, 2.0])]
    controller.prune(2)  # the second smallest is 0.5, and 0.5 stands twice
    assert layer.E[:, 0].tolist() == [0.0, 0.0, 0.0, 1.0]


def test_before_any_gradient_all_scores_tie_and_everything_would_go():
    controller, layer = one_layer([[1.0] * 4], [1.0] * 4, [[1.0]] * 4, rank=4)
    controller.prune(3)
    assert layer.E.abs().sum() == 0


def test_a_target_equal_to_the_start_prunes_nothing():
    adapted, step = attached(dataclasses.replace(METHOD, target_rank=4))
    for _ in range(20):
        step()
    assert list(adapted.controller.ranks().values()) == [4, 4, 4]
    assert adapted.controller.budget == 12


def test_a_target_of_zero_prunes_everything():
    adapted, step = attached(dataclasses.replace(METHOD, target_rank=0))
    for _ in range(20):
        step()
    assert lambdas(adapted).abs().max() == 0


def test_a_scorer_replaces_the_score():
    wanted = {"0": 0, "2": 4, "4": 1}

    def scorer(controller):
        return [
            (torch.arange(4) < wanted[name]) * 10.0 - torch.arange(4) - i / 10
            for i, name in enumerate(controller.names)
        ]

    adapted, step = attached(
        dataclasses.replace(METHOD, target_rank=2, total_rank=5), scorer=scorer
    )
    for _ in range(20):
        step()
    assert adapted.controller.ranks() == wanted


def test_an_unused_layer_gets_no_task_gradient_and_loses_its_triplets():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(5, 4), nn.Linear(5, 4)

        def forward(self, x):
            return self.used(x)

    model = Forked()
    method = AdaLoRA(rank=4, target_rank=2, orthogonality=0.0)
    adapted = adapt(model, method, generator=generator())
    optimizer = torch.optim.Adam(adapted.parameters(), lr=0.05)
    adapted.attach(optimizer, total_steps=20)
    x = torch.randn(16, 5, generator=generator(1))
    for _ in range(20):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    assert adapted.controller.ranks() == {"used": 4, "unused": 0}
    assert torch.equal(model.unused.adapter.E, torch.zeros(4, 1))


def test_the_penalty_reaches_an_unused_layer():
    adapted = adapt(nn.ModuleDict({"a": nn.Linear(5, 4), "b": nn.Linear(5, 4)}), METHOD)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    adapted.attach(optimizer, total_steps=20)
    before = adapted.adapters["b"].P.detach().clone()
    adapted.model["a"](torch.randn(3, 5)).sum().backward()
    optimizer.step()
    assert not torch.equal(adapted.adapters["b"].P, before)


# --- the penalty ---------------------------------------------------------------------------------


def random_pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    shapes = [(6, 3, 5), (6, 3, 5), (4, 2, 7)]
    g = generator(9)
    return [
        (torch.randn(m, r, generator=g).double(), torch.randn(r, n, generator=g).double())
        for m, r, n in shapes
    ]


@pytest.mark.parametrize("squared", [False, True])
def test_penalty_is_zero_for_orthonormal_vectors_and_has_no_nan_there(squared):
    pairs = [
        (torch.linalg.qr(P)[0], torch.linalg.qr(Q.T)[0].T.contiguous()) for P, Q in random_pairs()
    ]
    assert orthogonality(pairs, squared).item() == pytest.approx(0, abs=1e-12)
    exact = [(torch.eye(5, 3), torch.eye(3, 4))]
    assert all(g.abs().max() == 0 for g in value_and_gradients(exact, squared)[1])


@pytest.mark.parametrize("squared", [False, True])
def test_penalty_is_invariant_to_rotations(squared):
    pairs = random_pairs()
    turned = []
    for P, Q in pairs:
        O = torch.linalg.qr(torch.randn(len(Q), len(Q), generator=generator(3)).double())[0]
        turned.append((P @ O.T, O @ Q))
    torch.testing.assert_close(orthogonality(turned, squared), orthogonality(pairs, squared))


@pytest.mark.parametrize("squared", [False, True])
def test_batched_gradient_of_the_penalty_equals_autograd(squared):
    pairs = [(P.requires_grad_(), Q.requires_grad_()) for P, Q in random_pairs()]
    flat = [t for pair in pairs for t in pair]
    want = torch.autograd.grad(orthogonality(pairs, squared), flat)
    value, got = value_and_gradients([(P.detach(), Q.detach()) for P, Q in pairs], squared)
    torch.testing.assert_close(value, orthogonality(pairs, squared).detach())
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_penalty_values_by_hand():
    P, Q = 2 * torch.eye(3, 2), torch.eye(2, 3)  # P'P - I = 3 I, norm 3 sqrt 2
    assert orthogonality([(P, Q)]).item() == pytest.approx(3 * 2**0.5 / 2)
    assert orthogonality([(P, Q)], squared=True).item() == pytest.approx(18)


@pytest.mark.parametrize("like", ["code", "paper"])
def test_the_step_uses_gamma_times_the_penalty(like):
    squared = like == "paper"
    method = dataclasses.replace(METHOD, orthogonality=0.3, like=like)
    adapted = adapt(network(), method, generator=generator(1))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1.0)
    adapted.attach(optimizer, total_steps=20)
    x = torch.randn(6, 5, dtype=torch.float64, generator=generator(2))
    before = [(a.P.detach().clone(), a.Q.detach().clone()) for a in adapted.adapters.values()]
    pairs = [(a.P, a.Q) for a in adapted.adapters.values()]
    loss = adapted(x).square().mean()
    want = torch.autograd.grad(
        loss + 0.3 * orthogonality(pairs, squared), adapted.parameters(), retain_graph=True
    )
    loss.backward()
    start = [p.detach().clone() for p in adapted.parameters()]
    optimizer.step()
    for p, old, g in zip(adapted.parameters(), start, want, strict=True):
        torch.testing.assert_close(p.detach(), old - g)
    assert not torch.equal(before[0][0], adapted.adapters["0"].P)


@pytest.mark.parametrize("like", ["code", "paper"])
def test_the_penalty_can_stand_in_the_loss_instead_of_the_step(like):
    """The same training without clipping; with it, the penalty is clipped too."""
    method = dataclasses.replace(METHOD, orthogonality=0.3, like=like)
    x, ends = torch.randn(6, 5, dtype=torch.float64, generator=generator(2)), []
    for place in ("step", "loss"):
        adapted = adapt(network(), method, generator=generator(1))
        optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
        adapted.attach(optimizer, total_steps=20, penalty=place)
        assert adapted.controller.last_penalty is None
        for _ in range(8):
            optimizer.zero_grad()
            value = adapted.controller.penalty()
            loss = adapted(x).square().mean()
            (loss + (place == "loss") * 0.3 * value).backward()
            optimizer.step()
            torch.testing.assert_close(adapted.controller.last_penalty, value.detach())
            assert not adapted.controller.last_penalty.requires_grad
        ends.append(adapted.parameters())
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match='"step" or "loss"'):
        attached(method, penalty="never")


# --- the history ---------------------------------------------------------------------------------


def test_every_allocation_is_recorded_with_what_decided_it():
    adapted, step = attached()
    kept = {}
    for t in range(20):
        step()
        if adapted.controller.history and adapted.controller.history[-1].step == t:
            kept[t] = adapted.controller.ranks(), [s.clone() for s in adapted.controller.scores()]
    history = adapted.controller.history
    assert [r.step for r in history] == [4, 6, 8, 10, 12, 14, 16, 17]  # 17: the final phase's one
    for record in history:
        ranks, scores = kept[record.step]
        assert record.total == budget(record.step, 12, 6, 3, 4, 20)
        assert record.ranks == ranks
        for name, score in zip(record.ranks, scores, strict=True):
            torch.testing.assert_close(record.scores[name].double(), score, rtol=1e-6, atol=0)
            assert int((record.scores[name] > record.threshold).sum()) == ranks[name]
    table = adapted.controller.history.table()
    assert list(table.columns) == ["step", "total", "threshold", "layer", "score", "rank"]
    assert len(table) == 3 * len(history)
    assert (table.groupby("step")["rank"].sum() == table.groupby("step")["total"].first()).all()
    pd.testing.assert_frame_equal(adapted.controller.table(), table)


def test_a_long_run_keeps_about_a_thousand_records():
    method = AdaLoRA(rank=1, target_rank=0, orthogonality=0.0)
    adapted = adapt(nn.Sequential(nn.Linear(1, 1)), method)
    adapted.attach(torch.optim.SGD(adapted.parameters(), lr=0.0), total_steps=2500)
    controller = adapted.controller
    for controller.step in range(2500):
        controller.prune(0)
    assert [r.step for r in controller.history] == [*range(0, 2500, 3)]


# --- going on, and going wrong -------------------------------------------------------------------


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    def start(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        model.attach(optimizer, total_steps=20)
        return optimizer

    x = torch.randn(16, 5, dtype=torch.float64, generator=generator(2))
    y = torch.randn(16, 4, dtype=torch.float64, generator=generator(3))

    def train(adapted, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (adapted(x) - y).square().mean().backward()
            optimizer.step()

    whole = adapt(network(), METHOD, generator=generator(1))
    train(whole, start(whole), 20)
    first = adapt(network(), METHOD, generator=generator(1))
    train(first, start(first), 9)
    first.save(tmp_path / "half.safetensors", resume=True)
    second = toolkit.load(network(), tmp_path / "half.safetensors")
    optimizer = start(second)
    assert second.controller.step == 9
    assert second.controller.budget == first.controller.budget
    train(second, optimizer, 11)
    assert second.controller.ranks() == whole.controller.ranks()
    pd.testing.assert_frame_equal(second.controller.table(), whole.controller.table())
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("warmup", "final"), [(10, 10), (20, 0), (15, 9)])
def test_a_schedule_that_does_not_fit_is_refused(warmup, final):
    method = AdaLoRA(rank=4, target_rank=2, warmup=warmup, final=final)
    with pytest.raises(ValueError, match=r"warmup=.*total_steps=20"):
        attached(method)


def test_total_steps_must_be_given():
    adapted = adapt(network(), METHOD)
    with pytest.raises(ValueError, match=r"total_steps=T"):
        adapted.attach(torch.optim.Adam(adapted.parameters()))
    assert adapted.controller is None


def test_a_target_above_the_start_is_refused():
    with pytest.raises(ValueError, match=r"target_rank=5.*rank=4"):
        AdaLoRA(rank=4, target_rank=5)
    with pytest.raises(ValueError, match=r"total_rank=13.*12 triplets"):
        attached(dataclasses.replace(METHOD, total_rank=13))


@pytest.mark.parametrize("name", ["beta1", "beta2"])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_beta_lies_strictly_between_0_and_1(name, value):
    with pytest.raises(ValueError, match=name):
        AdaLoRA(**{name: value})


def test_an_unknown_score_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="sensitivity"):
        AdaLoRA(score="norm")


def test_a_step_before_any_gradient_is_refused_and_changes_nothing():
    adapted = adapt(network(), METHOD, generator=generator())
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1.0)
    adapted.attach(optimizer, total_steps=20)
    before = [p.detach().clone() for p in adapted.parameters()]
    with pytest.raises(RuntimeError, match=r"backward"):
        optimizer.step()
    adapted(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
    optimizer.zero_grad()  # too early: this removes what the method must read
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) only after step"):
        optimizer.step()
    assert adapted.controller.step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, adapted.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_at_an_allocation_is_refused_and_changes_nothing():
    adapted, step = attached(dataclasses.replace(METHOD, warmup=0, interval=1))
    step()
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1.0)
    adapted.controller.remove()
    adapted.schedule(adapted.method).waiting = adapted.controller.state()
    adapted.controller = None
    adapted.attach(optimizer, total_steps=20)
    before = [p.detach().clone() for p in adapted.parameters()]
    adapted(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
    adapted.adapters["2"].Q.grad[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"'2\.Q'"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, adapted.parameters(), strict=True))


def fused(kind: str, scaler: torch.amp.GradScaler | None):
    adapted = adapt(network().float(), METHOD, generator=generator())
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1, fused=True)
    adapted.attach(optimizer, total_steps=20)
    x = torch.ones(2, 5)

    def step(size: float = 1.0) -> None:
        optimizer.zero_grad()
        loss = (size * adapted(x)).square().sum()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
            return
        if kind == "unscaled":
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    return adapted, step


def test_gradients_that_a_scaler_left_scaled_are_refused_and_nothing_changes():
    adapted, step = fused("scaled", torch.amp.GradScaler("cpu", init_scale=1024.0))
    before = [p.detach().clone() for p in adapted.parameters()]
    with pytest.raises(RuntimeError, match=r"unscale_.*fused=False"):
        step()
    assert adapted.controller.step == 0
    assert not any(s.any() for s in adapted.controller.sensitivity)
    assert all(torch.equal(a, b) for a, b in zip(before, adapted.parameters(), strict=True))


def test_unscaled_gradients_of_a_fused_optimizer_are_read_and_a_skipped_step_is_none():
    plain, plain_step = fused("", None)
    adapted, step = fused("unscaled", torch.amp.GradScaler("cpu", init_scale=1024.0))
    for t in range(8):
        plain_step()
        step()
        if t in (2, 4):  # the scaler finds inf and has the optimizer skip the step
            state = {k: v.clone() for k, v in adapted.controller.state().items()}
            step(float("inf"))
            assert all(torch.equal(v, state[k]) for k, v in adapted.controller.state().items())
    assert adapted.controller.step == 8
    assert adapted.controller.ranks() == plain.controller.ranks()
    for a, b in zip(plain.parameters(), adapted.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_state_of_other_layers_is_refused():
    adapted, step = attached()
    step()
    adapted.controller.remove()
    adapted.schedule(adapted.method).waiting = {"step": torch.tensor(3)}
    adapted.controller = None
    with pytest.raises(ValueError, match=r"does not fit AdaLoRA.*missing"):
        adapted.attach(torch.optim.SGD(adapted.parameters()), total_steps=20)
