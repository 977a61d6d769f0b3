"""What no method that chooses entries can take: refused by name, with the model as it was."""

import copy
import math

import pytest
import torch
from torch import nn

from toolkit import ID3, SPT, SaRA, SparseMask, Train, adapt, load
from toolkit.select.sara import threshold_at

CHOOSING = {
    "sara": SaRA(share=0.2, switch=None, rank_weight=0.0),
    "id3": ID3(share=0.2),
    "largest": SparseMask(share=0.2),
    "fisher": SparseMask(share=0.2, by="fisher"),
    "spt": SPT(budget=100, rank=2, dropout=0.0, drop_path=0.0),
}
X = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
every = pytest.mark.parametrize("name", CHOOSING)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.middle = nn.Linear(20, 20, bias=False), nn.Linear(20, 20)
        self.out = nn.Linear(20, 20, bias=False)
        self.out.weight = self.into.weight

    def forward(self, x):
        return self.out(self.middle(self.into(x)))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20))


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def put(model: nn.Module, name: str, targets=None, batches=(X,), scored=loss):
    method = CHOOSING[name]
    needs = method.scores if name in ("fisher", "largest") else name == "spt"
    more = {"batches": batches, "loss": scored} if needs else {}
    return adapt(model, method, targets, **more)


def trained(name: str):
    model = network()
    adapted = put(model, name)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    adapted.attach(optimizer, total_steps=3)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, X).backward()
        optimizer.step()
    return adapted


def refused(model: nn.Module, run, words: str) -> None:
    """It raises ValueError with these words, and the model is as it was."""
    before, names = copy.deepcopy(model.state_dict()), [n for n, _ in model.named_modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=words):
        run()
    assert [n for n, _ in model.named_modules()] == names
    assert [p.requires_grad for p in model.parameters()] == flags
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) or bool(value.isnan().any())


@every
@pytest.mark.parametrize("targets", ["into", "out", ["into", "out"], None])
def test_a_shared_tensor(name, targets):
    model = Tied()
    refused(model, lambda: put(model, name, targets), r"shares (its weight with|a tensor)")
    assert put(model, name, "middle").sites


@every
def test_one_layer_used_twice_is_one_thing(name):
    layer = nn.Linear(20, 20)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    assert list(put(model, name).sites) == ["0"]


@every
def test_a_quantised_tensor(name):
    model = network()
    packed = torch.zeros(30, 20, dtype=torch.int8)
    model[0].weight = nn.Parameter(packed, requires_grad=False)
    refused(model, lambda: put(model, name), r"layer '0' .*torch.int8")


def test_a_quantised_tensor_cannot_train_beside():
    model = network()
    packed = torch.zeros(30, 20, dtype=torch.int8)
    model[0].weight = nn.Parameter(packed, requires_grad=False)
    refused(model, lambda: adapt(model, Train(), "0.weight"), r"'0.weight', .*torch.int8")


@pytest.mark.parametrize("name", ["sara", "largest"])
def test_weights_that_cannot_be_ranked(name):
    model = network()
    model[2].weight.data[1, 1] = math.nan
    refused(model, lambda: put(model, name), r"layer '2': .*NaN")


def test_a_threshold_of_weights_that_cannot_be_ranked():
    model = network()
    model[2].weight.data[1, 1] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        threshold_at(model, 0.1)


@pytest.mark.parametrize("name", ["fisher", "spt"])
def test_scores_that_are_no_numbers_and_no_batch(name):
    model = network()
    refused(model, lambda: put(model, name, scored=lambda *a: loss(*a) * math.nan), "NaN|finite")
    refused(model, lambda: put(model, name, batches=()), "at least one batch")
    refused(model, lambda: put(model, name, batches=iter(())), "at least one batch")
    refused(model, lambda: adapt(model, CHOOSING[name]), "loss")


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, math.nan])
@pytest.mark.parametrize("method", [SaRA, ID3, SparseMask])
def test_a_share_outside_0_and_1(method, share):
    with pytest.raises(ValueError, match="share"):
        method(share=share)


@every
def test_a_file_of_entries_names_its_base(name, tmp_path):
    path, adapted = tmp_path / "task.safetensors", trained(name)
    adapted.save(path)
    same = network()
    load(same, path)
    assert torch.equal(same(X), adapted.model(X))
    other = network(1)
    if name == "spt" and not any(
        p.method.info.title == "SPT entries" for p in adapted.sites.values()
    ):
        pytest.skip("the plan has modules alone")
    refused(other, lambda: load(other, path), r"another base: .*[0-9a-f]{16} here")
    half = network().to(torch.bfloat16)  # the same base in another precision cannot be compared
    assert load(half, path).sites


def test_a_plan_names_its_base_and_adapt_makes_the_same():
    method = CHOOSING["spt"]
    plan = method.plan(network(), [X], loss)
    other = network(1)
    refused(other, lambda: adapt(other, plan), r"'0.weight' .*[0-9a-f]{16}")
    smaller = nn.Sequential(nn.Linear(20, 30))
    refused(smaller, lambda: adapt(smaller, plan), "missing|hash")
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    given = adapt(network(), plan, generator=draws[0])
    made = adapt(network(), method, batches=[X], loss=loss, generator=draws[1])
    assert made.costs()["trained"] == given.costs()["trained"] == plan.total
    found = dict(made.named_parameters())
    for key, value in given.named_parameters():
        assert torch.equal(value, found[key])


def test_a_budget_with_targets_and_a_head_beside():
    model = network()
    made = adapt(model, CHOOSING["spt"], ["0"], batches=[X], loss=loss, train="2.*")
    assert list(made.sites) == ["0"]
    assert sorted(made.extra) == ["2.bias", "2.weight"]
