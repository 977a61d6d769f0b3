"""What only SaRA must satisfy: its mask, its two stages, its nuclear norm, and files of values."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.contracts.contracts import check
from tests.contracts.rooms import Case
from toolkit import ID3, SaRA, adapt, load
from toolkit.select.sara import learning_rate, threshold_at
from toolkit.select.sara.nuclear import dense, gradient, norm
from toolkit.select.sara.values import fill, values

DOUBLE = torch.float64
OFF = {"rank_weight": 0.0}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def network(wide: int = 9) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, wide), nn.Tanh(), nn.Linear(wide, 4)).double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(0.3 * drawn(*parameter.shape, seed=number))
    return model


def loss(model: nn.Module, number: int) -> torch.Tensor:
    return F.mse_loss(model(drawn(12, 6, seed=50 + number)), drawn(12, 4, seed=90))


def trained(
    model: nn.Module, method: SaRA, steps: int, total: int = 10, sgd: bool = False, **options
):
    adapted = adapt(model, method)
    kind = torch.optim.SGD if sgd else torch.optim.AdamW
    more = {"momentum": 0.9} if sgd else {"weight_decay": 0.1}
    optimizer = kind(adapted.parameters(), lr=0.05, **more)
    adapted.attach(optimizer, total_steps=total, **options)
    for number in range(steps):
        optimizer.zero_grad()
        loss(model, number).backward()
        optimizer.step()
    return adapted, optimizer


def weights(adapted) -> dict[str, torch.Tensor]:
    return {n: p.merged()["weight"].detach() for n, p in adapted.sites.items()}


def by_hand(model, method, steps, switch, sgd, drawn_matrix=None):
    """The masked dense update: every weight is held in full, the frozen ones are put back."""
    layers = {"0": model[0], "2": model[2]}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    masks = {n: layer.weight.abs() < method.threshold for n, layer in layers.items()}
    moments = {n: [torch.zeros_like(layer.weight) for _ in range(2)] for n, layer in layers.items()}
    begun = 0
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    for step in range(steps):
        if step == switch:
            masks = {n: m & (layers[n].weight.abs() < method.threshold) for n, m in masks.items()}
            if method.moments == "fresh":
                begun = step
                moments = {n: [torch.zeros_like(m) for m in pair] for n, pair in moments.items()}
        grads = torch.autograd.grad(loss(model, step), [k.weight for k in layers.values()])
        for (n, layer), grad in zip(layers.items(), grads, strict=True):
            if method.rank_weight and drawn_matrix in (None, n):
                U, _, V = torch.linalg.svd(layer.weight.detach() * masks[n], full_matrices=False)
                grad = grad + method.rank_weight * (U @ V)
            with torch.no_grad():
                m, v = moments[n]
                if sgd:
                    m.mul_(0.9).add_(grad)
                    new = layer.weight - 0.05 * m
                else:
                    m.lerp_(grad, 0.1)
                    v.mul_(0.999).add_(0.001 * grad * grad)
                    t = step - begun + 1
                    move = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
                    new = layer.weight * (1 - 0.05 * 0.1) - 0.05 * move
                layer.weight.copy_(torch.where(masks[n], new, layer.weight))
    return {n: layer.weight.detach() for n, layer in layers.items()}


@pytest.mark.parametrize("sgd", [False, True])
@pytest.mark.parametrize("moments", ["fresh", "kept"])
def test_the_trajectory_is_that_of_the_masked_dense_update(sgd: bool, moments: str) -> None:
    method = SaRA(threshold=0.2, switch=4, moments=moments, like="paper", rank_weight=0.01)
    adapted, _ = trained(network(), method, 8, sgd=sgd)
    for name, expected in by_hand(network(), method, 8, 4, sgd).items():
        torch.testing.assert_close(weights(adapted)[name], expected, rtol=0, atol=1e-12)
    assert adapted.controller.stage == 2


def test_the_start_is_the_base_bit_for_bit_with_negative_weights_too() -> None:
    model = network()
    x, before = drawn(5, 6), network()(drawn(5, 6))
    adapted = adapt(model, SaRA(threshold=0.3))
    assert min(a.values.min() for a in adapted.adapters.values()) < 0
    assert torch.equal(model(x), before)
    # the published optimizer scatters absolute values: another model before its first step
    wrong = network()
    with torch.no_grad():
        for layer in (wrong[0], wrong[2]):
            small = layer.weight.abs() < 0.3
            layer.weight[small] = layer.weight[small].abs()
    assert not torch.allclose(wrong(x), before)


def test_what_is_not_below_the_threshold_keeps_its_bits_under_decay() -> None:
    base = network()
    adapted, _ = trained(network(), SaRA(threshold=0.2, switch=None, **OFF), 6)
    for name, new in weights(adapted).items():
        old = base.get_submodule(name).weight
        moves = old.abs() < 0.2  # strictly below
        assert torch.equal(new[~moves], old[~moves])
        assert bool((new[moves] != old[moves]).all())


def test_an_entry_at_the_threshold_stays() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[0.25, 0.125]])
    assert adapt(model, SaRA(threshold=0.25)).adapters["0"].index.tolist() == [1]


def test_the_second_stage_holds_what_grew_where_it_was() -> None:
    method = SaRA(threshold=0.2, switch=4, **OFF)
    first, _ = trained(network(), method, 4)
    whole, _ = trained(network(), method, 9)
    for name, layer in whole.adapters.items():
        base, at_switch, after = (
            t.reshape(-1)
            for t in (
                network().get_submodule(name).weight,
                weights(first)[name],
                weights(whole)[name],
            )
        )
        chosen = base.abs() < 0.2
        small = chosen & (at_switch.abs() < 0.2)
        assert layer.index.tolist() == small.nonzero()[:, 0].tolist()
        assert layer.left.tolist() == (chosen & ~small).nonzero()[:, 0].tolist()
        assert torch.equal(after[chosen & ~small], at_switch[chosen & ~small])
        assert bool((after[small] != at_switch[small]).all())
        assert 0 < len(layer.index) < int(chosen.sum())


@pytest.mark.parametrize("method", [SaRA(threshold=0.2, switch=2, **OFF), ID3(budget=9)])
def test_the_costs_count_what_ever_moved_and_what_still_trains(method) -> None:
    adapted, _ = trained(network(), method, 5)
    base, merged = network(), copy.deepcopy(adapted).merge()
    differ = sum(int((merged[i].weight != base[i].weight).sum()) for i in (0, 2))
    costs = adapted.costs()
    assert costs["changed"] == differ
    assert costs["trained"] == sum(len(a.values) for a in adapted.adapters.values())


def test_the_costs_count_a_layer_in_which_nothing_trains_any_more(tmp_path) -> None:
    adapted, _ = trained(network(), SaRA(threshold=0.2, switch=4, **OFF), 4)
    ever = {name: a.changed for name, a in adapted.adapters.items()}
    adapted.controller.rechoose({"0": torch.empty(0, dtype=torch.long)})
    trains = adapted.adapters["2"].values.numel()
    costs = adapted.costs()
    assert (costs["trained"], costs["changed"]) == (trains, sum(ever.values()))
    adapted.save(tmp_path / "a.safetensors")
    assert load(network(), tmp_path / "a.safetensors").costs()["changed"] == costs["changed"]


def test_a_second_stage_in_which_nothing_grew_keeps_the_choice() -> None:
    adapted = adapt(network(), SaRA(threshold=0.2, switch=1, **OFF))
    before = {n: a.index.clone() for n, a in adapted.adapters.items()}
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-12)
    adapted.attach(optimizer, total_steps=3)
    loss(adapted.model, 0).backward()
    optimizer.step()
    assert adapted.controller.stage == 2
    assert all(torch.equal(a.index, before[n]) for n, a in adapted.adapters.items())


def test_gradient_and_state_have_the_length_of_the_choice() -> None:
    adapted, optimizer = trained(network(), SaRA(threshold=0.2, switch=4, **OFF), 3)
    loss(adapted.model, 0).backward()
    x, y = drawn(12, 6, seed=50), drawn(12, 4, seed=90)
    dense_model = network()
    for name, new in weights(adapted).items():
        dense_model.get_submodule(name).weight.data = new.clone()
    F.mse_loss(dense_model(x), y).backward()
    optimizer.zero_grad()
    loss(adapted.model, 0).backward()
    for name, layer in adapted.adapters.items():
        grad = dense_model.get_submodule(name).weight.grad.reshape(-1)[layer.index.long()]
        torch.testing.assert_close(layer.values.grad, grad, rtol=0, atol=1e-14)
        assert adapted.sites[name].layer.base.weight.grad is None
    for length in (3, 5):  # before and after the switch
        count = sum(len(a.index) for a in adapted.adapters.values())
        state = [v for s in optimizer.state.values() for v in s.values() if v.dim()]
        assert len(optimizer.state) == 2, length
        assert sum(v.numel() for v in state) == 2 * count
        for number in range(2):
            optimizer.zero_grad()
            loss(adapted.model, number).backward()
            optimizer.step()
    assert adapted.costs()["trained"] == count
    assert adapted.costs()["changed"] > count


def test_a_threshold_above_all_is_full_training_and_zero_changes_nothing() -> None:
    everything, _ = trained(network(), SaRA(threshold=1e6, switch=None, **OFF), 5)
    plain = network()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("weight" in name)
    optimizer = torch.optim.AdamW([plain[0].weight, plain[2].weight], lr=0.05, weight_decay=0.1)
    for number in range(5):
        optimizer.zero_grad()
        loss(plain, number).backward()
        optimizer.step()
    for name, new in weights(everything).items():
        torch.testing.assert_close(
            new, plain.get_submodule(name).weight.detach(), rtol=0, atol=1e-12
        )
    nothing, _ = trained(network(), SaRA(threshold=0.0, switch=2, **OFF), 4)
    for name, new in weights(nothing).items():
        assert torch.equal(new, network().get_submodule(name).weight)


def test_the_nuclear_norm_has_the_gradient_of_its_equation() -> None:
    shape, index = (6, 5), torch.arange(0, 30, 2)
    p = drawn(15)
    slope = gradient(shape, index, p)
    assert float(slope @ p) == pytest.approx(float(norm(shape, index, p)), rel=1e-12)
    for i in range(15):
        step = torch.zeros(15, dtype=DOUBLE)
        step[i] = 1e-6
        change = norm(shape, index, p + step) - norm(shape, index, p - step)
        assert float(slope[i]) == pytest.approx(float(change) / 2e-6, abs=1e-7)
    assert torch.equal(dense(shape, index, p).reshape(-1)[index], p)


def test_directions_of_no_size_have_no_gradient() -> None:
    one = torch.outer(drawn(4), drawn(3, seed=1)).reshape(-1)  # rank 1
    slope = gradient((4, 3), torch.arange(12), one).view(4, 3)
    assert int(torch.linalg.matrix_rank(slope)) == 1
    assert bool(torch.isfinite(gradient((4, 3), torch.arange(12), torch.zeros(12))).all())


def test_the_norm_moves_the_weights_as_the_published_optimizer_does_not() -> None:
    ends = [
        weights(
            trained(network(), SaRA(threshold=0.3, switch=None, like="paper", rank_weight=w), 5)[0]
        )
        for w in (0.0, 1.0)
    ]
    assert not torch.equal(ends[0]["0"], ends[1]["0"])


def wide_network() -> nn.Sequential:
    model = nn.Sequential(
        nn.Linear(6, 70), nn.Tanh(), nn.Linear(70, 80), nn.Linear(80, 66), nn.Linear(66, 4)
    )
    return model.double()


def test_the_code_draws_one_large_matrix_in_each_step() -> None:
    method, told = SaRA(share=0.3, rank_weight=0.1), []
    adapted = adapt(wide_network(), method)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-3)
    adapted.attach(optimizer, total_steps=20, generator=torch.Generator().manual_seed(1))
    assert adapted.controller.matrices == ["2", "3"]  # the others have a side of 64 or less
    for number in range(8):
        optimizer.zero_grad()
        loss(adapted.model, number).backward()
        plain = {n: a.values.grad.clone() for n, a in adapted.adapters.items()}
        adapted.controller.before_step()
        changed = [
            n for n, a in adapted.adapters.items() if not torch.equal(a.values.grad, plain[n])
        ]
        assert changed == [adapted.controller.last_matrix]
        for n, a in adapted.adapters.items():
            a.values.grad.copy_(plain[n])
        optimizer.step()
        told.append(adapted.controller.last_matrix)
    assert set(told) == {"2", "3"}


def test_a_given_draw_decides_and_a_matrix_of_few_entries_is_passed_over() -> None:
    few = SaRA(share=100 / (70 * 80), rank_weight=0.1)  # 100 entries of layer 2, 53 of layer 3
    for method, draw, moved in (
        (few, "2", []),
        (SaRA(share=101 / (70 * 80), rank_weight=0.1), "2", ["2"]),
        (SaRA(share=0.3, rank_weight=0.1), None, []),
        (SaRA(share=0.3, rank_weight=0.1), "3", ["3"]),
    ):
        adapted = adapt(wide_network(), method)
        optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-3)
        adapted.attach(optimizer, total_steps=20, draw=lambda step, draw=draw: draw)
        loss(adapted.model, 0).backward()
        plain = {n: a.values.grad.clone() for n, a in adapted.adapters.items()}
        adapted.controller.before_step()
        assert moved == [
            n for n, a in adapted.adapters.items() if not torch.equal(a.values.grad, plain[n])
        ]
    adapted.controller.draw = lambda step: "0"
    with pytest.raises(ValueError, match="'0'"):
        adapted.controller.before_step()


def test_the_rate_follows_from_the_threshold() -> None:
    assert learning_rate(2e-3) == pytest.approx(1e-3 * math.exp(-0.7))
    assert learning_rate(0.0) == 1e-3
    with pytest.raises(ValueError, match="threshold"):
        learning_rate(-1e-3)


def test_a_share_takes_the_smallest_of_each_tensor_and_threshold_at_of_all() -> None:
    model = network()
    model[2].weight.data *= 10
    adapted = adapt(copy.deepcopy(model), SaRA(share=0.25))
    for name, layer in adapted.adapters.items():
        sizes = model.get_submodule(name).weight.detach().abs().reshape(-1)
        expected = sizes.argsort()[: math.ceil(0.25 * len(sizes))].sort().values
        assert layer.index.tolist() == expected.tolist()
    theta = threshold_at(model, 0.25)
    adapted = adapt(model, SaRA(threshold=theta))
    counts = {n: len(a.index) for n, a in adapted.adapters.items()}
    assert sum(counts.values()) == math.ceil(0.25 * (54 + 36))
    assert counts["0"] > 5 * counts["2"]
    for share in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="share"):
            threshold_at(network(), share)


def test_values_alone_restore_the_weights_and_a_wrong_threshold_is_told() -> None:
    adapted, _ = trained(network(), SaRA(threshold=0.2, switch=4, **OFF), 8)
    saved = values(adapted)
    again = adapt(network(), SaRA(threshold=0.2))
    fill(again, saved)
    for name, new in weights(adapted).items():
        assert torch.equal(weights(again)[name], new)
    other = adapt(network(), SaRA(threshold=0.3))
    before = weights(other)
    counts = len(saved["0"]), other.adapters["0"].changed
    with pytest.raises(ValueError, match=rf"'0': {counts[0]} values.* {counts[1]} entries"):
        fill(other, saved)
    assert all(torch.equal(w, before[n]) for n, w in weights(other).items())
    with pytest.raises(ValueError, match="layers"):
        fill(again, {"0": saved["0"]})


@pytest.mark.parametrize("stop", [2, 6])
def test_a_saved_run_goes_on_as_if_it_had_not_stopped(stop: int, tmp_path) -> None:
    method = SaRA(threshold=0.25, switch=4, like="paper", rank_weight=0.01)
    whole, _ = trained(network(), method, 9, sgd=True)
    half, optimizer = trained(network(), method, stop, sgd=True)
    half.save(tmp_path / "half.safetensors", resume=True)
    again = load(network(), tmp_path / "half.safetensors")
    later = torch.optim.SGD(again.parameters(), lr=0.05, momentum=0.9)
    again.attach(later, total_steps=10)
    later.load_state_dict(optimizer.state_dict())
    for number in range(stop, 9):
        later.zero_grad()
        loss(again.model, number).backward()
        later.step()
    assert again.controller.stage == 2
    for name, new in weights(whole).items():
        assert torch.equal(weights(again)[name], new)


def test_a_state_dict_of_the_second_stage_loads_into_a_model_of_the_first() -> None:
    method = SaRA(threshold=0.25, switch=4, **OFF)
    done, _ = trained(network(), method, 6)
    fresh, optimizer = trained(network(), method, 1)
    fresh.model.load_state_dict(done.model.state_dict())
    assert fresh.controller.step == 6
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in fresh.parameters()}
    for number in range(6, 8):
        optimizer.zero_grad()
        loss(fresh.model, number).backward()
        optimizer.step()
    assert all(torch.equal(weights(done)[n].reshape(-1)[a.left.long()], a.held)
               for n, a in fresh.adapters.items())  # fmt: skip


def test_norms_are_masked_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    model[1].weight.data = torch.linspace(-0.5, 2, 8)
    adapted = adapt(model, SaRA(threshold=0.3), targets=["0", "1"])
    assert adapted.adapters["1"].index.tolist() == [1, 2]


def test_a_switch_outside_the_run_is_refused_before_anything_changes() -> None:
    for switch, total, words in (
        (10, 10, "outside the run"), (12, 10, "outside"), (0.5, 1, "outside"),
        (0.5, None, "total_steps"), (2.5, 10, "whole number"), (0.01, 10, "outside"),
    ):  # fmt: skip
        adapted = adapt(network(), SaRA(threshold=0.2, switch=switch, **OFF))
        optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=words):
            adapted.attach(optimizer, total_steps=total)
        assert adapted.controller is None
    for switch in (0, -3):
        with pytest.raises(ValueError, match="switch"):
            SaRA(switch=switch)


def test_bad_settings_are_refused_by_name() -> None:
    for setting in (
        {"threshold": -1e-3}, {"share": 0.0}, {"share": 1.0}, {"share": -0.2},
        {"rank_weight": -1.0}, {"like": "both"}, {"moments": "half"}, {"threshold": math.nan},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(setting))):
            SaRA(**setting)
    adapted = adapt(network(), SaRA(threshold=0.2, rank_weight=0.1))
    with pytest.raises(ValueError, match=r'rank_weight.*64.*like="paper"'):
        adapted.attach(torch.optim.SGD(adapted.parameters(), lr=0.1), total_steps=10)
    quantised = nn.Sequential(nn.Linear(4, 4))
    quantised[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises((TypeError, ValueError), match="'0'"):
        adapt(quantised, SaRA(threshold=0.1))


def test_conv_weights_take_no_part_in_the_norm() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 2)).double()
    adapted = adapt(model, SaRA(share=0.5, like="paper"), targets=nn.Conv1d)
    with pytest.raises(ValueError, match="two axes"):
        adapted.attach(torch.optim.SGD(adapted.parameters(), lr=0.1), total_steps=4)


@pytest.mark.parametrize("room", ["linear", "embedding", "conv2d", "hf_conv1d"])
@pytest.mark.parametrize(
    "contract",
    ["save_load_round_trip", "deepcopy_is_independent", "merged_equals_unmerged", "unload_restores",
     "deterministic_under_a_seed", "works_in_bfloat16"],
)  # fmt: skip
def test_the_contracts_hold_in_the_second_stage_too(contract: str, room: str) -> None:
    check(contract, Case(SaRA(share=0.5, switch=2, rank_weight=0.0), room))
