"""Where attention, feed-forward and norms stand: names, what they do, and what is not known."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from torch import nn

import toolkit
from toolkit import LoRA, adapt
from toolkit.core import nets
from toolkit.core.nets import Anatomy, anatomy, residual
from toolkit.core.nets.transformer import Block
from toolkit.labs.beds import networks, tiny_text

BERT = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1}
GPT2 = {
    "vocab_size": 30, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5 = {"vocab_size": 30, "d_model": 16, "d_kv": 4, "num_heads": 2, "num_layers": 2, "d_ff": 24}
BART = {
    "vocab_size": 30, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}  # fmt: skip


def hf(name: str, config: str, /, **sizes):
    """A tiny random model of transformers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()


def clip():
    image = {k: v for k, v in BERT.items() if "token" not in k and k != "vocab_size"} | IMAGE
    return hf("CLIPModel", "CLIPConfig", text_config=BERT, vision_config=image, projection_dim=8)


def encoder(**options):
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def characters():
    make = functools.partial(networks.Characters, 9, 16, 2, 2, 5)
    return networks.build(make, torch.Generator().manual_seed(0))


MODELS = {
    "digits": lambda: nets.digits_transformer(16, 2, 2),
    "stream": lambda: residual.stream_transformer(16, 2, 2, patch=4, size=(8, 8)),
    "characters": characters,
    "tiny": lambda: copy.deepcopy(tiny_text.encoder()[0]),
    "torch": encoder,
    "torch pre": lambda: encoder(norm_first=True),
    "torch both": lambda: nn.Transformer(16, 2, 1, 1, 24, batch_first=True).eval(),
    "bert": lambda: hf("BertModel", "BertConfig", **BERT),
    "bert decoder": lambda: hf(
        "BertModel", "BertConfig", **BERT, is_decoder=True, add_cross_attention=True
    ),
    "roberta": lambda: hf("RobertaModel", "RobertaConfig", **BERT),
    "distilbert": lambda: hf(
        "DistilBertModel", "DistilBertConfig",
        vocab_size=30, dim=16, n_layers=2, n_heads=2, hidden_dim=24,
    ),
    "albert": lambda: hf("AlbertModel", "AlbertConfig", **BERT, embedding_size=8),
    "gpt2": lambda: hf("GPT2LMHeadModel", "GPT2Config", **GPT2),
    "gpt": lambda: hf("OpenAIGPTModel", "OpenAIGPTConfig", **GPT2),
    "gpt2 cross": lambda: hf("GPT2Model", "GPT2Config", **GPT2, add_cross_attention=True),
    "llama": lambda: hf("LlamaForCausalLM", "LlamaConfig", **BERT, num_key_value_heads=1),
    "phi3": lambda: hf("Phi3Model", "Phi3Config", **BERT, num_key_value_heads=1),
    "gemma2": lambda: hf("Gemma2Model", "Gemma2Config", **BERT, num_key_value_heads=1, head_dim=8),
    "mixtral": lambda: hf(
        "MixtralModel", "MixtralConfig", **BERT, num_key_value_heads=1, num_local_experts=2
    ),
    "vit": lambda: hf(
        "ViTModel", "ViTConfig", hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, **IMAGE,
    ),
    "clip": clip,
    "siglip": lambda: hf(
        "SiglipVisionModel", "SiglipVisionConfig", hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=24, **IMAGE,
    ),
    "t5": lambda: hf("T5Model", "T5Config", **T5, feed_forward_proj="gated-gelu"),
    "bart": lambda: hf("BartModel", "BartConfig", **BART),
}  # fmt: skip


@functools.cache
def made(name: str) -> nn.Module:
    """A model that no test changes."""
    return MODELS[name]()


def fresh(name: str) -> nn.Module:
    """A copy of its own."""
    return copy.deepcopy(made(name))


def layers(query: str, key: str, value: str, output: str) -> dict[str, str]:
    return {"query": query, "key": key, "value": value, "output": output}


def fused(qkv: str, output: str) -> dict[str, str]:
    return {"qkv": qkv, "output": output}


def under(place: str, names: dict[str, str]) -> dict[str, str]:
    return {part: f"{place}.{name}" for part, name in names.items()}


QKV = ("q_proj", "k_proj", "v_proj")
OURS = (
    under("attention", layers("query", "key", "value", "output")), {},
    {"up": "up", "down": "down"}, ("norm1", "norm2"), True,
)  # fmt: skip
SELF = layers("self.query", "self.key", "self.value", "output.dense")
BERTS = (
    under("attention", SELF), {}, {"up": "intermediate.dense", "down": "output.dense"},
    ("attention.output.LayerNorm", "output.LayerNorm"), False,
)  # fmt: skip
TWO = {"up": "linear1", "down": "linear2"}
TORCH = (fused("self_attn", "self_attn.out_proj"), {}, TWO, ("norm1", "norm2"))
GATED = {"up": "mlp.up_proj", "gate": "mlp.gate_proj", "down": "mlp.down_proj"}
LLAMA = under("self_attn", layers(*QKV, "o_proj"))
RMS = ("input_layernorm", "post_attention_layernorm")
CLIP = (
    under("self_attn", layers(*QKV, "out_proj")), {}, {"up": "mlp.fc1", "down": "mlp.fc2"},
    ("layer_norm1", "layer_norm2"), True,
)  # fmt: skip
CONV1D = {"up": "mlp.c_fc", "down": "mlp.c_proj"}


def t5(number: int) -> dict[str, str]:
    names = {"up": "wi_1", "gate": "wi_0", "down": "wo"}
    return under(f"layer.{number}.DenseReluDense", names)


# block -> attention, cross-attention, feed-forward, norms, pre-norm; names inside the block
EXPECTED = {
    "digits": {"blocks.0": OURS, "blocks.1": OURS},
    "stream": {"blocks.0": OURS, "blocks.1": OURS},
    "characters": {"blocks.0": OURS, "blocks.1": OURS},
    "tiny": {f"encoder.layer.{n}": BERTS for n in range(6)},
    "torch": {"layers.0": (*TORCH, False), "layers.1": (*TORCH, False)},
    "torch pre": {"layers.0": (*TORCH, True), "layers.1": (*TORCH, True)},
    "torch both": {
        "encoder.layers.0": (*TORCH, False),
        "decoder.layers.0": (
            fused("self_attn", "self_attn.out_proj"),
            fused("multihead_attn", "multihead_attn.out_proj"),
            TWO, ("norm1", "norm2", "norm3"), False,
        ),
    },
    "bert": {"encoder.layer.0": BERTS, "encoder.layer.1": BERTS},
    "bert decoder": {
        f"encoder.layer.{n}": (
            BERTS[0], under("crossattention", SELF), BERTS[2],
            (BERTS[3][0], "crossattention.output.LayerNorm", BERTS[3][1]), False,
        )
        for n in range(2)
    },
    "roberta": {"encoder.layer.0": BERTS, "encoder.layer.1": BERTS},
    "distilbert": {
        f"transformer.layer.{n}": (
            under("attention", layers("q_lin", "k_lin", "v_lin", "out_lin")), {},
            {"up": "ffn.lin1", "down": "ffn.lin2"}, ("sa_layer_norm", "output_layer_norm"), False,
        )
        for n in range(2)
    },
    "albert": {
        "encoder.albert_layer_groups.0.albert_layers.0": (
            under("attention", layers("query", "key", "value", "dense")), {},
            {"up": "ffn", "down": "ffn_output"},
            ("attention.LayerNorm", "full_layer_layer_norm"), False,
        )
    },
    "gpt2": {
        f"transformer.h.{n}": (
            fused("attn.c_attn", "attn.c_proj"), {}, CONV1D, ("ln_1", "ln_2"), True,
        )
        for n in range(2)
    },
    "gpt": {
        f"h.{n}": (fused("attn.c_attn", "attn.c_proj"), {}, CONV1D, ("ln_1", "ln_2"), None)
        for n in range(2)
    },
    "gpt2 cross": {
        f"h.{n}": (
            fused("attn.c_attn", "attn.c_proj"),
            under("crossattention", {"query": "q_attn", "key_value": "c_attn", "output": "c_proj"}),
            CONV1D, ("ln_1", "ln_cross_attn", "ln_2"), True,
        )
        for n in range(2)
    },
    "llama": {f"model.layers.{n}": (LLAMA, {}, GATED, RMS, True) for n in range(2)},
    "phi3": {
        f"layers.{n}": (
            fused("self_attn.qkv_proj", "self_attn.o_proj"), {},
            {"gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj"}, RMS, True,
        )
        for n in range(2)
    },
    "gemma2": {
        f"layers.{n}": (
            LLAMA, {}, GATED,
            (*RMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"), None,
        )
        for n in range(2)
    },
    "mixtral": {f"layers.{n}": (LLAMA, {}, {}, RMS, None) for n in range(2)},
    "vit": {
        f"layers.{n}": (
            under("attention", layers(*QKV, "o_proj")), {}, CLIP[2],
            ("layernorm_before", "layernorm_after"), True,
        )
        for n in range(2)
    },
    "clip": {f"{t}_model.encoder.layers.{n}": CLIP for t in ("text", "vision") for n in range(2)},
    "siglip": {"encoder.layers.0": CLIP, "encoder.layers.1": CLIP},
    "t5": {
        f"{stack}.block.{n}": (
            under("layer.0.SelfAttention", layers("q", "k", "v", "o")),
            under("layer.1.EncDecAttention", layers("q", "k", "v", "o")) if cross else {},
            t5(1 + cross), tuple(f"layer.{i}.layer_norm" for i in range(2 + cross)), True,
        )
        for stack, cross in (("encoder", 0), ("decoder", 1))
        for n in range(2)
    },
    "bart": {
        "encoder.layers.0": (
            CLIP[0], {}, {"up": "fc1", "down": "fc2"},
            ("self_attn_layer_norm", "final_layer_norm"), None,
        ),
        "decoder.layers.0": (
            CLIP[0], under("encoder_attn", layers(*QKV, "out_proj")), {"up": "fc1", "down": "fc2"},
            ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"), None,
        ),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_part_has_its_name(name: str) -> None:
    model = made(name)
    found = anatomy(model).blocks
    assert [block.name for block in found] == list(EXPECTED[name])
    for block in found:
        attention, cross, feed, norms, pre = EXPECTED[name][block.name]
        assert block.attention == under(block.name, attention)
        assert block.cross_attention == under(block.name, cross)
        assert block.feed_forward == under(block.name, feed)
        assert block.norms == tuple(f"{block.name}.{norm}" for norm in norms)
        assert block.pre_norm is pre
        assert block.width == 16
        assert block.module is model.get_submodule(block.name)
        assert block.scales == ()


WORDS = torch.tensor([[3, 4, 5, 6], [7, 8, 3, 9]])
INPUTS = {
    "digits": lambda m: m(torch.randn(2, 8, 8)),
    "stream": lambda m: m(torch.randn(2, 8, 8)),
    "characters": lambda m: m(torch.tensor([[1, 2, 3, 4, 5]])),
    "torch": lambda m: m(torch.randn(2, 3, 16)),
    "torch pre": lambda m: m(torch.randn(2, 3, 16)),
    "vit": lambda m: m(torch.randn(2, 1, 8, 8)),
    "siglip": lambda m: m(torch.randn(2, 1, 8, 8)),
    "clip": lambda m: m(WORDS, torch.randn(2, 1, 8, 8)),
    "t5": lambda m: m(input_ids=WORDS, decoder_input_ids=WORDS),
    "gpt": lambda: hf("OpenAIGPTModel", "OpenAIGPTConfig", **GPT2),
    "gpt2 cross": lambda m: m(WORDS, encoder_hidden_states=torch.randn(2, 3, 16)),
}


@torch.no_grad()
def run(name: str, model: nn.Module) -> None:
    INPUTS.get(name, lambda m: m(WORDS))(model)


# those whose norms have a known place, and that run on words or on what INPUTS gives
KNOWN = [
    name
    for name, blocks in EXPECTED.items()
    if all(block[4] is not None for block in blocks.values())
    and name not in ("torch both", "bert decoder")
]


@pytest.mark.parametrize("name", KNOWN)
def test_without_what_they_add_blocks_are_the_identity_up_to_their_norms(name: str) -> None:
    """Zero output and down projections; what a block then does is what its norms do."""
    model = fresh(name)
    found = anatomy(model)
    crossed = ["cross_output"] if any(block.cross_attention for block in found.blocks) else []
    with torch.no_grad():
        for layer in found.names("output", "down", *crossed):
            for p in model.get_submodule(layer).parameters():
                p.zero_()
        for norm in found.names("norm"):  # otherwise one norm after another is the same as one
            for p in model.get_submodule(norm).parameters():
                p.uniform_(0.5, 2)
    checked = []

    def check(module, args, kwargs, output) -> None:
        block = next(b for b in found.blocks if b.module is module)
        stream = args[0] if args else kwargs["hidden_states"]
        for norm in () if block.pre_norm else block.norms:
            stream = model.get_submodule(norm)(stream)
        output = output if isinstance(output, torch.Tensor) else output[0]
        torch.testing.assert_close(output, stream)
        checked.append(block.name)

    for block in found.blocks:
        block.module.register_forward_hook(check, with_kwargs=True)
    run(name, model)
    assert set(checked) == {block.name for block in found.blocks}


@pytest.mark.parametrize("name", [n for n in KNOWN if not n.startswith("torch")])
def test_parts_run_in_the_order_in_which_they_are_listed(name: str) -> None:
    """Hooks on every part: a block's norms and layers follow one another as its form says."""
    model = fresh(name)
    found, seen = anatomy(model), []
    for layer in found.names("attention", "feed_forward", "norm"):
        module = model.get_submodule(layer)
        module.register_forward_hook(lambda *_, layer=layer: seen.append(layer))
    run(name, model)
    for block in found.blocks:
        order = {layer: seen.index(layer) for layer in block.norms}
        assert list(order.values()) == sorted(order.values())
        mixed = [*block.attention.values()]
        *entering, leaving = [seen.index(layer) for layer in mixed]
        assert max(entering) < leaving
        *into, back = [seen.index(layer) for layer in block.feed_forward.values()]
        assert leaving < min(into)
        assert max(into) < back
        first, last = order[block.norms[0]], order[block.norms[-1]]
        if block.pre_norm:
            assert first < min(entering)
            assert leaving < last < min(into)
        else:
            assert leaving < first < min(into)
            assert back < last


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        (
            "bert",
            [f"encoder.layer.{n}.attention.self.{p}" for n in (0, 1) for p in ("query", "value")],
        ),
        ("gpt2", ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]),
        ("llama", [f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qv"]),
        ("digits", [f"blocks.{n}.attention.{p}" for n in (0, 1) for p in ("query", "value")]),
        ("torch", ["layers.0.self_attn", "layers.1.self_attn"]),
    ],
)
def test_names_are_targets_of_adapt(name: str, sites: list[str]) -> None:
    model = fresh(name)
    names = anatomy(model).names("query", "value")
    assert names == sites
    adapted = adapt(model, LoRA(rank=1), targets=names)
    assert list(adapted.sites) == sites
    run(name, model)
    if name != "torch":  # an adapted linear layer is still found under its name
        assert anatomy(model).names("query", "value") == sites


def test_names_come_block_by_block_and_each_once() -> None:
    found = anatomy(made("phi3"))
    qkv, pair = "self_attn.qkv_proj", "mlp.gate_up_proj"
    assert found.names("key", "query") == [f"layers.{n}.{qkv}" for n in (0, 1)]
    assert found.names("gate", "up") == [f"layers.{n}.{pair}" for n in (0, 1)]
    one = anatomy(made("digits")).names("feed_forward", "up", "norm")
    assert one == [f"blocks.{n}.{p}" for n in (0, 1) for p in ("up", "down", "norm1", "norm2")]
    cross = anatomy(made("t5")).names("cross_value")
    assert cross == [f"decoder.block.{n}.layer.1.EncDecAttention.v" for n in (0, 1)]
    cross = anatomy(made("gpt2 cross")).names("cross_key", "cross_output")
    assert cross == [f"h.{n}.crossattention.{p}" for n in (0, 1) for p in ("c_attn", "c_proj")]


def test_one_stack_of_several() -> None:
    model = fresh("clip")
    found = anatomy(model).under("vision_model")
    assert [block.name for block in found.blocks] == [
        f"vision_model.encoder.layers.{n}" for n in (0, 1)
    ]
    adapted = adapt(model, LoRA(rank=1), targets=found.names("up"))
    assert list(adapted.sites) == [f"vision_model.encoder.layers.{n}.mlp.fc1" for n in (0, 1)]
    with pytest.raises(ValueError, match=r"'vision' holds no block.*vision_model\.encoder\.layers"):
        anatomy(model).under("vision")


# forms that no library above has


def test_wrapped_and_nested_blocks() -> None:
    block = lambda: Block(16, 2, 32)  # noqa: E731
    model = nn.Sequential(nn.Sequential(block(), nn.Dropout()), nn.Sequential(block()))
    assert [b.name for b in anatomy(model).blocks] == ["0.0", "1.0"]
    text = nets.TextClassifier(copy.deepcopy(tiny_text.encoder()[0]), 2)
    assert anatomy(text).blocks[0].name == "encoder.encoder.layer.0"
    assert [b.name for b in anatomy(block()).blocks] == [""]
    assert anatomy(block()).names("query") == ["attention.query"]


def test_a_shared_block_is_listed_once_and_a_shared_layer_by_its_first_name() -> None:
    block = Block(16, 2, 32)
    assert [b.name for b in anatomy(nn.ModuleList([block] * 3)).blocks] == ["0"]
    pair = nn.ModuleList([Block(16, 2, 32), Block(16, 2, 32)])
    pair[1].down = pair[0].down
    first, second = anatomy(pair).blocks
    assert first.feed_forward["down"] == second.feed_forward["down"] == "0.down"
    assert anatomy(pair).names("down") == ["0.down"]


class Parts(nn.Module):
    """Modules under names of their own."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def line(inside: int, outside: int) -> nn.Linear:
    return nn.Linear(inside, outside)


def test_parts_told_by_their_shapes() -> None:
    # ViT of lucidrains: norms inside the parts, an output in a Sequential, lists as blocks
    part = Parts(
        norm=nn.LayerNorm(8), to_qkv=line(8, 24), to_out=nn.Sequential(line(8, 8), nn.Dropout())
    )
    feed = Parts(net=nn.Sequential(nn.LayerNorm(8), line(8, 16), nn.GELU(), line(16, 8)))
    (block,) = anatomy(nn.ModuleList([nn.ModuleList([part, feed])])).blocks
    assert block.name == "0"
    assert block.attention == {"qkv": "0.0.to_qkv", "output": "0.0.to_out.0"}
    assert block.feed_forward == {"up": "0.1.net.1", "down": "0.1.net.3"}
    assert block.norms == ("0.0.norm", "0.1.net.0")
    # Llama's own names: w1 is the gate, w2 comes back, w3 goes up; a square layer in between
    heads = Parts(wq=line(8, 8), wk=line(8, 4), wv=line(8, 4), wo=line(8, 8))
    gated = Parts(w1=line(8, 12), w2=line(12, 8), w3=line(8, 12))
    (block,) = anatomy(nn.ModuleList([Parts(attention=heads, feed=gated)])).blocks
    assert block.feed_forward == {"up": "0.feed.w3", "gate": "0.feed.w1", "down": "0.feed.w2"}
    assert block.attention["key"] == "0.attention.wk"
    # a flat block whose layers are all square; a norm of another width is no norm of the stream
    names = ("q", "k", "v", "o", "up", "down")
    flat = Parts(**{name: line(8, 8) for name in names}, norm=nn.LayerNorm(8), odd=nn.LayerNorm(4))
    (block,) = anatomy(nn.ModuleList([flat])).blocks
    assert block.attention == {p: f"0.{p[0]}" for p in ("query", "key", "value", "output")}
    assert block.feed_forward == {"up": "0.up", "down": "0.down"}
    assert block.norms == ("0.norm",)


def test_a_head_three_times_as_wide_as_the_stream_is_no_attention() -> None:
    assert [b.name for b in anatomy(nets.digits_transformer(16, 2, 2, 48)).blocks] == [
        "blocks.0",
        "blocks.1",
    ]
    with pytest.raises(ValueError, match="Near: nothing"):
        anatomy(Parts(stem=line(8, 8), head=line(8, 24)))


def test_stacks_of_one_kind_of_part() -> None:
    heads = lambda: Parts(qkv=line(8, 24), proj=line(8, 8))  # noqa: E731
    only = nn.ModuleList([Parts(norm=nn.LayerNorm(8), attn=heads()) for _ in range(3)])
    blocks = anatomy(only).blocks
    assert [b.name for b in blocks] == ["0", "1", "2"]
    assert not blocks[0].feed_forward
    assert blocks[0].pre_norm is True
    # MLP-Mixer: two feed-forwards, of which one goes over places and not over the stream
    mixer = lambda: Parts(  # noqa: E731
        norm1=nn.LayerNorm(8), tokens=Parts(fc1=line(5, 6), fc2=line(6, 5)),
        norm2=nn.LayerNorm(8), channels=Parts(fc1=line(8, 16), fc2=line(16, 8)),
    )  # fmt: skip
    blocks = anatomy(nn.Sequential(mixer(), mixer())).blocks
    assert [b.name for b in blocks] == ["0", "1"]
    assert blocks[0].feed_forward == {"up": "0.channels.fc1", "down": "0.channels.fc2"}
    assert blocks[0].norms == ("0.norm1", "0.norm2")
    assert blocks[0].attention == {}
    # experts side by side are no one feed-forward
    expert = lambda: Parts(up=line(8, 16), down=line(16, 8))  # noqa: E731
    many = Parts(attn=heads(), experts=nn.ModuleList([expert(), expert()]))
    (block,) = anatomy(nn.ModuleList([many])).blocks
    assert (block.name, block.feed_forward) == ("0", {})


def test_layer_scales_are_seen() -> None:
    block = Block(8, 2, 16)
    block.ls1, block.ls2 = nn.Identity(), nn.Linear(8, 8)
    block.gamma_2 = nn.Parameter(torch.ones(8))
    assert anatomy(nn.ModuleList([block])).blocks[0].scales == ("0.ls2", "0.gamma_2")


# what is not recognised


def lone() -> nn.Module:
    return Parts(attention=nn.MultiheadAttention(8, 2), head=line(8, 2))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: nn.Linear(2, 2), "Linear holds no block that is recognised.*Near: nothing"),
        (lambda: nets.mlp((8, 24, 8, 8)), r"a stack \(the model\) of 5 \(Linear, ReLU\).*0, 2, 4"),
        (nets.convnet, r"a stack blocks of 3 \(Sequential\): no linear layer"),
        (
            lambda: residual.residual_mlp(4, 8, 2, 3),
            r"blocks of 2 \(ResidualBlock\): linear layers blocks.0.linear, blocks.1.linear",
        ),
        (lone, "an attention attention outside any block.*Anatomy.by_hand"),
    ],
)
def test_a_model_without_blocks_is_an_error_with_what_came_near(model, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        anatomy(model())


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((), "choose among query"),
        (("quary",), "choose among.*Nearest: query"),
        (("query", "gate"), "gate: no block has it; they have down, key"),
        (("cross_attention",), "cross_attention: no block has it"),
    ],
)
def test_names_of_no_part(parts: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        anatomy(made("digits")).names(*parts)


HAND = {**BERTS[0], **BERTS[2]}


def test_what_is_said_by_hand_is_what_is_found() -> None:
    model = made("bert")
    said = Anatomy.by_hand(model, "encoder.layer.*", norms=BERTS[3], pre_norm=False, **HAND)
    for one, other in zip(said.blocks, anatomy(model).blocks, strict=True):
        assert vars(one) == vars(other)
    some = Anatomy.by_hand(model, ["encoder.layer.1"], value="attention.self.value")
    assert some.names("value") == ["encoder.layer.1.attention.self.value"]
    both = Anatomy.by_hand(
        made("t5"), "decoder.block.*", cross_key="layer.1.EncDecAttention.k", width=16
    )
    assert both.names("cross_key") == anatomy(made("t5")).names("cross_key")
    mixed = Anatomy.by_hand(made("torch"), "layers.*", qkv="self_attn")
    assert mixed.blocks[0].width == 16


@pytest.mark.parametrize(
    ("blocks", "layers", "words"),
    [
        ("encoder.layers.*", HAND, r"nothing is named 'encoder.layers.\*'. Nearest: encoder.layer"),
        ("encoder.layer.*", {"quary": "x"}, "'quary' is no role.*Nearest: query"),
        ("encoder.layer.*", {}, "no layer is given"),
        ("encoder.layer.*", {"query": "attention.query"}, "Nearest: attention.self.query"),
        ("encoder.layer.*", {"query": "attention.self"}, "no weight.*encoder.layer.0.*self.query"),
        ("encoder.layer.*", {**HAND, "norms": ("output.dense",)}, "no norm of .* width 16"),
        ("encoder.layer.*", {"cross_key": "output.dense"}, "width: cannot be read"),
    ],
)  # fmt: skip
def test_what_is_wrong_by_hand_is_named(blocks: str, layers: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Anatomy.by_hand(made("bert"), blocks, **layers)


def test_no_library_is_imported_to_recognise_it() -> None:
    files = list((Path(toolkit.__file__).parent / "core/nets/anatomy").glob("*.py"))
    assert files
    for file in files:
        assert "import transformers" not in file.read_text(encoding="utf-8")


@pytest.mark.hub
def test_minilm() -> None:
    try:
        model, _ = nets.pretrained("minilm")
    except RuntimeError as error:
        pytest.skip(str(error))
    found = anatomy(model)
    assert [block.name for block in found.blocks] == [f"encoder.layer.{n}" for n in range(6)]
    assert {block.width for block in found.blocks} == {384}
    assert found.names("query")[-1] == "encoder.layer.5.attention.self.query"
    assert {block.pre_norm for block in found.blocks} == {False}
