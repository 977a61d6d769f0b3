"""What only SPT must satisfy: its scores, its budget, its entries and its two modules."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from tests.contracts.contracts import CONTRACTS, check
from tests.contracts.rooms import Case
from toolkit import SPT, adapt, load
from toolkit.core import nets
from toolkit.select.spt.allocation import Ranking, allocate, decide
from toolkit.select.spt.entries import SPTEntries
from toolkit.select.spt.plan import placed
from toolkit.select.spt.sensitivity import sensitivity
from toolkit.select.spt.structured import SPTAdapter, path

STILL = {"dropout": 0.0, "drop_path": 0.0}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def small() -> nn.Module:
    """Two linear layers with a norm between them, and a head, in float64."""
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 7))
    model.append(nn.Linear(7, 3))
    model.double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.5 * draw(*p.shape, seed=50 + i))
    return model


def batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(draw(5, 6, seed=i), torch.arange(5) % 3) for i in range(count)]


def loss(model: nn.Module, batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def vit() -> nn.Module:
    return nets.digits_transformer(width=16, depth=2, heads=2, generator=generator())


def images(seed: int = 0):
    x = torch.rand(6, 8, 8, generator=generator(seed))
    return x, torch.arange(6)


def planned(model: nn.Module, train="head.*", counted=(), **fields):
    method = SPT(**{"rank": 3, "budget": 600} | STILL | fields)
    data = [images(i) for i in range(2)]
    return method.plan(model, data, loss, train=train, counted=counted)


def trained(adapted, steps: int = 3, decay: float = 0.0):
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.02, weight_decay=decay)
    for step in range(steps):
        optimizer.zero_grad()
        loss(adapted.model, images(step)).backward()
        optimizer.step()


# Scores


def test_scores_are_the_sum_of_squared_batch_gradients() -> None:
    model = small()
    names = ["0.weight", "1.bias", "3.weight"]
    found = sensitivity(model, names, batches(), loss)
    wanted = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
    for batch in batches():
        model.zero_grad()
        loss(model, batch).backward()
        for name in names:
            wanted[name] += model.get_parameter(name).grad ** 2
    for name in names:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-12, atol=0)
        assert (found[name] >= 0).all()


def test_scores_of_twice_the_loss_are_four_times_as_large_and_forget_the_order() -> None:
    once = sensitivity(small(), ["0.weight"], batches(), loss)["0.weight"]
    twice = sensitivity(small(), ["0.weight"], batches(), lambda m, b: 2 * loss(m, b))
    back = sensitivity(small(), ["0.weight"], batches()[::-1], loss)
    torch.testing.assert_close(twice["0.weight"], 4 * once, rtol=1e-12, atol=0)
    torch.testing.assert_close(back["0.weight"], once, rtol=1e-12, atol=0)
    first = sensitivity(small(), ["0.weight"], batches(), loss, passes=1)["0.weight"]
    assert torch.equal(first, sensitivity(small(), ["0.weight"], batches(1), loss)["0.weight"])
    whole = [tuple(torch.cat(parts) for parts in zip(*batches(), strict=True))]
    mean = sensitivity(small(), ["0.weight"], whole, loss)["0.weight"]
    assert not torch.allclose(3 * mean, once, rtol=0.05)  # the batch is squared whole


def test_what_the_loss_does_not_reach_scores_zero_and_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    model.add_module("aside", nn.Linear(2, 2))
    model.double()[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())

    def partly(_, batch):
        return F.cross_entropy(model[3](model[2](model[1](model[0](batch[0])))), batch[1])

    found = [
        sensitivity(model, ["0.weight", "aside.weight"], batches(), partly, training=mode)
        for mode in (False, False, True)
    ]
    assert not found[0]["aside.weight"].any()
    assert torch.equal(found[0]["0.weight"], found[1]["0.weight"])
    assert not torch.equal(found[0]["0.weight"], found[2]["0.weight"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["0.weight"]
    assert model.training
    assert all(p.grad is None for p in model.parameters())


# The budget


def reference(scores, budgets, rank, alpha, beta, taus, fixed, form="lora", structured_only=False):
    """The rule spelled out with dense masks, one tau after the other, for several budgets."""
    flat = torch.cat([s.flatten() for s in scores.values()])
    best = dict.fromkeys(budgets, (0, None))
    for tau in taus:
        mask = torch.zeros_like(flat)
        mask[flat.topk(tau).indices] = 1.0
        parts = mask.split([s.numel() for s in scores.values()])
        total, forms = fixed, {}
        for (name, score), part in zip(scores.items(), parts, strict=True):
            n = int(part.sum())
            if score.dim() == 1:
                module, cost = n >= len(score) / beta, len(score)
            else:
                m, k = score.shape
                cost = rank * (m + k) if form == "lora" else 2 * rank * m + rank + m
                module = n >= cost / alpha
            forms[name] = module, n
            total += cost if module else (0 if structured_only else n)
        for budget, (before, _) in best.items():
            if abs(total - budget) <= abs(before - budget):
                best[budget] = total, (tau, forms, parts)
    return best


SHAPES = {
    "a.weight": (12, 9),
    "a.bias": (12,),
    "n.weight": (9,),
    "b.weight": (8, 20),
    "b.bias": (8,),
}


def scores_of(seed: int):
    return {
        name: draw(*shape, seed=10 * seed + i).square() * (1 + i * seed % 5)
        for i, (name, shape) in enumerate(SHAPES.items())
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("form", ["lora", "adapter"])
@pytest.mark.parametrize("half", ["both", "structured"])
def test_the_allocation_is_that_of_the_rule_spelled_out(seed, form, half) -> None:
    scores, taus, budgets = scores_of(seed), range(2, 250, 3), (40, 70, 120, 160)
    wanted = reference(
        scores, budgets, 2, 3.0, 4.0, taus, 5, form, structured_only=half == "structured"
    )
    for budget in budgets:
        method = SPT(budget=budget, rank=2, alpha=3.0, beta=4.0, structured=form, half=half)
        method = copy.copy(method)
        object.__setattr__(method, "like", "code")  # its rule for what is near, at these taus
        found = allocate(method, scores, counted=5, taus=taus)
        total, (tau, forms, parts) = wanted[budget]
        assert (found.total, found.tau) == (total, tau)
        for (name, decision), part in zip(found.decisions.items(), parts, strict=True):
            module, n = forms[name]
            assert decision.marked == n
            assert (decision.form in (form, "whole")) == module
            if decision.form == "entries":
                assert torch.equal(found.index(name), part.nonzero()[:, 0])


def test_the_code_sweeps_multiples_of_twenty_thousand() -> None:
    sweep = SPT(budget=400_000, like="code").sweep(10**8)
    assert len(sweep) == 79
    assert sweep[:2] == [20_000, 40_000]
    assert sweep[-1] == 1_580_000
    assert all(abs(t - 20_000 * k) <= 1 for k, t in enumerate(sweep, 1))
    with pytest.raises(ValueError, match="like='code'"):
        allocate(SPT(budget=60, like="code"), scores_of(0))


def test_ease_decides_between_modules_and_entries() -> None:
    counts = dict.fromkeys(SHAPES, 1)
    easy, hard = SPT(rank=2, alpha=1e9, beta=1e9), SPT(rank=2, alpha=1e-9, beta=1e-9)
    forms = {n: decide(easy, SHAPES[n], counts[n]).form for n in SHAPES}
    assert set(forms.values()) == {"lora", "whole"}
    assert {decide(hard, SHAPES[n], counts[n]).form for n in SHAPES} == {"entries"}
    assert decide(easy, (12,), 0).form == decide(hard, (12, 9), 0).form == "frozen"
    entries = SPT(rank=2, alpha=1e9, beta=1e9, half="entries")
    assert {decide(entries, s, 1).form for s in SHAPES.values()} == {"entries"}
    assert decide(SPT(rank=2, beta=1e9, whole_vectors=False), (12,), 12).form == "entries"


def test_what_is_marked_is_nested_and_ties_are_settled_by_place() -> None:
    scores = scores_of(1)
    ranking = Ranking(scores)
    for name in SHAPES:
        before: set[int] = set()
        for tau in (5, 30, 100, 200):
            now = set(ranking.top(name, tau).tolist())
            assert before <= now
            before = now
    even = Ranking({"a": torch.ones(4), "b": torch.ones(4)})
    assert even.top("a", 5).tolist() == [0, 1, 2, 3]
    assert even.top("b", 5).tolist() == [0]
    with pytest.raises(ValueError, match="tau=9"):
        even.counts([9])


@pytest.mark.parametrize("structured", ["lora", "adapter"])
@pytest.mark.parametrize("half", ["both", "structured", "entries"])
def test_the_total_is_what_trains_and_lies_near_the_budget(structured, half) -> None:
    model = vit()
    counted = ("position.weight",)
    plan = planned(model, counted=counted, structured=structured, half=half, budget=1200)
    head = sum(p.numel() for p in model.head.parameters())
    adapted = adapt(model, plan, train="head.*", generator=generator(1))
    assert adapted.costs()["trained"] == plan.total + head
    table = plan.table()
    assert plan.total == table["cost"].sum() + plan.counted
    assert plan.counted == model.position.weight.numel()
    assert abs(plan.total - 1200) <= 100
    forms = set(table["form"])
    assert ("entries" in forms) == (half != "structured")
    assert (structured in forms) == (half != "entries")


def test_the_head_is_no_candidate_and_moves_the_scores_of_others_only_by_what_it_is() -> None:
    model = small()
    method = SPT(budget=40, rank=2, **STILL)
    plan = method.plan(model, batches(), loss, train="4.*")
    assert not any(name.startswith("4.") for name in plan.scores)
    again = method.plan(model, batches(), loss, train="4.*")
    assert all(torch.equal(plan.scores[n], again.scores[n]) for n in plan.scores)
    given = method.plan(model, train="4.*", scores=plan.scores)
    assert given.allocation.decisions == plan.allocation.decisions


def test_q_k_and_v_in_one_matrix_are_left_out_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    plan = SPT(budget=80, rank=2).plan(
        model, [torch.randn(2, 3, 8)], lambda m, x: m(x).square().mean() + m(x)[0, 0, 0]
    )
    assert "attention" in plan.left_out["1.self_attn"]


# Entries


@pytest.mark.parametrize("shape", [(11, 6), (4, 5, 6)])
def test_differences_have_the_gradient_of_the_whole_weight_gathered(shape) -> None:
    model = small()[:1]
    x, y = draw(*shape, seed=3), draw(*shape[:-1], 8, seed=4)
    index = {"weight": torch.tensor([0, 7, 8, 47]), "bias": torch.tensor([2, 5])}
    W, b = (p.detach().clone().requires_grad_() for p in model[0].parameters())
    G = torch.autograd.grad(F.mse_loss(F.linear(x, W, b), y), (W, b))
    adapted = adapt(model, with_entries({"0": index}), "0")
    F.mse_loss(adapted(x), y).backward()
    entries = adapted.adapters["0"].entries
    torch.testing.assert_close(entries.weight_delta.grad, G[0].reshape(-1)[index["weight"]])
    torch.testing.assert_close(entries.bias_delta.grad, G[1][index["bias"]])


def with_entries(moving, method=None):
    method = copy.copy(method or SPTEntries())
    object.__setattr__(method, "moving", moving)
    return method


def test_entries_train_as_the_masked_dense_update_does() -> None:
    """Value for value in float64, with momentum."""
    mask = draw(8, 6, seed=9) > 0.7
    dense, sparse = small()[:3], small()[:3]
    W, W0 = dense[0].weight, dense[0].weight.detach().clone()
    adapted = adapt(sparse, with_entries({"0": {"weight": mask.flatten().nonzero()[:, 0]}}), "0")
    optimizers = [torch.optim.Adam([W], lr=0.03), torch.optim.Adam(adapted.parameters(), lr=0.03)]
    assert adapted.costs()["trained"] == int(mask.sum())
    for step in range(5):
        x = draw(7, 6, seed=step)
        for model, optimizer in zip((dense, sparse), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            if model is dense:
                W.grad.mul_(mask)
            optimizer.step()
    merged = adapted.merge()[0].weight
    torch.testing.assert_close(merged, W, rtol=0, atol=1e-13)
    assert torch.equal(merged[~mask], W0[~mask])
    assert not torch.equal(merged[mask], W0[mask])


def test_decay_draws_to_the_pretrained_value() -> None:
    model = small()
    W = model[0].weight.detach().clone()
    adapted = adapt(model, with_entries({"0": {"weight": torch.arange(9)}}), "0")
    delta = adapted.adapters["0"].entries.weight_delta
    delta.data.fill_(1.0)
    optimizer = torch.optim.SGD([delta], lr=0.1, weight_decay=5.0)
    for _ in range(40):
        delta.grad = torch.zeros_like(delta)
        optimizer.step()
    torch.testing.assert_close(adapted.merge()[0].weight, W, rtol=0, atol=1e-10)


class RandomEntries(SPTEntries):
    """A third of the entries of each weight, for the contracts."""

    def build(self, site, generator=None):
        count = site.rows * site.cols
        index = torch.arange(0, count, 3)
        return with_entries({site.name: {"weight": index}}).build(site)

    def count(self, site) -> int:
        return math.ceil(site.rows * site.cols / 3)


@pytest.mark.parametrize(
    "method", [RandomEntries(), SPTAdapter(3, **STILL)], ids=["entries", "adapter"]
)
@pytest.mark.parametrize("room", ["linear", "hf_conv1d"])
def test_the_forms_of_a_plan_keep_the_contracts(method, room) -> None:
    costly = {"works_compiled", "second_gradients_are_right"}
    # a plan's own files are below; the entries lie one name deeper than that contract looks
    files = {"save_load_round_trip", "refuses_a_tampered_file"}
    passed = costly | (files if isinstance(method, RandomEntries) else set())
    for name in CONTRACTS.keys() - passed:
        check(name, Case(method, room))


# Modules


def test_the_start_is_the_base_and_merging_gives_the_same_outputs() -> None:
    model = vit()
    before, x = model(images()[0]), images(9)[0]
    base = copy.deepcopy(model.state_dict())
    adapted = adapt(model, planned(model), generator=generator(1))
    assert torch.equal(adapted(images()[0]), before)
    assert {"lora", "entries"} <= set(adapted.report()["form"])
    trained(adapted)
    beside = adapted(x)
    merged = adapted.merge()
    torch.testing.assert_close(merged(x), beside, rtol=1e-5, atol=1e-5)
    assert merged.state_dict().keys() == base.keys()
    adapted.unmerge()
    assert torch.equal(adapted(x), beside)
    adapted.unload()
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("structured", ["lora", "adapter"])
def test_a_plan_travels_by_file(tmp_path, structured) -> None:
    model = vit()
    plan = planned(model, structured=structured, counted=("position.weight",), budget=1100)
    adapted = adapt(model, plan, train="head.*", generator=generator(1))
    trained(adapted)
    adapted.save(tmp_path / "spt.safetensors")
    again = load(vit(), tmp_path / "spt.safetensors")
    x = images(5)[0]
    assert torch.equal(again(x), adapted(x))
    assert again.costs() == adapted.costs()
    assert not torch.equal(vit()(x), adapted(x))
    trained(again)  # and goes on


@pytest.mark.parametrize("place", [10_000, -1])
def test_a_file_that_names_other_entries_is_refused(tmp_path, place) -> None:
    model, file = vit(), tmp_path / "spt.safetensors"
    adapted = adapt(model, planned(model, half="entries"))
    adapted.save(file)
    with safe_open(file, framework="pt") as opened:
        tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    key = next(k for k in tensors if k.endswith("weight_index") and len(tensors[k]) > 1)
    for wrong, words in ((place, "outside"), (int(tensors[key][1]), "twice")):
        index = tensors[key].clone()
        index[0] = wrong
        save_file(tensors | {key: index}, file, metadata=metadata)
        with pytest.raises(ValueError, match=words):
            load(vit(), file)


def test_a_state_dict_goes_on_in_another_process_s_model() -> None:
    one, two = vit(), vit()
    plan = planned(one)
    first, second = (adapt(m, plan, generator=generator(1)) for m in (one, two))
    trained(first)
    two.load_state_dict(one.state_dict())
    x = images(4)[0]
    assert torch.equal(first(x), second(x))


def test_the_adapter_follows_its_equation_and_does_not_merge() -> None:
    model = small()[:1]
    adapted = adapt(model, SPTAdapter(2, **STILL), generator=generator(1))
    layer = adapted.adapters["0"]
    bound = 1 / math.sqrt(8)
    assert layer.down.abs().max() <= bound
    assert layer.down_bias.any()
    assert not layer.up.any()
    with torch.no_grad():
        layer.up.copy_(draw(8, 2, seed=2))
        layer.up_bias.copy_(draw(8, seed=3))
    x = draw(5, 6)
    y = F.linear(x, *model[0].base.parameters())
    wanted = y + F.gelu(y @ layer.down.T + layer.down_bias) @ layer.up.T + layer.up_bias
    torch.testing.assert_close(adapted(x), wanted, rtol=0, atol=1e-12)
    assert adapted.costs()["trained"] == SPT(rank=2, structured="adapter").cost(8, 6)
    with pytest.raises(TypeError, match="merged"):
        adapted.merge()


@pytest.mark.parametrize("structured", ["lora", "adapter"])
def test_paths_drop_whole_examples_in_training_only(structured) -> None:
    torch.manual_seed(0)
    fields = {"dropout": 0.0, "drop_path": 0.5}
    method = SPT(rank=2, **fields) if structured == "lora" else SPTAdapter(2, **fields)
    adapted = adapt(small()[:1], method, generator=generator(1))
    layer, base = adapted.adapters["0"], adapted.model[0].base
    for parameter in (layer.B if structured == "lora" else layer.up,):
        parameter.data.copy_(draw(8, 2, seed=2))
    x = draw(2000, 3, 6)
    adapted.model.eval()
    whole = adapted(x) - base(x)
    adapted.model.train()
    branch = adapted(x) - base(x)
    kept = branch.abs().amax((1, 2)) > 1e-9
    assert kept.double().mean().item() == pytest.approx(0.5, abs=0.04)
    torch.testing.assert_close(branch[kept], 2 * whole[kept], rtol=0, atol=1e-11)
    assert path(x, 0.0) is x


def test_dropout_acts_on_the_branch_only() -> None:
    adapted = adapt(small()[:1], SPT(rank=2, dropout=0.5, drop_path=0.0), generator=generator(1))
    layer, base = adapted.adapters["0"], adapted.model[0].base
    x = draw(400, 6)
    assert torch.equal(adapted(x), base(x))
    layer.B.data.copy_(draw(8, 2, seed=2))
    torch.manual_seed(3)
    branch = adapted(x) - base(x)
    torch.manual_seed(3)
    torch.testing.assert_close(branch, F.dropout(x, 0.5) @ (layer.B @ layer.A).T)


def test_a_bias_moves_beside_each_module() -> None:
    moving = {"0": {"bias": torch.tensor([1, 4])}}
    x = draw(5, 6)
    for method in (SPT(rank=2, **STILL), SPTAdapter(2, **STILL)):
        adapted = adapt(small()[:1], with_entries(moving, method), generator=generator(1))
        before = adapted(x).detach()
        adapted.adapters["0"].entries.bias_delta.data.copy_(torch.tensor([2.0, -3.0]))
        moved = torch.zeros(8, dtype=torch.float64)
        moved[1], moved[4] = 2.0, -3.0
        torch.testing.assert_close(adapted(x) - before, moved.expand(5, 8))
        adapted.model[0].base.register_forward_hook(lambda *a: None)  # goes the other way
        torch.testing.assert_close(adapted(x) - before, moved.expand(5, 8))


# Bad input


def test_what_cannot_be_planned_is_refused_by_name() -> None:
    model = small()
    before = copy.deepcopy(model.state_dict())
    method = SPT(budget=40, rank=2, **STILL)
    kw = {"train": "4.*"}
    cases = [
        (lambda: SPT(rank=2).plan(model, batches(), loss, **kw), ValueError, "budget"),
        (lambda: method.plan(model, [], loss, **kw), ValueError, "at least one batch"),
        (lambda: method.plan(model, batches(), **kw), ValueError, "loss"),
        (lambda: SPT(budget=40, rank=6).plan(model, batches(), loss, **kw), ValueError, "rank=6"),
        (
            lambda: method.plan(model, batches(), loss, counted=("0.weight",), **kw),
            ValueError,
            "counted in any case hold 48",
        ),
        (
            lambda: SPT(budget=90_000, rank=2).plan(model, batches(), loss, **kw),
            ValueError,
            "the largest",
        ),
        (lambda: method.plan(model, scores={}, **kw), ValueError, "none for '0.weight'"),
        (
            lambda: method.plan(model, batches(), lambda m, b: loss(m, b) * math.nan, **kw),
            ValueError,
            "not finite",
        ),
        (lambda: method.plan(model, batches(), lambda m, b: b[0].sum(), **kw), ValueError, "reach"),
        (lambda: adapt(model, method, train="4.*"), ValueError, "give batches and loss"),
        (lambda: adapt(model, method, batches=[], loss=loss, **kw), ValueError, "one batch"),
        (lambda: adapt(model, {"*": method}), ValueError, "give batches and loss"),
        (lambda: adapt(model, SPT(structured="adapter")), TypeError, "structured"),
        (lambda: SPT(structured="prompt"), ValueError, "structured"),
        (lambda: SPT(alpha=0.0), ValueError, "alpha"),
    ]
    for run, kind, words in cases:
        with pytest.raises(kind, match=words):
            run()
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())


def test_a_budget_below_all_that_modules_cost_is_refused() -> None:
    scores = {"a.weight": torch.ones(8, 8)}
    with pytest.raises(ValueError, match=r"budget=4: .*lower the rank"):
        allocate(SPT(budget=4, rank=3, half="structured"), scores)
    with pytest.raises(ValueError, match="not finite"):
        allocate(SPT(budget=4), {"a.weight": torch.tensor([[1.0, math.inf]])})


def test_tied_and_carried_layers_are_refused() -> None:
    model = small()
    model[3].weight = nn.Parameter(draw(8, 8))
    model.append(nn.Linear(8, 8).double())
    model[5].weight = model[3].weight
    method = SPT(budget=40, rank=2)
    with pytest.raises(ValueError, match=r"'3' shares a tensor"):
        method.plan(model, batches(), loss)
    other = small()
    adapt(other, SPT(rank=2), "0")
    with pytest.raises(RuntimeError, match="carries a method"):
        method.plan(other, batches(), loss)


def test_forms_are_one_method_each() -> None:
    method = SPT(budget=100, rank=2, alpha=3.0)
    found = placed(method, allocate(method, scores_of(1)))
    kinds = [type(m).__name__ for m in found.values()]
    assert len(kinds) == len(set(kinds))
    assert all(getattr(m, "budget", None) is None for m in found.values())
