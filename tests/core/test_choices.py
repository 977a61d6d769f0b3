"""Choices that are made again, and sparse differences of a model from its base."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks import select
from toolkit import adapt, catalogue
from toolkit.core.adapt.rechosen import RechosenLayer
from toolkit.core.adapt.sites import describe
from toolkit.core.adapt.sparse import delta
from toolkit.core.adapt.steps.rechoice import ChoiceController, exchange
from toolkit.core.baselines.bitfit import Train
from toolkit.core.baselines.houlsby import Houlsby
from toolkit.core.baselines.sparse_mask import SparseMask
from toolkit.core.states.deltas import FORMAT, SparseDelta, fingerprint


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masked(seed: int = 0) -> tuple[nn.Linear, RechosenLayer]:
    base = nn.Linear(4, 3, bias=False)
    base.weight.data = torch.randn(3, 4, generator=draws(seed))
    base.requires_grad_(False)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask.view(-1)[[1, 4, 6]] = True
    return base, RechosenLayer(describe(base, "layer"), mask)


def test_entries_leave_come_and_come_back_with_what_the_weight_has() -> None:
    base, layer = masked()
    old = base.weight.reshape(-1).clone()
    with torch.no_grad():
        layer.values.copy_(torch.tensor([10.0, 40.0, 60.0]))
    weight = lambda: layer.merged(base)["weight"].reshape(-1)  # noqa: E731
    before = weight().detach()
    assert layer.choose(torch.tensor([9, 4]), base).tolist() == [1, -1]  # 4 stays, 9 comes
    assert torch.equal(weight(), before)  # a choice moves nothing
    assert layer.index.tolist() == [4, 9]
    assert layer.left.tolist() == [1, 6]
    assert layer.held.tolist() == [10.0, 60.0]
    assert layer.values[1].item() == old[9].item()
    with torch.no_grad():
        layer.values.add_(1.0)
    before = weight().detach()
    assert layer.choose(torch.tensor([6, 0]), base).tolist() == [-1, -1]  # 6 comes back
    assert torch.equal(weight(), before)
    assert layer.left.tolist() == [1, 4, 9]
    assert layer.changed == 5
    assert torch.equal(base.weight.reshape(-1), old)
    layer.choose(torch.empty(0, dtype=torch.int64), base)
    assert len(layer.values) == 0
    assert torch.equal(weight(), before)
    for wrong, words in (([12], "outside"), ([-1], "outside"), ([2, 2], "twice")):
        with pytest.raises(ValueError, match=words):
            layer.choose(torch.tensor(wrong), base)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_the_state_of_what_stays_is_kept(kind: type) -> None:
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    old = nn.Parameter(torch.randn(3, generator=draws()))
    other = nn.Parameter(torch.ones(2))
    optimizer = kind(
        [{"params": [other, old]}, {"params": [nn.Parameter(torch.ones(1))], "lr": 7}],
        lr=0.1,
        **options,
    )
    for _ in range(2):
        old.grad, other.grad = torch.tensor([1.0, 2.0, 3.0]), torch.ones(2)
        optimizer.step()
    known = {k: v.clone() for k, v in optimizer.state[old].items()}
    new = nn.Parameter(torch.zeros(4))
    exchange(optimizer, old, new, torch.tensor([2, -1, 0, -1]))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(other), id(new)]
    assert old not in optimizer.state
    for key, value in optimizer.state[new].items():
        if known[key].dim():
            zero = torch.zeros((), dtype=value.dtype)
            assert torch.equal(value, torch.stack([known[key][2], zero, known[key][0], zero]))
        else:
            assert torch.equal(value, known[key])
    new.grad = torch.ones(4)
    optimizer.step()
    afresh = nn.Parameter(torch.zeros(1))
    exchange(optimizer, new, afresh, None)
    assert afresh not in optimizer.state


class _Interrupt(BaseException):
    pass


def test_a_choice_that_breaks_off_changes_no_layer(monkeypatch) -> None:
    class Method(SparseMask):
        def build(self, site, generator=None):
            return RechosenLayer(site, torch.ones(site.rows, site.cols, dtype=torch.bool))

        def controller(self, share, optimizer, total_steps):
            return ChoiceController(self, share, optimizer)

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    adapted = adapt(model, Method())
    optimizer = torch.optim.AdamW(adapted.parameters())
    adapted.attach(optimizer)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    ids = [id(p) for p in adapted.parameters()]
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    whole = RechosenLayer.choose
    calls = itertools.count()

    def breaks(self, index, base):
        if next(calls):
            raise _Interrupt
        return whole(self, index, base)

    choice = {"0": torch.tensor([1]), "1": torch.tensor([2])}
    monkeypatch.setattr(RechosenLayer, "choose", breaks)
    with pytest.raises(_Interrupt):
        adapted.controller.rechoose(choice)
    assert [id(p) for p in adapted.parameters()] == ids
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == held
    assert len(optimizer.state) == 2
    monkeypatch.setattr(RechosenLayer, "choose", whole)
    adapted.controller.rechoose(choice)
    assert [len(p) for p in adapted.parameters()] == [1, 1]
    with pytest.raises(ValueError, match="no layer '7'"):
        adapted.controller.rechoose({"7": torch.tensor([0])})


def trained(seed: int = 0, by: str = "random") -> tuple[dict, object]:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws(3)))
    base = {k: v.clone() for k, v in model.state_dict().items()}
    adapted = adapt(model, SparseMask(share=0.3, by=by), generator=draws(seed))
    with torch.no_grad():
        for layer in adapted.adapters.values():
            layer.values.add_(torch.randn(layer.values.shape, generator=draws(seed + 9)))
    return base, adapted


def test_a_difference_gives_the_trained_weights_to_the_bit() -> None:
    base, adapted = trained()
    found = delta(adapted)
    assert len(found) == sum(len(a.values) for a in adapted.adapters.values())
    merged = adapted.merge().state_dict()
    new = base | found.applied(base)
    assert all(torch.equal(new[k], v) for k, v in merged.items())
    with pytest.raises(RuntimeError, match="merged"):
        delta(adapted)


def test_differences_are_scaled_added_and_subtracted_entry_by_entry(tmp_path) -> None:
    base, first = trained(0)
    _, second = trained(1)
    a, b = delta(first), delta(second)
    mixed = (0.6 * a + 0.6 * b).applied(base)
    for name, value in mixed.items():
        expected = base[name].double()
        for one in (a, b):
            places, change = one.entries[name]
            expected.view(-1)[places] += 0.6 * change
        torch.testing.assert_close(value, expected.float())
    assert all(torch.equal(v, base[k]) for k, v in (a - a).applied(base).items())
    (a + b - b).save(tmp_path / "sum.safetensors")
    again = SparseDelta.load(tmp_path / "sum.safetensors").applied(base)
    for name, value in a.applied(base).items():
        torch.testing.assert_close(again[name], value)


def test_another_base_is_refused_by_its_hash() -> None:
    base, adapted = trained()
    found = delta(adapted)
    name = "0.weight"
    other = dict(base)
    other[name] = base[name] + 1
    with pytest.raises(
        ValueError, match=f"{name}.*{fingerprint(other[name])}.*{fingerprint(base[name])}"
    ):
        found.applied(other)
    with pytest.raises(ValueError, match="no tensor"):
        found.applied({})
    elsewhere = SparseDelta(found.entries, dict.fromkeys(found.bases, "0" * 16))
    with pytest.raises(ValueError, match=r"0000.*one base"):
        found + elsewhere
    with pytest.raises(ValueError, match="no tensor of the base"):
        SparseDelta.between(base, {"gone": torch.ones(2)})


def test_damaged_files_of_differences_are_refused(tmp_path) -> None:
    path = tmp_path / "d.safetensors"
    with pytest.raises(FileNotFoundError, match=r"d\.safetensors"):
        SparseDelta.load(path)
    _, adapted = trained()
    delta(adapted).save(path)
    content = path.read_bytes()
    for part in (content[: len(content) // 2], b"", b"\x80\x04pickle"):
        path.write_bytes(part)
        with pytest.raises(ValueError, match="no sparse difference"):
            SparseDelta.load(path)
    broken = SparseDelta({"w": (torch.tensor([3, 1]), torch.ones(2))}, {"w": "0"})
    broken.save(path)
    with pytest.raises(ValueError, match="'w' are damaged"):
        SparseDelta.load(path)


DAMAGE = {
    "0-d": ("w.index", torch.tensor(1)),
    "complex": ("w.value", torch.ones(2, dtype=torch.complex64)),
    "float8": ("w.value", torch.ones(2).to(torch.float8_e4m3fn)),
    "whole": ("w.value", torch.ones(2, dtype=torch.uint64)),
    "nan": ("w.value", torch.full((2,), float("nan"))),
    "fractions": ("w.index", torch.tensor([0.0, 1.0])),
    "twice": ("w.index", torch.tensor([1, 1])),
    "before 0": ("w.index", torch.tensor([-1, 1])),
    "longer": ("w.index", torch.tensor([0, 1, 2])),
    "more": ("v.index", torch.tensor([0])),
}


@pytest.mark.parametrize("key", DAMAGE)
def test_tensors_of_another_sort_are_refused_with_the_file(key, tmp_path) -> None:
    path = tmp_path / "d.safetensors"
    SparseDelta({"w": (torch.tensor([0, 1]), torch.ones(2))}, {"w": "0"}).save(path)
    tensors, (name, value) = load_file(path), DAMAGE[key]
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    SparseDelta.load(path)
    save_file(tensors | {name: value}, path, facts)
    with pytest.raises(ValueError, match=r"d\.safetensors is no sparse difference.*save it again"):
        SparseDelta.load(path)


@pytest.mark.parametrize("bases", ["[" * 100_000, "[]", '["w"]', "3", "null", '{"w": 1}', "{}"])
def test_facts_of_another_sort_are_refused_with_the_file(bases, tmp_path) -> None:
    path = tmp_path / "d.safetensors"
    tensors = {"w.index": torch.tensor([0]), "w.value": torch.ones(1)}
    save_file(tensors, path, {"format": FORMAT, "bases": bases})
    with pytest.raises(ValueError, match=r"d\.safetensors is no sparse difference.*save it again"):
        SparseDelta.load(path)


def test_an_entry_outside_the_base_is_refused() -> None:
    base = {"w": torch.zeros(3)}
    far = SparseDelta({"w": (torch.tensor([3]), torch.ones(1))}, {"w": fingerprint(base["w"])})
    with pytest.raises(ValueError, match="outside 'w'"):
        far.applied(base)


def test_only_weights_have_a_difference() -> None:
    adapted = adapt(nn.Sequential(nn.Linear(4, 4)), {"0": Houlsby(width=2)})
    with pytest.raises(TypeError, match="'0'"):
        delta(adapted)
    adapted = adapt(nn.Sequential(nn.Linear(4, 4)), Train(), "*.bias")
    assert len(delta(adapted)) == 0


def test_choices_of_equal_count_by_chance_and_by_the_gradient() -> None:
    _, adapted = trained(by="random")
    _, again = trained(by="random")
    _, other = trained(seed=5, by="random")
    one, two, three = (a.adapters["0"].index for a in (adapted, again, other))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    batches = [torch.tensor([[0.0, 2.0, 1.0]])]
    options = {"batches": batches, "loss": lambda m, x: m(x)[:, 0].sum()}
    chosen = adapt(model, SparseMask(share=0.1, by="gradient"), **options)
    assert chosen.adapters["0"].index.tolist() == [1]
    for by in ("gradient", "fisher"):
        with pytest.raises(ValueError, match="batches"):
            adapt(nn.Sequential(nn.Linear(3, 2)), SparseMask(by=by))
        with pytest.raises(ValueError, match="at least one batch"):
            adapt(
                nn.Sequential(nn.Linear(3, 2)), SparseMask(by=by), batches=[], loss=options["loss"]
            )
        with pytest.raises(ValueError, match=r"'0'.*NaN"):
            adapt(
                nn.Sequential(nn.Linear(3, 2)), SparseMask(by=by),
                batches=[torch.full((1, 3), float("nan"))], loss=options["loss"],
            )  # fmt: skip


def test_the_benchmark_takes_every_method_of_the_part_and_the_plain_choices() -> None:
    makers = select.methods()
    assert {e.slug for e in catalogue() if e.part == "select"} <= makers.keys()
    assert {"random", "smallest", "largest", "fisher", "gradient"} <= makers.keys()
    assert makers["sara"]().share == select.SHARE
    model = nn.Sequential(nn.Linear(30, 40))
    adapted = adapt(model, makers["choice made again"]())
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.1)
    adapted.attach(optimizer)
    before = adapted.adapters["0"].index.clone()
    model(torch.ones(2, 30)).sum().backward()
    optimizer.step()
    after = adapted.adapters["0"].index
    assert 0 < len(after) <= len(before)
    assert not torch.equal(after, before)
    assert len(optimizer.state[adapted.parameters()[0]]["exp_avg"]) == len(after)
