"""SaRA on biases: masked by the same threshold, stored beside the weight, outside the norm."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.contracts.contracts import CONTRACTS, check
from tests.contracts.rooms import Case
from tests.select.test_sara import drawn, loss, network, trained
from toolkit import Train, adapt, load
from toolkit.select.sara.biases import SaRABiases

METHOD = SaRABiases(threshold=0.2, switch=4, like="paper", rank_weight=0.01, moments="kept")


def numbers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def by_hand(model: nn.Module, steps: int, switch: int) -> dict[str, torch.Tensor]:
    """The masked dense update of every tensor, as the published optimizer does it."""
    masks = {name: p.detach().abs() < 0.2 for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(steps):
        before = numbers(model)
        if step == switch:
            masks = {name: m & (before[name].abs() < 0.2) for name, m in masks.items()}
        optimizer.zero_grad()
        loss(model, step).backward()
        for name, p in model.named_parameters():
            if p.dim() == 2:
                U, _, V = torch.linalg.svd(p.detach() * masks[name], full_matrices=False)
                p.grad += 0.01 * (U @ V)
            p.grad *= masks[name]
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(torch.where(masks[name], p, before[name]))
    return numbers(model)


@pytest.mark.parametrize("steps", [3, 9])
def test_the_trajectory_is_that_of_the_masked_dense_update_of_every_tensor(steps) -> None:
    adapted, _ = trained(network(), METHOD, steps)
    found, base = numbers(adapted.merge()), numbers(network())
    for name, expected in by_hand(network(), steps, 4).items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-12)
        still = base[name].abs() >= 0.2
        assert torch.equal(found[name][still], base[name][still])
    assert any((found[n] != base[n]).any() for n in base if n.endswith("bias"))
    for name, value in numbers(adapted.unmerge().unload()).items():
        assert torch.equal(value, base[name])


def test_the_start_is_the_base_and_the_count_is_that_of_all_small_numbers() -> None:
    model, x = network(), drawn(5, 6)
    before = model(x)
    small = sum(int((p.abs() < 0.2).sum()) for p in network().parameters())
    adapted = adapt(model, METHOD)
    assert torch.equal(model(x), before)
    assert adapted.costs()["trained"] == adapted.costs()["changed"] == small
    assert sum(METHOD.count(p.site) for p in adapted.sites.values()) == small


def test_a_share_is_one_of_weight_and_bias_together() -> None:
    adapted = adapt(network(), SaRABiases(share=0.25, rank_weight=0.0))
    for i in (0, 2):
        both = torch.cat([network()[i].weight.reshape(-1), network()[i].bias]).abs()
        smallest = both.argsort()[: -(-len(both) // 4)].sort().values
        assert adapted.adapters[str(i)].index.tolist() == smallest.tolist()


def test_a_run_with_biases_goes_on_from_a_file(tmp_path) -> None:
    adapted, optimizer = trained(network(), METHOD, 6)
    adapted.save(tmp_path / "half.safetensors", resume=True)
    again = load(network(), tmp_path / "half.safetensors")
    assert torch.equal(again(drawn(5, 6)), adapted(drawn(5, 6)))
    assert again.costs()["changed"] == adapted.costs()["changed"]
    other = torch.optim.AdamW(again.parameters(), lr=0.05, weight_decay=0.1)
    again.attach(other, total_steps=10)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for handle, steps in ((adapted, optimizer), (again, other)):
        for number in (6, 7):
            steps.zero_grad()
            loss(handle.model, number).backward()
            steps.step()
    assert torch.equal(again(drawn(5, 6)), adapted(drawn(5, 6)))
    shifted = network()
    with torch.no_grad():
        shifted[0].bias[adapted.adapters["0"].places()[-1] - 54] += 1
    with pytest.raises(ValueError, match="another base"):
        load(shifted, tmp_path / "half.safetensors")


def test_layers_of_every_kind_and_those_without_a_bias() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 8, bias=False), nn.Conv1d(3, 5, 2)
    )
    with torch.no_grad():
        model[1].bias.copy_(torch.linspace(-1, 1, 8))
    x = torch.tensor([[0, 3, 8]])
    before = model(x).detach()
    method = SaRABiases(threshold=0.5, rank_weight=0.0, switch=None)
    adapted = adapt(model, method, ["0", "1", "2", "3"])
    assert torch.equal(model(x), before)
    norm = adapted.adapters["1"]
    assert norm.index.tolist() == [8 + i for i in (2, 3, 4, 5)]
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(0.1)
    y = model(x)
    assert not torch.allclose(y, before)
    torch.testing.assert_close(adapted.merge()(x), y)


@pytest.mark.parametrize("contract", CONTRACTS)
@pytest.mark.parametrize("room", ["linear", "attention"])
def test_the_contracts_hold_with_biases_too(contract: str, room: str) -> None:
    if contract == "works_compiled" and room != "linear":
        pytest.skip("one room is enough")
    method = SaRABiases(share=0.5, switch=4, rank_weight=0.0)
    check(contract, Case(method, room))


def test_a_bias_that_is_not_its_layers_own_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"'0.bias' trains as a whole"):
        adapt(model, {"*": METHOD, "0.bias": Train()})
    two = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    two[1].bias = two[0].bias
    with pytest.raises(ValueError, match=r"layer '0' shares its bias with '1.bias'"):
        adapt(two, SaRABiases(share=0.2, rank_weight=0.0))
    with torch.no_grad():
        model[2].bias[0] = torch.nan
    with pytest.raises(ValueError, match="layer '2': its bias holds NaN"):
        adapt(model, METHOD)
    assert not any(hasattr(m, "adapter") for m in (*model, *two))


def test_the_norm_is_of_the_weights_alone() -> None:
    model = nn.Sequential(nn.Linear(70, 70)).double()
    nn.init.constant_(model[0].bias, 0.0)
    method = SaRABiases(threshold=1e-9, rank_weight=1.0, switch=None)
    adapted = adapt(model, method)  # only the bias moves
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    adapted.attach(optimizer, total_steps=2)
    model(drawn(3, 70)).sum().backward()
    optimizer.step()
    moved = adapted.adapters["0"].values
    torch.testing.assert_close(moved, torch.full_like(moved, -0.3), rtol=0, atol=1e-12)
