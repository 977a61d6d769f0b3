"""AdaptFormer, the cosine head, and the probes of features and inputs."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from toolkit.core.lanes import Lane, train
from toolkit.core.lanes import nets as lane_nets
from toolkit.core.nets import residual as stream
from toolkit.core.seeds import generator
from toolkit.diagnose.longtail_bias import adaptformer as adapt
from toolkit.diagnose.longtail_bias import probe

DOUBLE = torch.float64


def mlp():
    return stream.residual_mlp(6, 8, 3, 4, generator(0)).double()


def vision():
    return stream.stream_transformer(8, 3, 2, 4, 2, (4, 8), generator(0)).double()


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertModel(config, add_pooling_layer=False).double().eval()


SIZES = {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4, "num_channels": 1,
}  # fmt: skip


def clip():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES)).double().eval()


def vit():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES)
    return transformers.ViTModel(config, add_pooling_layer=False).double().eval()


class PreLN(torch.nn.Module):
    """A block of the form of OpenAI's CLIP, torchvision and timm, with the names asked for."""

    def __init__(self, norm, scale=None):
        super().__init__()
        self.norm, self.after = norm, scale
        self.attn = torch.nn.Linear(8, 8)
        self.add_module(norm, torch.nn.LayerNorm(8))
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8)
        )
        if scale:
            self.add_module(scale[0], scale[1])

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(getattr(self, self.norm)(x))


def inputs(make):
    draw = torch.Generator().manual_seed(1)
    if make is bert:
        return torch.randint(0, 30, (2, 5), generator=draw)
    if make in (clip, vit):
        return torch.randn(2, 1, 8, 8, generator=draw, dtype=DOUBLE)
    shape = (5, 6) if make is mlp else (5, 4, 8)
    return torch.randn(shape, generator=draw, dtype=DOUBLE)


def outputs(model, x):
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out.last_hidden_state


def stir(adapter, seed=0):
    """Give an adapter weights that do something."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=draw, dtype=torch.float64))


MODELS = [mlp, vision, bert, clip, vit]


@pytest.mark.parametrize("make", MODELS)
def test_the_network_starts_as_it_was_and_training_reaches_the_adapters_alone(make):
    model, x = make(), inputs(make)
    base = copy.deepcopy(model)
    adapters = adapt.add_adaptformer(model, 6, generator=generator(1))
    assert len(adapters) == 3
    assert torch.equal(outputs(model, x), outputs(base, x))
    trained = [p for a in adapters for p in a.parameters()]
    own = {id(p) for p in trained}
    assert own == {id(p) for p in model.parameters() if p.requires_grad}
    assert {p.dtype for p in trained} == {DOUBLE}
    assert sum(p.numel() for p in trained) == 3 * (2 * 8 * 6 + 3 * 8 + 6 + 1)
    for n, adapter in enumerate(adapters):
        stir(adapter, n)
    assert not torch.allclose(outputs(model, x), outputs(base, x))
    if make in (mlp, vision):
        model.head.requires_grad_(True)
    out = outputs(model, x)
    (out * torch.randn_like(out)).sum().backward()
    for name, p in model.named_parameters():
        reached = p.grad is not None and bool(p.grad.abs().max() > 0)
        assert reached == (id(p) in own or name.startswith("head.")), name


@pytest.mark.parametrize("make", MODELS)
def test_last_adapts_the_last_blocks(make):
    model, x = make(), inputs(make)
    base = copy.deepcopy(model)
    (adapter,) = adapt.add_adaptformer(model, 2, last=1, generator=generator(1))
    places = [n for n, m in model.named_modules() if isinstance(m, adapt.Beside)]
    assert len(places) == 1
    assert "2" in places[0].split(".")
    seen = []
    adapter.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    outputs(model, x)
    # the stream that enters the last MLP
    if make is mlp:
        stream = base.stem(x)
        for block in base.blocks[:2]:
            stream = block(stream)
    elif make is vision:
        before = []
        base.blocks[2].norm2.register_forward_pre_hook(lambda m, args: before.append(args[0]))
        base(x)
        (stream,) = before
    elif make in (clip, vit):
        before = []
        name = "encoder.layers.2.layer_norm2" if make is clip else "layers.2.layernorm_after"
        norm = next(m for n, m in base.named_modules() if n.endswith(name))
        norm.register_forward_pre_hook(lambda m, args: before.append(args[0]))
        base(x)
        (stream,) = before
    else:
        before = []
        layer = base.encoder.layer[2]
        layer.intermediate.register_forward_pre_hook(lambda m, args: before.append(args[0]))
        base(x)
        (stream,) = before
    torch.testing.assert_close(seen[0], stream, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("model", "config", "place"),
    [
        ("RobertaModel", "RobertaConfig", "encoder.layer.0.output"),
        ("GPT2Model", "GPT2Config", "h.0.mlp"),
        ("LlamaModel", "LlamaConfig", "layers.0.mlp"),
    ],
)
def test_blocks_are_known_by_their_form(model, config, place):
    transformers = pytest.importorskip("transformers")
    sizes = {k: v for k, v in SIZES.items() if k.endswith(("size", "layers", "heads"))}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, config)(vocab_size=30, **sizes, **tokens)
    torch.manual_seed(0)
    model = getattr(transformers, model)(config).double().eval()
    x = inputs(bert)
    before = outputs(model, x)
    adapters = adapt.add_adaptformer(model, 2)
    assert next(n for n, m in model.named_modules() if isinstance(m, adapt.Beside)) == place
    assert len(adapters) == 3
    torch.testing.assert_close(outputs(model, x), before, rtol=0, atol=0)
    stir(adapters[0])
    assert not torch.allclose(outputs(model, x), before)


def by_hand(adapter, x):
    a = {n: p.detach().numpy() for n, p in adapter.named_parameters()}
    x = x.detach().numpy()
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    normed = normed * a["norm.weight"] + a["norm.bias"]
    inside = np.maximum(normed @ a["down.weight"].T + a["down.bias"], 0)
    return a["scale"] * (inside @ a["up.weight"].T + a["up.bias"])


def test_the_adapter_is_its_formula_and_stands_beside_the_mlp():
    model, x = vision(), inputs(vision)
    (adapter,) = adapt.add_adaptformer(model, 3, last=1)
    stir(adapter)
    block = model.blocks[2].block
    tokens = torch.randn(2, 5, 8, dtype=DOUBLE)
    np.testing.assert_allclose(adapter(tokens).detach(), by_hand(adapter, tokens), atol=1e-12)
    middle = tokens + block.attention(block.norm1(tokens))
    wanted = middle + block.down(F.gelu(block.up(block.norm2(middle))))
    wanted = wanted.detach().numpy() + by_hand(adapter, middle)
    np.testing.assert_allclose(model.blocks[2](tokens).detach(), wanted, atol=1e-12)
    assert model(x).shape == (5, 4)

    model = mlp()
    (adapter,) = adapt.add_adaptformer(model, 3, last=1)
    stir(adapter)
    block, stream = model.blocks[2].block, torch.randn(4, 8, dtype=DOUBLE)
    wanted = stream + F.relu(block.linear(block.norm(stream)))
    wanted = wanted.detach().numpy() + by_hand(adapter, stream)
    np.testing.assert_allclose(model.blocks[2](stream).detach(), wanted, atol=1e-12)


def test_the_adapter_of_bert_acts_before_the_last_norm():
    model = bert()
    (adapter,) = adapt.add_adaptformer(model, 3, last=1)
    stir(adapter)
    output = model.encoder.layer[2].output
    hidden, stream = torch.randn(2, 5, 16, dtype=DOUBLE), torch.randn(2, 5, 8, dtype=DOUBLE)
    inner = output.block
    total = inner.dense(hidden) + stream + torch.as_tensor(by_hand(adapter, stream))
    torch.testing.assert_close(output(hidden, stream), inner.LayerNorm(total))


@pytest.mark.parametrize("norm", ["ln_2", "norm2"])
def test_the_adapter_of_a_pre_ln_block_adds_to_its_stream(norm):
    model = torch.nn.Sequential(PreLN(norm)).double()
    base, x = copy.deepcopy(model), torch.randn(2, 3, 8, dtype=DOUBLE)
    (adapter,) = adapt.add_adaptformer(model, 3)
    stir(adapter)
    stream = x + base[0].attn(x)
    wanted = base[0](x).detach().numpy() + by_hand(adapter, stream)
    np.testing.assert_allclose(model(x).detach().numpy(), wanted, atol=1e-12)
    assert model[0].mlp.stream is None  # no activation is kept
    # a copy listens to its own norm
    other = copy.deepcopy(model)
    model(torch.zeros_like(x))
    torch.testing.assert_close(other(x), torch.from_numpy(wanted))
    with pytest.raises(RuntimeError, match="without the LayerNorm"):
        model[0].mlp(x)


def test_an_adapted_clip_survives_checkpointing_and_saving():
    model, x = clip(), inputs(clip)
    for n, adapter in enumerate(adapt.add_adaptformer(model, 2)):
        stir(adapter, n)
    out = outputs(model, x)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    trained = [p for p in model.parameters() if p.requires_grad]
    plain = torch.autograd.grad((out * pull).sum(), trained)
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(
        torch.autograd.grad((outputs(model, x) * pull).sum(), trained), plain, strict=True
    ):
        torch.testing.assert_close(a, b)
    fresh = clip()
    adapt.add_adaptformer(fresh, 2, generator=generator(5))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(outputs(fresh, x), out)


def test_a_scale_kept_as_a_parameter_is_refused_too():
    model = torch.nn.Sequential(PreLN("norm2"))
    model[0].gamma_2 = torch.nn.Parameter(torch.ones(8))
    with pytest.raises(ValueError, match=r"PreLN\.gamma_2 would scale"):
        adapt.add_adaptformer(model, 2)
    model[0].gamma_2 = None
    assert len(adapt.add_adaptformer(model, 2)) == 1


@pytest.mark.parametrize("name", ["ls2", "ls_2", "layer_scale2"])
def test_a_block_that_scales_its_mlp_is_refused_and_left_alone(name):
    model = torch.nn.Sequential(PreLN("norm2", (name, torch.nn.Linear(8, 8))))
    with pytest.raises(ValueError, match=f"PreLN.{name} would scale"):
        adapt.add_adaptformer(model, 2)
    assert all(p.requires_grad for p in model.parameters())
    model = torch.nn.Sequential(PreLN("norm2", (name, torch.nn.Identity())))
    assert len(adapt.add_adaptformer(model, 2)) == 1


def test_weights_start_as_the_card_says_and_follow_the_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    adapter = adapt.AdaptFormer(600, 64, generator(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert float(adapter.down.weight.detach().std()) == pytest.approx(
        1 / math.sqrt(3 * 600), rel=0.02
    )
    assert adapter.scale.item() == 1
    for zero in (adapter.down.bias, adapter.up.weight, adapter.up.bias, adapter.norm.bias):
        assert not zero.any()
    assert bool((adapter.norm.weight == 1).all())
    same, other = (adapt.AdaptFormer(600, 64, generator(s)) for s in (0, 1))
    assert torch.equal(adapter.down.weight, same.down.weight)
    assert not torch.equal(adapter.down.weight, other.down.weight)
    trained = sum(p.numel() for p in adapter.parameters())
    assert trained == 2 * 600 * 64 + 3 * 600 + 64 + 1


def test_a_model_is_adapted_once():
    model = mlp()
    adapt.add_adaptformer(model, 2)
    with pytest.raises(ValueError):
        adapt.add_adaptformer(model, 2)
    assert model(inputs(mlp)).shape == (5, 4)


def test_adapters_train_in_lanes_and_the_backbone_stays():
    base = mlp()

    def make(draw):
        model = copy.deepcopy(base)
        adapt.add_adaptformer(model, 2, generator=draw)
        model.head.requires_grad_(True)
        return model

    draw = torch.Generator().manual_seed(2)
    x = torch.randn(40, 6, generator=draw, dtype=DOUBLE)
    y = torch.randint(0, 4, (40,), generator=draw)
    lanes = [Lane(seed=s, order=s, steps=12, batch=8, weight_decay=0.1) for s in (0, 1)]
    found = train(make, lanes, x, y)
    trained = {n for n, p in make(generator(0)).named_parameters() if p.requires_grad}
    start = lane_nets.initial(make, [0, 1])
    moved = {n for n, t in found.states.items() if not torch.equal(t, start[n])}
    assert moved == trained
    assert any("adapter" in n for n in moved)


# the cosine head


def test_the_cosine_head_is_its_formula_and_starts_on_the_sphere():
    head = adapt.CosineHead(6, 4, 16.0, generator(0)).double()
    h = torch.randn(3, 5, 6, dtype=DOUBLE)
    w = head.weight.detach().numpy()
    np.testing.assert_allclose(np.linalg.norm(w, axis=1), 1, atol=1e-6)
    cosine = h.numpy() @ w.T / np.linalg.norm(h, axis=-1)[..., None] / np.linalg.norm(w, axis=1)
    np.testing.assert_allclose(head(h).detach(), 16 * cosine, atol=1e-12)
    torch.testing.assert_close(head(7 * h), head(h))
    assert adapt.CosineHead(6, 4).scale == 25
    before = torch.get_rng_state()
    same, other = (adapt.CosineHead(6, 4, 16.0, generator(s)).double() for s in (0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(head.weight, same.weight)
    assert not torch.equal(head.weight, other.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_cosine_head_holds_in_half_precision(dtype):
    head = adapt.CosineHead(768, 5, generator=generator(0))
    x = 3000 * torch.randn(4, 768, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    x = x.to(dtype)
    wanted = head(x.float())
    found = head.to(dtype)(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, atol=0.1, rtol=0.02)
    assert (found[0] == 0).all()


def test_the_cosine_head_starts_from_class_means():
    features = torch.tensor([[1.0, 0], [3, 0], [0, 2], [0, 8], [1, 1]])
    means = adapt.class_means(features, torch.tensor([0, 0, 1, 1, 2]), 3)
    s = math.sqrt(0.5)
    torch.testing.assert_close(means, torch.tensor([[1.0, 0], [0, 1], [s, s]]))
    head = adapt.CosineHead(2, 3)
    assert head.set(5 * means) is head
    torch.testing.assert_close(head.weight.detach(), means)
    assert head.weight.requires_grad
    # the mean of the features, not of their directions
    pair = adapt.class_means(torch.tensor([[3.0, 0], [0, 1], [1, 0]]), torch.tensor([0, 0, 1]), 2)
    torch.testing.assert_close(pair[0], torch.tensor([3.0, 1]) / math.sqrt(10))


@pytest.mark.parametrize(
    ("classes", "blocks", "units"),
    [(1000, 12, 32), (100, 12, 4), (100, 2, 16), (8142, 12, 256), (365, 12, 8), (10, 12, 1),
     (96, 12, 4), (95, 12, 2), (1, 1, 1)],
)  # fmt: skip
def test_the_bottleneck_is_the_table_of_the_code(classes, blocks, units):
    assert adapt.bottleneck_for(classes, blocks) == units


# probes


def test_the_neighbour_probe_is_its_definition():
    rng = np.random.default_rng(0)
    features, bank = rng.normal(size=(9, 5)), rng.normal(size=(60, 5))
    labels = rng.integers(0, 4, 60)
    args = [torch.tensor(a) for a in (features, bank, labels)]
    for k, t in ((1, 0.1), (7, 0.1), (60, 0.5)):
        wanted = np.zeros((9, 4))
        for i, f in enumerate(features):
            cosine = bank @ f / np.linalg.norm(bank, axis=1) / np.linalg.norm(f)
            for j in np.argsort(-cosine)[:k]:
                wanted[i, labels[j]] += np.exp(cosine[j] / t)
        found = probe.knn_probe(*args, 4, k, t)
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
    scaled = probe.knn_probe(3 * args[0], args[1] / 9, args[2], 4, 7)
    torch.testing.assert_close(scaled, probe.knn_probe(*args, 4, 7))


def test_the_occlusion_map_shows_which_part_a_class_rests_on():
    # class 0 is seen in the left pixel, 1 in the right one, 2 in both, 3 has no examples
    x = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 1], [1, 1]])
    labels = torch.tensor([0, 0, 1, 2, 2])

    def predict(views):
        left, right = views.T
        return torch.stack([left - 2 * right, right - 2 * left, left + right - 1.5, 0 * left], 1)

    parts = {"left": torch.tensor([True, False]), "right": torch.tensor([False, True])}
    table = probe.occlusion_map(predict, x, labels, parts, 4)
    assert list(table.columns) == ["whole", "left", "right"]
    assert table.index.tolist() == [0, 1, 2, 3]
    assert table.whole.tolist()[:3] == [1, 1, 1]
    # an empty image is called 0 (the first of equal scores)
    assert table.left.tolist()[:3] == [1, 1, 0]
    assert table.right.tolist()[:3] == [1, 0, 0]
    assert table.loc[3].isna().all()
    bright = probe.occlusion_map(predict, x, labels, parts, 4, fill=1.0)
    assert bright.left.tolist()[:3] == [1, 0, 1]
    assert bright.right.tolist()[:3] == [0, 1, 1]
    assert x.tolist() == [[1, 0], [1, 0], [0, 1], [1, 1], [1, 1]]


ROWS = torch.randn(10, 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: adapt.AdaptFormer(0, 2), "width=0"),
        (lambda: adapt.AdaptFormer(4, 0), "bottleneck=0"),
        (lambda: adapt.add_adaptformer(torch.nn.Linear(2, 2), 2), "0 blocks"),
        (lambda: adapt.add_adaptformer(mlp(), 2, last=4), "last=4: the model has 3 blocks"),
        (lambda: adapt.add_adaptformer(mlp(), 2, last=0), "last=0"),
        (lambda: adapt.CosineHead(0, 3), "width=0"),
        (lambda: adapt.CosineHead(4, 1), "classes=1"),
        (lambda: adapt.CosineHead(4, 3, 0.0), "scale=0.0"),
        (lambda: adapt.CosineHead(4, 3).set(torch.ones(4, 3)), "rows has shape (4, 3)"),
        (lambda: adapt.CosineHead(2, 2).set(torch.tensor([[1.0, 0], [0, 0]])), "zero row"),
        (lambda: adapt.CosineHead(2, 2).set(torch.tensor([[1.0, 0], [0, math.nan]])), "direction"),
        (lambda: adapt.CosineHead(2, 2).set(torch.tensor([[1.0, 0], [0, math.inf]])), "direction"),
        (lambda: adapt.class_means(ROWS, torch.arange(10) % 2, 3), "no example of class 2"),
        (lambda: adapt.bottleneck_for(0, 2), "classes=0"),
        (lambda: adapt.bottleneck_for(5, 0), "blocks=0"),
        (lambda: probe.knn_probe(ROWS, ROWS[:, :3], torch.zeros(10).long(), 2, 3), "do not fit"),
        (lambda: probe.knn_probe(ROWS, ROWS, torch.zeros(9).long(), 2, 3), "do not fit"),
        (lambda: probe.knn_probe(ROWS, ROWS, torch.zeros(10).long(), 2, 11), "k=11"),
        (lambda: probe.knn_probe(ROWS, ROWS, torch.zeros(10).long(), 2, 0), "k=0"),
        (
            lambda: probe.occlusion_map(
                lambda x: x, ROWS, torch.zeros(10).long(), {"a": torch.ones(3).bool()}, 4
            ),
            "parts['a'] has shape (3,)",
        ),
        (
            lambda: probe.occlusion_map(
                lambda x: x, ROWS, torch.zeros(10).long(), {"whole": torch.ones(4).bool()}, 4
            ),
            '"whole" is the name',
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)


def test_a_refused_model_is_left_as_it_was():
    model = mlp()
    for options in ({"last": 9}, {"bottleneck": 0}):
        with pytest.raises(ValueError):
            adapt.add_adaptformer(model, **({"bottleneck": 2} | options))
        assert all(p.requires_grad for p in model.parameters())
        assert not any(isinstance(m, adapt.Beside) for m in model.modules())
