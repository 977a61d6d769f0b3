"""Adapters on disk: whole or not at all, never a pickle, and refused where they do not fit."""

from __future__ import annotations

import json
import os
import pickle
import stat
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import toolkit
from toolkit import AdaLoRA, LoRA, adapt
from toolkit.core.adapt import files


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))


def shaken(method=None, train="3", targets=("0", "2"), base=None):
    adapted = adapt(base or net(), method or LoRA(rank=2), list(targets), train=train)
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return adapted


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


def rewrite(path, change=None, facts=None, **more):
    """Change tensors, facts or other metadata of a saved file."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if change is not None:
        change(tensors)
    if facts is not None:
        old = json.loads(metadata["facts"])
        facts(old)
        metadata["facts"] = json.dumps(old)
    save_file(tensors, path, metadata=metadata | more)


def refused(path, model, kind, words):
    before = {k: (id(v), v.clone()) for k, v in model.state_dict(keep_vars=True).items()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(kind, match=words):
        toolkit.load(model, path)
    after = model.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    for key, (identity, value) in before.items():
        assert id(after[key]) == identity, key
        assert torch.equal(after[key], value), key
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_failing_write_leaves_the_old_file(path, monkeypatch):
    shaken().save(path)
    old = path.read_bytes()

    def full(tensors, file, metadata=None):
        with open(file, "wb") as handle:
            handle.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        shaken().save(path)
    assert path.read_bytes() == old
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no/such.*create it"):
        shaken().save(tmp_path / "no" / "such" / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_saved_file_has_ordinary_permissions_and_replaces_the_old(path):
    shaken().save(path)
    first = path.read_bytes()
    shaken(LoRA(rank=3)).save(path)
    assert path.read_bytes() != first
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_the_file_is_safetensors_and_says_what_it_is(path):
    shaken().save(path)
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
        names = set(file.keys())
    (method,) = facts["methods"]
    assert (method["slug"], method["class"], method["sites"]) == ("lora", "LoRA", ["0", "2"])
    assert method["hyperparameters"]["rank"] == 2
    assert facts["train"] == ["3.weight", "3.bias"]
    assert facts["layers"]["0"] == {"kind": "linear", "shape": [8, 6], "parameter": "weight"}
    assert names == {f"adapter.{i}.{k}" for i in "02" for k in "AB"} | {
        "train.3.weight",
        "train.3.bias",
    }


def test_a_pickle_is_never_run(path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(path) + ".ran",))

    path.write_bytes(pickle.dumps(Bomb()))
    refused(path, net(), ValueError, "safetensors")
    torch.save({"A": torch.zeros(1)}, path)
    refused(path, net(), ValueError, "safetensors")
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", [nn.Embedding, nn.Conv1d])
def test_a_layer_of_another_kind_but_the_same_shape_is_refused(path, kind):
    square = nn.Sequential(nn.Linear(6, 6))
    shaken(train=(), targets=["0"], base=square).save(path)
    other = nn.Sequential(nn.Embedding(6, 6) if kind is nn.Embedding else nn.Conv1d(6, 6, 1))
    refused(path, other, ValueError, "another architecture.*'0'")


def test_every_misfit_of_the_architecture_is_listed(path):
    shaken().save(path)
    other = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 9), nn.Linear(9, 3))
    refused(path, other, ValueError, r"'2' has shape \(9, 8\).*'3.weight'")
    refused(path, nn.Sequential(nn.Linear(6, 8)), ValueError, "no layer '2'.*no parameter '3.w")


def test_a_trained_parameter_of_a_wrong_shape_changes_nothing(path):
    shaken().save(path)
    # a single number would broadcast over the whole head
    rewrite(path, lambda t: t.update({"train.3.bias": torch.zeros(1)}))
    refused(path, net(), ValueError, r"'3.bias' has shape \(3,\), the file \(1,\)")
    rewrite(path, lambda t: t.pop("train.3.bias"))
    refused(path, net(), ValueError, "3.bias")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f["methods"][0].update(slug="nosuch"), "does not have.*nosuch"),
        (lambda f: f["methods"][0]["hyperparameters"].update(rank=0), "does not have.*rank"),
        (lambda f: f["methods"][0]["hyperparameters"].update(novel=1), "does not have.*novel"),
        (lambda f: f["methods"][0].pop("sites"), "does not have.*sites"),
        (lambda f: f.update(methods=["lora"]), "does not have"),
        (lambda f: f.pop("layers"), r"lack \['layers'\]"),
    ],
)
def test_facts_that_make_no_sense_are_refused(path, change, words):
    shaken().save(path)
    rewrite(path, facts=change)
    refused(path, net(), ValueError, words)


def test_a_file_of_the_first_format_is_read(path):
    saved = shaken()
    saved.save(path)

    def as_it_was(facts):
        (method,) = facts.pop("methods")
        facts.pop("moved")
        facts.update(method=method["slug"], hyperparameters=method["hyperparameters"])

    rewrite(path, facts=as_it_was, format=files.FIRST)
    loaded = toolkit.load(net(), path)
    assert loaded.method == saved.method
    x = torch.randn(2, 6)
    assert torch.equal(loaded.model(x), saved.model(x))
    rewrite(path, facts=lambda f: f.pop("layers"), format=files.FIRST)
    refused(path, net(), ValueError, r"lack \['layers'")


@pytest.mark.parametrize(
    ("method", "old"),
    [
        (AdaLoRA(rank=3, target_rank=2, like="paper"), {"squared": True}),
        (toolkit.LoRAPro(rank=2, like="code"), {"official_clock": True}),
        (toolkit.IncreLoRA(like="library"),
         {"normalise": "sqrt", "squared": False, "block_orthogonality": True}),
        (toolkit.LoRAMGPO(rank=2, like="code"),
         {"variant": "mgpo_code", "sigma": 0.03, "beta": 0.01, "refresh": 1, "seed": 0}),
        (toolkit.LoRAGGPO(rank=2), {"rho": 0.05, "smoothing": 0.9, "sign": "source"}),
    ],
)  # fmt: skip
def test_names_of_the_first_format_are_those_of_today(path, method, old):
    adapted = adapt(net(), method, ["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save(path)

    def as_it_was(facts):
        (one,) = facts.pop("methods")
        facts.pop("moved")
        values = one["hyperparameters"] | old
        values.pop("like", None)
        facts.update(method=one["slug"], hyperparameters=values)

    rewrite(path, facts=as_it_was, format=files.FIRST)
    assert toolkit.load(net(), path).method == method


def test_facts_that_cannot_be_read(path):
    save_file({"x": torch.zeros(1)}, path, metadata={"format": files.FORMAT, "facts": "{"})
    refused(path, net(), ValueError, "cannot be read")
    save_file({"x": torch.zeros(1)}, path, metadata={"format": files.FORMAT})
    refused(path, net(), ValueError, "cannot be read")


def test_a_model_with_a_method_on_it_is_refused(path):
    adapted = shaken()
    adapted.save(path)
    refused(path, adapted.model, RuntimeError, "already carries a method")


def test_names_are_exact_when_loading(path):
    """A head that trains must not thaw another parameter whose name ends alike."""

    def model():
        torch.manual_seed(0)
        inner = nn.ModuleDict({"head": nn.Linear(4, 4)})
        return nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 4), "inner": inner})

    adapted = adapt(model(), LoRA(rank=2), "body", train=lambda name: name.startswith("head."))
    adapted.save(path)
    loaded = toolkit.load(model(), path)
    assert list(loaded.extra) == ["head.weight", "head.bias"]
    assert not loaded.model["inner"]["head"].weight.requires_grad


def test_compacted_triplets_come_back(path):
    adapted = shaken(AdaLoRA(rank=4, target_rank=2))
    for keep, adapter in zip((3, 0), adapted.adapters.values(), strict=True):
        with torch.no_grad():
            adapter.E[keep:] = 0
        adapter.compact()
    x = torch.randn(5, 6)
    adapted.save(path)
    loaded = toolkit.load(net(), path)
    assert [a.E.shape[0] for a in loaded.adapters.values()] == [3, 0]
    assert torch.equal(loaded.model(x), adapted.model(x))
    loaded.merge()
    torch.testing.assert_close(loaded.model(x), adapted.model(x))


def test_resume_needs_a_schedule(path):
    adapted = shaken()
    with pytest.raises(RuntimeError, match="attach"):
        adapted.save(path, resume=True)
    assert not path.exists()


def test_half_precision_bases_save_their_float32_factors(path):
    adapted = shaken(base=net().bfloat16())
    adapted.save(path)
    assert load_file(path)["adapter.0.A"].dtype == torch.float32
    loaded = toolkit.load(net().bfloat16(), path)
    x = torch.randn(2, 6, dtype=torch.bfloat16)
    assert torch.equal(loaded.model(x), adapted.model(x))
