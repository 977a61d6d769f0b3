"""The kinds of change and their plain examples, several methods on one model, what travels."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import toolkit
from toolkit import (
    IA3,
    AdaLoRA,
    DoRA,
    Houlsby,
    IncreLoRA,
    LoRA,
    LoRAPro,
    Prompts,
    SparseMask,
    Train,
    adapt,
)
from toolkit.core import nets
from toolkit.core.adapt.layer import AdaptedLayer
from toolkit.core.adapt.sites import describe, site_of
from toolkit.core.adapt.tokens import TokenLayer
from toolkit.core.adapt.weight import WeightLayer

X = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1))


def vit() -> nn.Module:
    draw = torch.Generator().manual_seed(0)
    return nets.digits_transformer(width=16, depth=2, heads=2, generator=draw)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


SEVERAL = {
    "*.query": LoRA(rank=2),
    "*norm?": IA3(shift=True),
    "*.bias": Train(),
    "blocks.0.up": AdaLoRA(rank=3, target_rank=1),
}
EXAMPLES = {
    "weight": (DoRA(rank=2), ["*.query", "*.value"]),
    "scale": (IA3(), ["*.key", "*.norm1", "*.up"]),
    "bottleneck": (Houlsby(width=4), ["*.output", "*.down"]),
    "parallel": (Houlsby(width=4, parallel=True, scale=2.0), "*.attention"),
    "mask": (SparseMask(share=0.1), "*.query"),
    "parameters": (Train(), "*.bias"),
    "tokens": (Prompts(tokens=3), "blocks.?"),
    "several": (SEVERAL, None),
    "nested": (
        {"blocks.?": Houlsby(width=3, parallel=True), "*.output": LoRA(rank=2), "*.up": IA3()},
        None,
    ),
}


def put(key: str, model: nn.Module):
    method, targets = EXAMPLES[key]
    return adapt(model, method, targets, generator=seeded())


def train(adapted, steps: int = 3, decay: float = 0.1, start: int = 0, optimizer=None):
    if optimizer is None:
        optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2, weight_decay=decay)
        adapted.attach(optimizer, total_steps=20)
    for step in range(start, start + steps):
        optimizer.zero_grad()
        (adapted.model(X) - step).square().mean().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("key", EXAMPLES)
def test_each_kind_starts_at_its_base_learns_saves_and_comes_off(key, tmp_path):
    model, base = vit(), vit()
    before = base(X).detach()
    adapted = put(key, model)
    start = (model(X) - before).abs().max().item()
    exact = all(m.info.zero_init and not m.info.init_tolerance for m in adapted.methods)
    assert start == 0 if exact else start < 0.5
    train(adapted)
    after = model(X).detach()
    assert (after - before).abs().max() > 1e-4
    frozen = dict(base.named_parameters())
    moving = {n for n, _ in adapted.extra.items()}
    for name, parameter in model.named_parameters():
        plain = name.replace(".base.", ".")
        if plain in frozen and plain not in moving:
            assert torch.equal(parameter, frozen[plain]), name
    adapted.save(tmp_path / "a.safetensors")
    loaded = toolkit.load(vit(), tmp_path / "a.safetensors")
    assert torch.equal(loaded.model(X), after)
    assert loaded.methods == adapted.methods
    other = put(key, vit())
    other.model.load_state_dict(model.state_dict())
    assert torch.equal(other.model(X), after)
    copied = copy.deepcopy(adapted)
    assert torch.equal(copied.model(X), after)
    if all(m.info.mergeable for m in adapted.methods):
        adapted.merge()
        torch.testing.assert_close(model(X), after)
        adapted.unmerge()
    else:
        with pytest.raises(TypeError, match="cannot be merged"):
            adapted.merge()
        assert torch.equal(model(X), after)
    adapted.unload()
    assert torch.equal(model(X), before)
    assert not any(isinstance(m, AdaptedLayer) for m in model.modules())


@pytest.mark.parametrize(
    "key", [k for k in EXAMPLES if k not in ("parameters", "several", "nested")]
)
def test_numbers_trained_are_those_of_the_formula(key):
    adapted = put(key, vit())
    for placed in adapted.sites.values():
        counted = sum(p.numel() for p in placed.layer.adapter.parameters())
        assert counted == adapted.method.count(placed.site)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv2d(2, 5, 3, stride=2), (3, 2, 7, 7)), (nn.Conv1d(4, 6, 3, groups=2), (4, 9))],
)
def test_a_bottleneck_acts_on_the_channels_of_a_convolution(layer, shape):
    model, x = nn.Sequential(copy.deepcopy(layer)), torch.rand(shape)
    base, method = model(x).detach(), Houlsby(width=3, act="relu", scale=2.0)
    adapted = adapt(model, method, "0", generator=seeded())
    assert torch.equal(model(x), base)
    assert sum(p.numel() for p in adapted.parameters()) == method.count(adapted.sites["0"].site)
    one = adapted.adapters["0"]
    with torch.no_grad():
        for p in adapted.parameters():
            p.normal_(generator=seeded())
    y = base.movedim(1 - len(layer.weight.shape), -1)
    more = (y @ one.down.T + one.down_bias).relu() @ one.up.T + one.up_bias
    want = (y + 2.0 * more).movedim(-1, 1 - len(layer.weight.shape))
    torch.testing.assert_close(model(x), want)


def test_a_bottleneck_that_would_read_other_positions_or_features_is_refused_by_name():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()))
    with pytest.raises(ValueError, match=r"'0\.0'.*parallel=False"):
        adapt(model, Houlsby(parallel=True), "0.0")
    adapt(model, Houlsby(), lambda name, _: name == "0")
    with pytest.raises(RuntimeError, match="module '0' has 4 features on its last axis"):
        model(torch.rand(1, 2, 6, 6))


def test_dora_is_its_equation():
    layer = nn.Linear(5, 4)
    adapted = adapt(nn.Sequential(layer), DoRA(rank=2, alpha=4.0), generator=seeded())
    one = adapted.adapters["0"]
    with torch.no_grad():
        one.B.normal_(generator=seeded())
        one.length.mul_(1.5)
        direction = layer.weight + 2.0 * one.B @ one.A
        expected = one.length * direction / direction.norm(dim=1, keepdim=True)
        torch.testing.assert_close(one.merged(layer)["weight"], expected)
        x = torch.randn(3, 5)
        torch.testing.assert_close(adapted.model(x), x @ expected.T + layer.bias)


def test_the_norm_of_dora_is_constant_in_the_backward_pass_of_its_code():
    grads = []
    for like in ("paper", "code"):
        torch.manual_seed(0)
        adapted = adapt(nn.Sequential(nn.Linear(5, 4)), DoRA(rank=2, like=like), generator=seeded())
        adapted.model(torch.ones(2, 5)).square().sum().backward()
        grads.append(adapted.adapters["0"].B.grad)
    assert not torch.allclose(*grads)


def test_a_mask_moves_the_largest_entries_only():
    model = nn.Sequential(nn.Linear(6, 5))
    before = model[0].weight.detach().clone()
    adapted = adapt(model, SparseMask(share=0.2))
    train_plain(adapted, torch.randn(8, 6, generator=seeded()))
    adapted.merge()
    moved = model[0].weight != before
    assert int(moved.sum()) == 6
    assert before.abs()[moved].min() >= before.abs()[~moved].max()
    assert adapted.costs()["changed"] == 6


def train_plain(adapted, x):
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        adapted.model(x).square().sum().backward()
        optimizer.step()


def test_scores_are_measured_on_data_and_leave_the_model_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 2))
    model[2].requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    batches = [torch.randn(5, 4, generator=seeded()) for _ in range(2)]

    def loss(net, x):
        return net(x).square().sum()

    expected = torch.zeros(3, 4)
    model.eval()
    for x in batches:
        expected += torch.autograd.grad(loss(model, x), model[0].weight)[0] ** 2
    model.train()
    method = SparseMask(share=0.25, by="fisher")
    adapted = adapt(model, method, "0", batches=batches, loss=loss)
    index = adapted.adapters["0"].index
    assert set(index.tolist()) == set(expected.flatten().topk(3).indices.tolist())
    assert model.training
    adapted.unload()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "batches"),
        ({"batches": [X]}, "loss"),
        ({"batches": [], "loss": lambda m, x: m(x).sum()}, "empty"),
        ({"batches": [X], "loss": lambda m, x: m.embed.weight.sum()}, "does not reach"),
    ],
)  # fmt: skip
def test_scores_without_data_are_refused(more, words):
    model = vit()
    with pytest.raises(ValueError, match=words):
        adapt(model, SparseMask(by="fisher"), "*.query", **more)
    assert not any(isinstance(m, AdaptedLayer) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_tokens_grow_masks_in_a_bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=20,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    adapted = adapt(model, Prompts(tokens=3), "encoder.layer.?", generator=seeded())
    tokens = torch.arange(1, 9).view(1, 8)
    mask = torch.tensor([[1] * 5 + [0] * 3])
    with torch.no_grad():
        short = model(tokens[:, :5]).last_hidden_state
        padded = model(tokens, attention_mask=mask).last_hidden_state
    assert short.shape == (1, 5, 16)
    torch.testing.assert_close(padded[:, :5], short, rtol=1e-4, atol=1e-5)
    model(tokens, attention_mask=mask).last_hidden_state.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters())


def test_tokens_before_torchs_own_encoder_layer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.ModuleDict({"layer": layer})
    adapt(model, Prompts(tokens=2), "layer", generator=seeded())
    x = torch.randn(1, 6, 8)
    hidden = torch.tensor([[False] * 4 + [True] * 2])
    masked = model["layer"](x, src_key_padding_mask=hidden)
    torch.testing.assert_close(masked[:, :4], model["layer"](x[:, :4]), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- several methods
def test_sites_that_two_methods_want_are_refused_and_nothing_changes():
    model = vit()
    with pytest.raises(ValueError, match=r"LoRA and DoRA both want 'blocks.0.attention.query'"):
        adapt(model, {"*.query": LoRA(rank=2), "blocks.0.*": DoRA(rank=2)})
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="leave targets out"):
        adapt(model, {"*.query": LoRA(rank=2)}, "*.key")
    with pytest.raises(ValueError, match="empty mapping"):
        adapt(model, {})
    with pytest.raises(ValueError, match="matches no layer"):
        adapt(model, {"*.query": LoRA(rank=2), "*.quary": DoRA(rank=2)})
    assert not any(isinstance(m, AdaptedLayer) for m in model.modules())


def test_a_second_adapt_takes_other_sites_and_both_train():
    model = vit()
    first = adapt(model, LoRA(rank=2), "*.query", generator=seeded())
    second = adapt(model, DoRA(rank=2), "*.value", generator=seeded())
    assert all(p.requires_grad for p in [*first.parameters(), *second.parameters()])
    with pytest.raises(RuntimeError, match=r"already carries a method.*query"):
        adapt(model, DoRA(rank=2), "*.query.base")
    before = model(X).detach()
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    first.attach(optimizer)
    model(X).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model(X), before)
    second.unload()
    first.unload()
    assert torch.equal(model(X), vit()(X))


def test_a_method_that_takes_over_the_optimizer_shares_it_with_none():
    model = vit()
    methods = {"*.query": LoRAPro(rank=2), "*.value": AdaLoRA(rank=3, target_rank=1)}
    adapted = adapt(model, methods, generator=seeded())
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="LoRA-Pro takes over"):
        adapted.attach(optimizer, total_steps=10)
    assert adapted.controller is None
    assert not optimizer._optimizer_step_pre_hooks


def test_options_of_several_controllers_go_by_name():
    methods = {"*.query": AdaLoRA(rank=3, target_rank=1), "*.value": IncreLoRA(top=1, interval=2)}
    adapted = adapt(vit(), methods, generator=seeded())
    optimizer = torch.optim.AdamW(adapted.parameters())
    with pytest.raises(TypeError, match=r"option 'scorer'.*adalora=\{"):
        adapted.attach(optimizer, total_steps=500, scorer=lambda c: None)

    def score(controller):
        return [torch.ones(3) * i for i, _ in enumerate(controller.layers)]

    adapted.attach(optimizer, total_steps=500, adalora={"scorer": score})
    assert adapted.controller.parts[0].scorer is score


# ---------------------------------------------------------------- never silent
def test_a_forgotten_attach_is_told_once_at_the_first_backward_pass():
    adapted = adapt(vit(), AdaLoRA(rank=3, target_rank=1), "*.query", generator=seeded())
    assert "not attached" in repr(adapted)
    with pytest.warns(UserWarning, match=r"AdaLoRA acts inside optimizer.step\(\).*attach"):
        adapted.model(X).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted.model(X).sum().backward()


@pytest.mark.parametrize("verb", ["save", "merge"])
def test_a_forgotten_attach_is_told_when_saving_and_merging(verb, tmp_path):
    adapted = adapt(vit(), AdaLoRA(rank=3, target_rank=1), "*.query", generator=seeded())
    with pytest.warns(UserWarning, match=f"nothing is attached at this {verb}"):
        adapted.save(tmp_path / "a.safetensors") if verb == "save" else adapted.merge()


def test_attached_plain_and_loaded_models_are_silent(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted = put("several", vit())
        train(adapted)
        assert ", attached" in repr(adapted)
        adapted.save(tmp_path / "a.safetensors")
        loaded = toolkit.load(vit(), tmp_path / "a.safetensors")
        loaded.merge()
        plain = adapt(vit(), LoRA(rank=2), "*.query")
        plain.model(X).sum().backward()
        assert "attached" not in repr(plain)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (LoRA, r"pass an instance: adapt\(model, LoRA\(\)\)"),
        ("lora", r"pass the method itself: adapt\(model, LoRA\(\)\)"),
        ("lroa", "did you mean 'lora'"),
        (3, "int adapts no model"),
    ],
)
def test_what_is_no_method_is_told_what_to_write(method, words):
    with pytest.raises(TypeError, match=words):
        adapt(vit(), method)


def test_an_lstm_is_told_what_can_be_adapted():
    with pytest.raises(ValueError, match="matches no layer"):
        adapt(nn.ModuleDict({"lstm": nn.LSTM(4, 4)}), LoRA(rank=2))


# ---------------------------------------------------------------- what travels
GROWING = IncreLoRA(top=1, interval=2, warmup=0, restart_warmup=2, target_rank=2)


@pytest.mark.parametrize(
    "method",
    [AdaLoRA(rank=4, target_rank=2, interval=2), GROWING, toolkit.TriAdaptLoRA(target_rank=3),
     toolkit.LoRAGGPO(rank=2), toolkit.LoRAPro(rank=2, mode="efficient"),
     {"*.query": AdaLoRA(rank=4, target_rank=2), "*.value": GROWING}],
    ids=["adalora", "increlora", "triadaptlora", "lora_ggpo", "lora_pro", "two"],
)  # fmt: skip
@pytest.mark.parametrize("attach_first", [True, False])
def test_a_state_dict_alone_resumes_exactly(method, attach_first):
    targets = None if isinstance(method, dict) else ["*.query", "*.value"]

    def new():
        adapted = adapt(vit(), method, targets, generator=seeded())
        return adapted, torch.optim.AdamW(adapted.parameters(), lr=1e-2)

    whole, optimizer = new()
    whole.attach(optimizer, total_steps=16)
    train(whole, 7, optimizer=optimizer)
    file = io.BytesIO()
    torch.save({"model": whole.model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(whole, 5, start=7, optimizer=optimizer)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, optimizer = new()
    if attach_first:
        resumed.attach(optimizer, total_steps=16)
        resumed.model.load_state_dict(saved["model"])
    else:
        resumed.model.load_state_dict(saved["model"])
        optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
        resumed.attach(optimizer, total_steps=16)
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, 5, start=7, optimizer=optimizer)
    for (name, one), (_, two) in zip(
        whole.named_parameters(), resumed.named_parameters(), strict=True
    ):
        assert torch.equal(one, two), name


def test_a_state_of_another_method_is_refused():
    one = adapt(vit(), AdaLoRA(rank=4, target_rank=2), "*.query", generator=seeded())
    train(one)
    other = adapt(vit(), AdaLoRA(rank=4, target_rank=2), ["*.query", "*.value"])
    with pytest.raises(RuntimeError, match="Missing key"):
        other.model.load_state_dict(one.model.state_dict())
    plain = adapt(vit(), LoRA(rank=4), "*.query")
    with pytest.raises(RuntimeError, match="schedule"):
        plain.model.load_state_dict(one.model.state_dict())


def test_statistics_of_batch_norm_belong_to_file_and_unload(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    base = copy.deepcopy(model)
    adapted = adapt(model, LoRA(rank=1), "3", generator=seeded())
    x = torch.randn(4, 1, 8, 8) + 3
    model(x)
    model.eval()
    after = model(x).detach()
    adapted.save(tmp_path / "a.safetensors")
    loaded = toolkit.load(copy.deepcopy(base), tmp_path / "a.safetensors")
    loaded.model.eval()
    assert torch.equal(loaded.model(x), after)
    adapted.unload()
    for name, buffer in base.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer), name


def test_copies_and_pickles_of_an_attached_model_start_unattached():
    adapted = put("several", vit())
    train(adapted)
    for other in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert other.controller is None
        assert torch.equal(other.model(X), adapted.model(X))
        assert [type(m) for m in other.methods] == [type(m) for m in adapted.methods]
        train(other)
        assert not torch.equal(other.model(X), adapted.model(X))


def test_a_method_is_written_from_its_equation_alone():
    class RowScale(WeightLayer):
        def __init__(self, site):
            super().__init__(site)
            self.d = nn.Parameter(torch.zeros(site.rows, 1))

        def new(self, weight):
            return (1 + self.d) * weight

    conv = nn.Conv2d(2, 3, 3)
    layer = RowScale(describe(conv))
    x = torch.randn(1, 2, 5, 5)
    assert torch.equal(layer(conv, x), conv(x))
    with torch.no_grad():
        layer.d[1] = 1.0
    torch.testing.assert_close(
        layer(conv, x)[:, 1] - conv.bias[1], 2 * (conv(x)[:, 1] - conv.bias[1])
    )


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4, bias=False), (3, 6)),
        (nn.Conv2d(6, 6, 3, groups=6, bias=False), (2, 6, 6, 6)),
        (nn.LayerNorm(6, bias=False), (3, 6)),
        (nn.BatchNorm2d(6).eval(), (2, 6, 6, 6)),
        (nn.GroupNorm(2, 6), (2, 6, 6, 6)),
    ],
)
def test_a_shift_merges_into_a_bias_and_makes_one_where_there_is_none(layer, shape):
    model = nn.Sequential(copy.deepcopy(layer)).double()
    x = torch.rand(shape, generator=seeded(), dtype=torch.double)
    before = model(x)
    adapted = adapt(model, IA3(shift=True), "0")
    with torch.no_grad():
        for p in adapted.parameters():
            p.normal_(generator=seeded())
    after = model(x)
    along = [1, -1] if x.dim() == 2 else [1, -1, 1, 1]
    gamma, beta = (p.detach().view(along) for p in adapted.parameters())
    torch.testing.assert_close(after, gamma * before + beta, rtol=0, atol=1e-12)
    adapted.merge()
    assert isinstance(model[0].bias, nn.Parameter)
    assert model[0].bias.requires_grad
    torch.testing.assert_close(model(x), after, rtol=0, atol=1e-12)
    adapted.unmerge()
    assert torch.equal(model(x), after)
    adapted.unload()
    assert torch.equal(model(x), before)
    assert (model[0].bias is None) == (layer.bias is None)


def test_a_shift_of_a_norm_that_knows_no_bias_is_kept_and_not_merged():
    model = nn.Sequential(nn.RMSNorm(6))
    adapted = adapt(model, IA3(shift=True), "0")
    adapted.merge()
    adapted.unmerge()
    with torch.no_grad():
        adapted.adapters["0"].beta += 1
    with pytest.raises(TypeError, match="'0' has no bias to merge the shift into"):
        adapted.merge()
    assert adapted.state == "adapted"


class Tokens(nn.Module):
    """A block that shows what it was given."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(2)

    def forward(self, hidden_states, attention_mask=None):
        self.seen, self.mask = hidden_states, attention_mask
        return hidden_states


@pytest.mark.parametrize("kept", [False, True])
def test_tokens_stand_after_the_class_token_and_so_do_their_places_in_masks(kept):
    block = Tokens()
    site = site_of(block, "block", ("module",))
    layer = TokenLayer(site, 3, bound=0.5, after=1, kept=kept, generator=seeded())
    assert 0.1 < layer.tokens.abs().max() <= 0.5
    x = torch.arange(8.0).view(1, 4, 2)
    mask = torch.arange(16.0).view(1, 1, 4, 4) + 1
    y = layer(block, x, attention_mask=mask)
    assert torch.equal(block.seen[0], torch.cat([x[0, :1], layer.tokens, x[0, 1:]]))
    assert torch.equal(y, block.seen if kept else x)
    grown = block.mask[0, 0]
    assert grown.shape == (7, 7)
    assert not grown[1:4].any()
    assert not grown[:, 1:4].any()
    rest = [0, 4, 5, 6]
    assert torch.equal(grown[rest][:, rest], mask[0, 0])
    with pytest.raises(ValueError, match="after=9"):
        TokenLayer(site, 1, after=9)(block, x)
