"""Adapters written here load in Hugging Face peft with the same outputs, and the reverse."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from tests.hf.models import bert, convnet, gpt2, images, logits, shake, tokens, words
from toolkit import AdaLoRA, LoRA, adapt, load_peft

peft = pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

LORA = LoRA(rank=3, alpha=5.0)
RS = LoRA(rank=4, alpha=5.0, rank_stabilised=True)
ADA = AdaLoRA(rank=4, target_rank=2, alpha=6.0)
BERT, GPT2 = ["query", "value", "dense"], ["c_attn", "c_fc"]
# name -> model, input, method, targets, parameters trained beside
CASES = {
    "lora linear": (bert, tokens(), LORA, BERT[:2], "classifier"),
    "lora rank-stabilised": (bert, tokens(), RS, BERT, ()),
    "lora conv1d": (gpt2, tokens(), LORA, GPT2, ()),
    "lora conv2d": (convnet, images(), LORA, ["stem", "pointwise"], "head"),
    "lora embedding": (words, tokens(20), LORA, ["words", "hidden"], "head"),
    "adalora linear": (bert, tokens(), ADA, BERT[:2], "classifier"),
    "adalora conv1d": (gpt2, tokens(), ADA, GPT2, ()),
}


def from_peft(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize("name", CASES)
def test_ours_loads_in_peft(name, tmp_path):
    make, x, method, targets, train = CASES[name]
    adapted = adapt(make(), method, targets, train=train)
    shake(adapted.parameters())
    ours = logits(adapted.model, x)
    assert not torch.allclose(ours, logits(make(), x), atol=1e-3), "the adapter does nothing"
    adapted.save_peft(tmp_path)
    theirs = from_peft(make(), tmp_path)
    torch.testing.assert_close(logits(theirs, x), ours, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits(theirs.merge_and_unload(), x), ours, rtol=1e-5, atol=1e-5)


def peft_config(method, targets, train):
    beside = [train] if train else None
    common = {"target_modules": targets, "modules_to_save": beside, "lora_alpha": method.alpha}
    if isinstance(method, AdaLoRA):
        return peft.AdaLoraConfig(
            init_r=method.rank, target_r=method.target_rank, total_step=10, **common
        )
    return peft.LoraConfig(r=method.rank, use_rslora=method.rank_stabilised, **common)


def trained_in_peft(make, method, targets, train):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(make(), peft_config(method, targets, train))
    shake([p for p in model.parameters() if p.requires_grad], seed=3)
    return model


@pytest.mark.parametrize("name", CASES)
def test_theirs_loads_here(name, tmp_path):
    make, x, method, targets, train = CASES[name]
    theirs = trained_in_peft(make, method, targets, train)
    expected = logits(theirs, x)
    theirs.save_pretrained(tmp_path)
    adapted = load_peft(make(), tmp_path)
    torch.testing.assert_close(logits(adapted.model, x), expected, rtol=1e-6, atol=1e-6)
    assert adapted.method.alpha == method.alpha
    assert bool(adapted.extra) == bool(train)
    torch.testing.assert_close(logits(adapted.merge(), x), expected, rtol=1e-5, atol=1e-5)


def pruned_in_peft(make):
    """peft's AdaLoRA after its last allocation: the save keeps the surviving triplets only."""
    theirs = trained_in_peft(make, ADA, BERT[:2], "classifier")
    config = theirs.peft_config["default"]
    pattern = {}
    for i, (name, p) in enumerate(theirs.base_model.model.named_parameters()):
        if "lora_E" in name:
            kept = torch.tensor([True, i % 2 == 0, False, i % 3 == 0])
            p.data[~kept] = 0
            pattern[name] = kept.tolist()
    config.rank_pattern = pattern
    return theirs


def test_resized_adalora_loads_here(tmp_path):
    theirs = pruned_in_peft(bert)
    expected = logits(theirs, tokens())
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    adapted = load_peft(bert(), tmp_path)
    torch.testing.assert_close(logits(adapted.model, tokens()), expected, rtol=1e-6, atol=1e-6)
    ranks = {a.E.shape[0] for a in adapted.adapters.values()}
    assert max(ranks) <= 3, "the pruned triplets came back"
    assert len(ranks) > 1


def test_compacted_adalora_loads_in_peft(tmp_path):
    adapted = adapt(bert(), ADA, BERT[:2], train="classifier")
    shake(adapted.parameters())
    for i, adapter in enumerate(adapted.adapters.values()):
        adapter.E.data[: i % 3] = 0
        adapter.compact()
    ours = logits(adapted.model, tokens())
    adapted.save_peft(tmp_path)
    theirs = from_peft(bert(), tmp_path)
    torch.testing.assert_close(logits(theirs, tokens()), ours, rtol=1e-6, atol=1e-6)


def test_exact_names_do_not_reach_further(tmp_path):
    """Layer "0" of a nest must not be taken for every layer whose name ends in ".0"."""

    def make():
        torch.manual_seed(2)
        inner = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(6, 6))
        return torch.nn.Sequential(torch.nn.Linear(5, 6), inner)

    adapted = adapt(make(), LORA, "0")
    shake(adapted.parameters())
    x = torch.randn(3, 5)
    adapted.save_peft(tmp_path)
    theirs = from_peft(make(), tmp_path)
    torch.testing.assert_close(logits(theirs, x), logits(adapted.model, x), rtol=1e-6, atol=1e-6)


def test_refuses_what_means_something_else_there(tmp_path):
    adapted = adapt(convnet(), LORA, ["depthwise"])
    with pytest.raises(TypeError, match=r"depthwise.*groups?|grouped.*depthwise|depthwise"):
        adapted.save_peft(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    model = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
    with pytest.raises(TypeError, match="attention"):
        adapt(model, LORA, torch.nn.MultiheadAttention).save_peft(tmp_path / "new")
    adapted = adapt(bert(), LORA, "query", train="classifier.bias")
    with pytest.raises(TypeError, match="whole modules"):
        adapted.save_peft(tmp_path / "new")


RANKS = {"rank_pattern": {"layer.0.*query": 2, "value": 5}, "alpha_pattern": {"^bert.*value": 9}}
OPTIONS = {
    "patterns": (bert, tokens(), BERT[:2], RANKS),
    "patterns rslora": (bert, tokens(), BERT[:2], RANKS | {"use_rslora": True}),
    "bias lora_only": (bert, tokens(), BERT[:2], {"bias": "lora_only"}),
    "bias all": (bert, tokens(), BERT[:2], {"bias": "all"}),
    "dora": (bert, tokens(), BERT[:2], {"use_dora": True, "lora_alpha": 5}),
    "dora rslora": (bert, tokens(), BERT[:2], RANKS | {"use_dora": True, "use_rslora": True}),
    "dora conv1d": (gpt2, tokens(), GPT2, {"use_dora": True, "fan_in_fan_out": True}),
    "dora conv2d": (convnet, images(), ["stem", "pointwise"], {"use_dora": True}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_single_layers_biases_and_lengths_mean_the_same(name, tmp_path):
    make, x, targets, options = OPTIONS[name]
    config = peft.LoraConfig(r=3, target_modules=targets, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(make(), config)
    shake([p for p in theirs.parameters() if p.requires_grad], seed=3)
    expected = logits(theirs, x)
    theirs.save_pretrained(tmp_path / "theirs")
    adapted = load_peft(make(), tmp_path / "theirs")
    torch.testing.assert_close(logits(adapted.model, x), expected, rtol=1e-5, atol=1e-5)
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(p.numel() for p in adapted.parameters()) == trained
    if name.startswith("bias"):
        with pytest.raises(TypeError, match="whole modules"):
            adapted.save_peft(tmp_path / "ours")
    else:
        adapted.save_peft(tmp_path / "ours")
        again = from_peft(make(), tmp_path / "ours")
        torch.testing.assert_close(logits(again, x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(adapted.merge(), x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"bias": "some"}, "bias='some'"), ({"rank_pattern": {"(": 2}}, "rank_pattern"),
     ({"rank_pattern": {"query": "2"}}, "rank"), ({"alpha_pattern": {"query": None}}, "alpha"),
     ({"rank_pattern": [2]}, "rank_pattern"), ({"bias": "all"}, "incomplete.*trains '.*bias'"),
     ({"bias": "lora_only"}, r"incomplete.*trains '.*query\.bias'"), ({"use_dora": 1}, "length"),
     ({"use_dora": True}, "length"), ({"rank_pattern": {"query": 2}}, "shape"),
     ({"use_qalora": True}, "use_qalora"), ({"layer_replication": [[0, 1]]}, "replication")],
)  # fmt: skip
def test_refuses_options_that_do_not_fit_and_changes_nothing(options, word, tmp_path):
    config = peft.LoraConfig(r=3, target_modules=["query"])
    peft.get_peft_model(bert(), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    model = bert()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=word):
        load_peft(model, tmp_path)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*nothing is attached")
def test_layers_of_other_ranks_are_written_as_patterns(tmp_path):
    """Layer "0" is also the end of another's name."""

    def make():
        torch.manual_seed(2)
        inner = torch.nn.Sequential(torch.nn.Linear(6, 6))
        return torch.nn.Sequential(torch.nn.Linear(5, 6), inner)

    adapted = adapt(make(), {"1.0": LoRA(rank=2), "[0]": LoRA(rank=3, alpha=4.0)})
    shake(adapted.parameters())
    x = torch.randn(3, 5)
    adapted.save_peft(tmp_path)
    for model in (from_peft(make(), tmp_path), load_peft(make(), tmp_path).model):
        torch.testing.assert_close(logits(model, x), logits(adapted.model, x))
    adapted = adapt(make(), {"1.0": LoRA(rank=2), "[0]": LoRA(rank=2, dropout=0.1)})
    with pytest.raises(TypeError, match="differ in more"):
        adapted.save_peft(tmp_path / "new")
    adapted = adapt(make(), {"1.0": ADA, "[0]": AdaLoRA(rank=3, target_rank=2)})
    with pytest.raises(TypeError, match="one rank"):
        adapted.save_peft(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_dropout_that_a_method_lacks_is_said(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query"], use_dora=True, lora_dropout=0.1)
    peft.get_peft_model(bert(), config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"lora_dropout=0\.1"):
        load_peft(bert(), tmp_path)


def test_refuses_damage_and_other_models(tmp_path):
    theirs = trained_in_peft(bert, LORA, ["query"], ())
    theirs.save_pretrained(tmp_path)
    model = words()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="architecture"):
        load_peft(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        load_peft(bert(), tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        load_peft(bert(), tmp_path)
    config = tmp_path / "adapter_config.json"
    file.write_bytes(whole)
    config.write_text(config.read_text().replace('"LORA"', '"IA3"'))
    with pytest.raises(ValueError, match="IA3"):
        load_peft(bert(), tmp_path)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert after.keys() == before.keys()


def gaps(theirs, ours, x):
    return float((logits(theirs, x) - logits(ours, x)).abs().max())


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "pissa", "olora"])
def test_a_start_that_changes_the_base_is_refused_and_others_load(start, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=start)
    theirs = peft.get_peft_model(bert(), config)
    shake([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path)
    if start in ("pissa", "olora"):
        with pytest.raises(ValueError, match=f"init_lora_weights='{start}'"):
            load_peft(bert(), tmp_path)
    else:
        assert gaps(theirs, load_peft(bert(), tmp_path).model, tokens()) < 1e-6


class Padded(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(4, 6, 3, padding=1, **options)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


@pytest.mark.parametrize("options", [{"padding_mode": "circular"}, {"padding_mode": "reflect"},
                                     {"padding_mode": "replicate"}, {"dilation": 2}])  # fmt: skip
def test_convolutions_that_peft_maps_otherwise_are_refused_both_ways(options, tmp_path):
    with pytest.raises(TypeError, match="'conv'"):
        adapt(Padded(**options), LORA, "conv").save_peft(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    config = peft.LoraConfig(r=2, target_modules=["conv"])
    peft.get_peft_model(Padded(**options), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'conv'"):
        load_peft(Padded(**options), tmp_path)


def test_a_norm_that_trains_beside_brings_its_statistics(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["stem"], modules_to_save=["norm"])
    theirs = peft.get_peft_model(convnet(), config).train()
    shake([p for p in theirs.parameters() if p.requires_grad])
    theirs(images() * 2 + 1)
    theirs.save_pretrained(tmp_path / "theirs")
    model = convnet()
    adapted = load_peft(model, tmp_path / "theirs")
    assert gaps(theirs, model, images()) < 1e-5
    adapted.unload()
    assert torch.equal(model.norm.running_mean, convnet().norm.running_mean)

    adapted = adapt(convnet(), LORA, "stem", train="norm")
    adapted.model.train()(images() * 2 + 1)
    adapted.save_peft(tmp_path / "ours")
    assert gaps(from_peft(convnet(), tmp_path / "ours"), adapted.model, images()) < 1e-5
    adapted = adapt(convnet(), LORA, "stem")
    adapted.model.train()(images() * 2 + 1)
    with pytest.raises(TypeError, match=r"norm\.running_mean"):
        adapted.save_peft(tmp_path / "none")


@pytest.mark.parametrize("trained", [["lm_head"], ["wte"], None])
def test_a_tied_head_of_a_folder_is_one_thing_or_refused(trained, tmp_path):
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=trained
    )
    theirs = peft.get_peft_model(gpt2(), config)
    shake([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path, save_embedding_layers=trained is None)
    model = gpt2()
    if trained:
        with pytest.raises(ValueError, match=r"one tied tensor"):
            load_peft(model, tmp_path)
        assert model.lm_head.weight is model.transformer.wte.weight
    else:
        adapted = load_peft(model, tmp_path)
        assert not adapted.extra
        assert gaps(theirs, model, tokens()) < 1e-6


def test_a_peft_folder_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    from toolkit.core.adapt import peft as folders

    adapted = adapt(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoRA(rank=2))
    folders.save_peft(adapted, tmp_path)
    old = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(tensors, file, metadata=None):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(folders, "save_file", full)
    other = adapt(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoRA(rank=1))
    with pytest.raises(OSError, match="no space"):
        folders.save_peft(other, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == old
