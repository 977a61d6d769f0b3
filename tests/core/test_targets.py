"""Which layers are adapted: patterns, types, callables, and what is said when none is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from toolkit import LoRA, adapt
from toolkit.core.adapt.sites import describe, kind_of
from toolkit.core.adapt.targets import matches, select

KINDS = LoRA.info.kinds


class Block(nn.Module):
    def __init__(self, gain: bool = True):
        super().__init__()
        self.query = nn.Linear(4, 4)
        self.value = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        if gain:
            self.gain = nn.Parameter(torch.ones(4))


def net() -> nn.Sequential:
    model = nn.Sequential()
    model.words = nn.Embedding(7, 4)
    model.blocks = nn.ModuleList([Block(), Block()])
    model.conv = nn.Conv1d(4, 4, 3)
    model.head = nn.Linear(4, 2)
    return model


ALL = ["blocks.0.query", "blocks.0.value", "blocks.1.query", "blocks.1.value"]


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("layer.0.query", "query", True),
        ("layer.0.query", "0.query", True),
        ("layer.0.query", "layer.0.query", True),
        ("layer.0.query", "uery", False),
        ("layer.0.query", "*query", True),
        ("layer.0.query", "layer.?.query", True),
        ("layer.0.query", "layer.[12].*", False),
        ("layer.0.query", "Query", False),
    ],
)
def test_patterns(name, pattern, expected):
    assert matches(name, pattern) is expected


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, [*ALL, "head"]),
        ("query", [ALL[0], ALL[2]]),
        (["query", "head"], [ALL[0], ALL[2], "head"]),
        ("blocks.0.*", ALL[:2]),
        (nn.Embedding, ["words"]),
        ([nn.Conv1d, "head"], ["conv", "head"]),
        (nn.Module, ["words", *ALL, "conv", "head"]),
        (lambda name, module: name.endswith("value"), [ALL[1], ALL[3]]),
    ],
)
def test_selection_keeps_the_models_order(targets, expected):
    assert list(select(net(), targets, KINDS)) == expected


def test_nothing_matched_shows_near_misses():
    with pytest.raises(ValueError, match=r"targets='qurey' matches no layer.*query"):
        select(net(), "qurey", KINDS)
    with pytest.raises(ValueError, match="Nearest names"):
        select(net(), lambda name, module: False, KINDS)


def test_one_dead_pattern_of_several_is_not_passed_over():
    with pytest.raises(ValueError, match=r"'vlaue' matches no layer.*value"):
        select(net(), ["query", "vlaue"], KINDS)


def test_matched_modules_of_no_use_are_refused():
    with pytest.raises(TypeError, match="LayerNorm"):
        select(net(), "norm", KINDS)
    with pytest.raises(TypeError, match="LayerNorm"):
        select(net(), ["query", "blocks.0.norm"], KINDS)
    with pytest.raises(TypeError, match=r"kind linear"):
        select(net(), nn.Conv1d, ("linear",))


@pytest.mark.parametrize("targets", [[], ()])
def test_empty_targets(targets):
    with pytest.raises(ValueError, match="empty"):
        select(net(), targets, KINDS)


@pytest.mark.parametrize("targets", [3, [3], [None]])
def test_targets_of_no_accepted_form(targets):
    with pytest.raises(TypeError, match="targets"):
        select(net(), targets, KINDS)


def test_excluded_layers_stay_but_not_what_is_inside_them():
    assert list(select(net(), None, KINDS, exclude=["head"])) == ALL
    # a block holds a parameter of its own; that must not shield the layers inside it
    assert list(select(net(), "query", KINDS, exclude=["blocks.0"])) == [ALL[0], ALL[2]]
    adapted = adapt(net(), LoRA(rank=2), "query", train="gain")
    assert list(adapted.sites) == [ALL[0], ALL[2]]
    assert list(adapted.extra) == ["blocks.0.gain", "blocks.1.gain"]


def test_train_patterns_and_callables():
    model = net()
    adapted = adapt(model, LoRA(rank=2), "query", train=["head.*", "norm.bias"])
    expected = ["blocks.0.norm.bias", "blocks.1.norm.bias", "head.weight", "head.bias"]
    assert list(adapted.extra) == expected
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.adapter.{k}" for n in adapted.sites for k in "AB"} | set(expected)
    adapted = adapt(net(), LoRA(rank=2), None, train=lambda name: name == "head.weight")
    assert list(adapted.extra) == ["head.weight"]
    assert "head" not in adapted.sites


def test_a_module_named_in_train_brings_all_it_holds():
    adapted = adapt(net(), LoRA(rank=2), "query", train="blocks.1")
    assert all(name.startswith("blocks.1.") for name in adapted.extra)
    assert list(adapted.sites) == ["blocks.0.query"]


@pytest.mark.parametrize(
    ("layer", "kind", "shape"),
    [
        (nn.Linear(5, 3), "linear", (3, 5)),
        (nn.Embedding(9, 4), "embedding", (4, 9)),
        (nn.Conv1d(4, 6, 3), "conv", (6, 12)),
        (nn.Conv2d(4, 6, (3, 2), groups=2), "conv", (6, 12)),
        (nn.Conv3d(2, 3, 2), "conv", (3, 16)),
        (nn.MultiheadAttention(6, 2), "attention", (18, 6)),
    ],
)
def test_matrix_of_each_kind(layer, kind, shape):
    spec = describe(layer, "x")
    assert (spec.kind, (spec.rows, spec.cols)) == (kind, shape)
    weight = getattr(layer, spec.parameter)
    matrix = spec.to_matrix(weight)
    assert matrix.shape == shape
    assert torch.equal(spec.to_weight(matrix), weight)


def test_layers_without_one_weight_have_no_kind():
    for layer in (nn.LayerNorm(3), nn.ConvTranspose2d(2, 2, 2), nn.Bilinear(2, 2, 2), nn.ReLU()):
        assert kind_of(layer) is None
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.Sequential(layer)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="anew"):
        adapt(model, LoRA(rank=2), "0")
    assert list(model.state_dict()) == before
