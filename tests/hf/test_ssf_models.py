"""SSF on transformers' own networks: every place takes a pair, and all of them merge."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from toolkit import SSF, adapt
from toolkit.insert.ssf import places

DOUBLE = torch.float64


def hf(name: str, **more):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**more)
    return config


SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3,
}  # fmt: skip
PICTURE = {"image_size": 8, "patch_size": 4, "num_channels": 3}


@functools.cache
def foreign(name: str):
    """A small random network of transformers, an input, and its head."""
    import transformers as tf

    pixels = {"pixel_values": torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
    if name == "vit":
        return tf.ViTForImageClassification(hf("ViT", **SMALL, **PICTURE)), pixels, None
    if name == "bert":
        model = tf.BertForSequenceClassification(hf("Bert", **SMALL, vocab_size=30))
        return model, {"input_ids": torch.tensor([[1, 5, 7], [2, 3, 4]])}, None
    if name == "ast":
        config = hf("AST", **SMALL, num_mel_bins=16, max_length=24, patch_size=8,
                    frequency_stride=8, time_stride=8)  # fmt: skip
        return tf.ASTForAudioClassification(config), {"input_values": torch.rand(2, 24, 16)}, None
    if name == "clip":
        own = {k: v for k, v in SMALL.items() if "hidden" in k or "num_a" in k or "inter" in k}
        own = {k: v for k, v in own.items() if "dropout" not in k}
        config = hf("CLIP", text_config={**own, "vocab_size": 30, "eos_token_id": 2},
                    vision_config={**own, **PICTURE}, projection_dim=8)  # fmt: skip
        inputs = pixels | {"input_ids": torch.tensor([[1, 5, 2], [1, 3, 2]])}
        return tf.CLIPModel(config), inputs, ["visual_projection", "text_projection"]
    if name == "swin":
        config = hf("Swin", image_size=16, patch_size=2, embed_dim=8, depths=[1, 1],
                    num_heads=[2, 2], window_size=2, num_labels=3, drop_path_rate=0.0)  # fmt: skip
        pixels = {"pixel_values": torch.rand(2, 3, 16, 16)}
        return tf.SwinForImageClassification(config), pixels, None
    config = hf("ConvNext", hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, num_labels=3)
    return (
        tf.ConvNextForImageClassification(config),
        {"pixel_values": torch.rand(2, 3, 32, 32)},
        None,
    )


@pytest.mark.parametrize("name", ["vit", "bert", "ast", "clip", "swin", "convnext"])
def test_networks_of_transformers_take_pairs_and_merge(name):
    model, given, head = foreign(name)
    model = copy.deepcopy(model).to(DOUBLE).eval()
    given = {k: v.to(DOUBLE) if v.is_floating_point() else v for k, v in given.items()}
    plain = copy.deepcopy(model)
    out = "logits_per_image" if name == "clip" else "logits"
    sites = places(model, head=head)
    assert not any("classifier" in s or s in (head or []) for s in sites)
    adapted = adapt(model, SSF(), sites)
    same = model(**given)[out]
    torch.testing.assert_close(same, plain(**given)[out], rtol=0, atol=1e-12)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapted.parameters():
            p += 0.4 * torch.randn(p.shape, generator=draw, dtype=p.dtype)
    y = model(**given)[out]
    assert (y - same).abs().max() > 1e-3
    torch.testing.assert_close(adapted.merge()(**given)[out], y, rtol=0, atol=1e-10)
    if name == "vit":
        assert sum("layers.0." in s for s in sites) == 8
        assert len(sites) == 2 * 8 + 2
        assert (
            sum(s.site.rows * 2 for s in adapted.sites.values()) == 16 * (2 * 14 + 4) + 2 * 2 * 24
        )
