"""Damaged adapter files, schedules and peft folders: loaded right, or refused, all as before."""

from __future__ import annotations

import copy
import json
import random
import shutil
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import toolkit
from toolkit import AdaLoRA, IncreLoRA, LoRA, LoRAGGPO, LoRAPro, TriAdaptLoRA, adapt
from toolkit.core.adapt.files import FORMAT

METHODS = {
    "lora": LoRA(rank=2),
    "adalora": AdaLoRA(rank=3, target_rank=1, warmup=1, final=1, interval=1),
    "increlora": IncreLoRA(target_rank=2, warmup=1, interval=1),
    "triadaptlora": TriAdaptLoRA(target_rank=2),
    "lora_pro": LoRAPro(rank=2),
    "lora_ggpo": LoRAGGPO(rank=2),
}
STEPS = 8
DEEP = json.loads("[" * 400 + "]" * 400)
ODD = (None, -1, 0, 10**30, 2.9, float("nan"), float("inf"), True, "false", "", [], {}, [[]], DEEP)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 3))


def optimizer_of(slug, adapted):
    make = torch.optim.SGD if slug == "lora_pro" else torch.optim.AdamW
    return make(adapted.parameters(), lr=1e-2)


@pytest.fixture(scope="module", params=METHODS)
def saved(request, tmp_path_factory):
    """A method's name and the file of half a run."""
    slug, path = request.param, tmp_path_factory.mktemp("saved") / "a.safetensors"
    adapted = adapt(net(), METHODS[slug], ["0", "2"], train="3")
    optimizer = optimizer_of(slug, adapted)
    adapted.attach(optimizer, total_steps=STEPS)
    for step in range(4):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        adapted(torch.randn(8, 6, generator=generator)).square().mean().backward()
        optimizer.step()
    adapted.save(path, resume=adapted.controller is not None)
    return slug, path


def state_of(model, optimizer=None):
    """Everything that a refusal must leave: tensors, by identity and value, flags and groups."""
    tensors = {k: (id(v), v.detach().clone()) for k, v in model.state_dict(keep_vars=True).items()}
    flags = [p.requires_grad for p in model.parameters()]
    kinds = [type(m) for m in model.modules()]
    groups = [
        {k: [id(p) for p in v] if k == "params" else copy.copy(v) for k, v in group.items()}
        for group in (optimizer.param_groups if optimizer else ())
    ]
    return tensors, flags, kinds, groups, len(optimizer.state) if optimizer else 0


def same(before, after):
    assert before[0].keys() == after[0].keys()
    for key, (identity, value) in before[0].items():
        assert after[0][key][0] == identity, key
        torch.testing.assert_close(after[0][key][1], value, rtol=0, atol=0, equal_nan=True)
    assert before[1:] == after[1:]


def odd_tensors(value):
    yield torch.tensor(1.0)
    yield torch.zeros(value.shape, dtype=torch.complex64)
    yield torch.zeros(value.shape, dtype=torch.bool)
    yield torch.full(value.shape, float("nan"))
    yield torch.full(value.shape, -(2**40), dtype=torch.int64)
    yield torch.full(value.shape, 2**50, dtype=torch.int64)
    yield torch.zeros(10**9, 0)
    yield torch.zeros(*value.shape, 2)
    yield torch.zeros(5)


def damaged_facts(draw, facts):
    """Put something odd in one place of an object."""
    where = facts
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        key = draw.choice(keys)
        inner = where[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.75:
            where = inner
        else:
            where[key] = draw.choice(ODD)
            return


def damaged(draw, path, out):
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
    tensors = load_file(path)
    key = draw.choice(list(tensors))
    kind = draw.choice(["facts", "tensor", "tensor", "gone", "renamed"])
    if kind == "facts":
        damaged_facts(draw, facts)
    elif kind == "tensor":
        tensors[key] = draw.choice(list(odd_tensors(tensors[key])))
    elif kind == "renamed":
        tensors[key + draw.choice([".x", "x", "0"])] = tensors.pop(key)
    else:
        del tensors[key]
    save_file(tensors, out, metadata={"format": FORMAT, "facts": json.dumps(facts)})


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_loaded_right_or_changes_nothing(saved, tmp_path):
    slug, path = saved
    draw, refused = random.Random(slug), 0
    x = torch.randn(4, 6)
    for _ in range(60):
        out = tmp_path / "damaged.safetensors"
        damaged(draw, path, out)
        model = net()
        before = state_of(model)
        try:
            adapted = toolkit.load(model, out)
        except ValueError:
            same(before, state_of(model))
            refused += 1
            continue
        assert model.eval()(x).isfinite().all()
        optimizer = optimizer_of(slug, adapted)
        before = state_of(model, optimizer)
        try:
            adapted.attach(optimizer, total_steps=STEPS)
        except (ValueError, TypeError):
            same(before, state_of(model, optimizer))
            refused += 1
            continue
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()
        assert all(p.isfinite().all() for p in adapted.parameters())
    assert refused > 20


SCHEDULES = [
    ("step", torch.tensor(-3)),
    ("step", torch.tensor(2.0)),
    ("step", torch.tensor([1, 2])),
    ("groups", torch.tensor(-1)),
    ("groups", torch.tensor(10**15)),
    ("births", torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9])),
    ("eta0", torch.tensor(float("nan"), dtype=torch.float64)),
    ("members", torch.tensor([255, 254], dtype=torch.uint8)),
]


@pytest.mark.parametrize("number", range(len(SCHEDULES)))
@pytest.mark.parametrize("saved", ["increlora"], indirect=True)
def test_a_schedule_that_no_run_leaves_behind_is_refused(saved, number, tmp_path):
    slug, path = saved
    name, value = SCHEDULES[number]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    out = tmp_path / "a.safetensors"
    assert f"schedule.0.{name}" in load_file(path)
    save_file(load_file(path) | {f"schedule.0.{name}": value}, out, metadata=metadata)
    adapted = toolkit.load(net(), out)
    optimizer = optimizer_of(slug, adapted)
    before = state_of(adapted.model, optimizer)
    with pytest.raises(ValueError, match=r"schedule|groups"):
        adapted.attach(optimizer, total_steps=STEPS)
    same(before, state_of(adapted.model, optimizer))


@pytest.mark.parametrize("facts", ["[" * 100_000, "1", "null", "[]", '{"a": 1', ""])
def test_facts_of_any_form_are_refused(facts, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"format": FORMAT, "facts": facts})
    with pytest.raises(ValueError, match="facts"):
        toolkit.load(net(), path)


def test_each_odd_tensor_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    adapt(net(), LoRA(rank=2), ["0", "2"], train="3").save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    whole = load_file(path)
    for key, name in [("adapter.0.A", "'0'.*A"), ("train.3.bias", "3.bias")]:
        for odd in odd_tensors(whole[key]):
            save_file(whole | {key: odd}, path, metadata=metadata)
            model = net()
            before = state_of(model)
            with pytest.raises(ValueError, match=name):
                toolkit.load(model, path)
            same(before, state_of(model))


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_peft_folder_is_loaded_right_or_changes_nothing(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "damaged"
    adapted = adapt(net(), LoRA(rank=2), ["0", "2"], train="3")
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(0.1)
    adapted.save_peft(whole)
    x, draw, refused = torch.randn(4, 6), random.Random(0), 0
    expected = adapted.model.eval()(x)
    for _ in range(150):
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        config_file, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        config, tensors = json.loads(config_file.read_text()), load_file(file)
        key, kind = draw.choice(list(tensors)), draw.choice(["config", "tensor", "gone", "absent"])
        if kind == "config":
            damaged_facts(draw, config)
        elif kind == "absent":
            del config[draw.choice(list(config))]
        elif kind == "tensor":
            tensors[key] = draw.choice(list(odd_tensors(tensors[key])))
        else:
            del tensors[key]
        config_file.write_text(json.dumps(config))
        save_file(tensors, file)
        model = net()
        before = state_of(model)
        try:
            toolkit.load_peft(model, folder)
        except ValueError:
            same(before, state_of(model))
            refused += 1
            continue
        assert kind in ("config", "absent"), key
        changed = [k for k in ("lora_alpha", "use_rslora") if config.get(k) != EXPORTED[k]]
        assert changed or torch.equal(model.eval()(x), expected), config
    assert refused > 60


EXPORTED = {"lora_alpha": 16.0, "use_rslora": False}


def test_a_string_or_a_fraction_is_no_number_of_a_configuration(tmp_path):
    adapt(net(), LoRA(rank=2), ["0"]).save_peft(tmp_path)
    file = tmp_path / "adapter_config.json"
    whole = json.loads(file.read_text())
    for change, words in [
        ({"r": 2.9}, "rank"), ({"use_rslora": "false"}, "rank_stabilised"),
        ({"lora_alpha": float("nan")}, "alpha"), ({"lora_alpha": "16"}, "alpha"),
        ({"r": True}, "rank"), ({"lora_alpha": None}, "lora_alpha"),
        ({"use_dora": "false"}, "use_dora"), ({"novel_option": 1}, "novel_option"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "corda"}, "init_lora_weights"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
        ({"target_modules": ["0", "2"]}, "incomplete.*'2'"),
        ({"target_modules": ["2"]}, "'0', which target_modules"),
        ({"modules_to_save": ["3"]}, "incomplete.*'3.weight'"),
        ({"fan_in_fan_out": "false"}, "fan_in_fan_out"), ({"inference_mode": 1}, "inference_mode"),
        ({"exclude_modules": ["0"]}, "'0', which exclude_modules"),
        ({"exclude_modules": 3}, "exclude_modules"),
    ]:  # fmt: skip
        file.write_text(json.dumps(whole | change))
        model = net()
        before = state_of(model)
        with pytest.raises(ValueError, match=words):
            toolkit.load_peft(model, tmp_path)
        same(before, state_of(model))
    for start in (True, False, "gaussian", "eva"):
        file.write_text(json.dumps(whole | {"init_lora_weights": start}))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            toolkit.load_peft(net(), tmp_path)


@pytest.mark.parametrize(
    ("wrong", "words"), [(64, "outside the 12"), (-1, "outside the 12"), (None, "twice")]
)
def test_a_mask_that_names_other_entries_is_refused(tmp_path, wrong, words):
    from torch import nn

    path = tmp_path / "mask.safetensors"
    toolkit.adapt(nn.Sequential(nn.Linear(4, 3)), toolkit.SparseMask(share=0.5)).save(path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
    index = tensors["adapter.0.index"]
    index[0] = index[1] if wrong is None else wrong
    save_file(tensors, path, metadata=facts)
    model = nn.Sequential(nn.Linear(4, 3))
    before = state_of(model)
    with pytest.raises(ValueError, match=words):
        toolkit.load(model, path)
    same(before, state_of(model))
