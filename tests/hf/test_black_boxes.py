"""Models of transformers behind a black box, prompted by BlackVIP."""

from __future__ import annotations

import math

import pytest
import torch

from toolkit import BlackVIP
from toolkit.core.seeds import generator
from toolkit.insert.blackvip import BlackBox, Coordinator


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_models_of_transformers_stand_behind_the_box(name):
    from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTForImageClassification

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16, "image_size": 28, "patch_size": 14}  # fmt: skip
    if name == "vit":
        vit = ViTForImageClassification(ViTConfig(**size, num_labels=5)).eval()
        box = BlackBox(lambda x: vit(pixel_values=x).logits, returns="logits")
    else:
        clip = CLIPVisionModel(CLIPVisionConfig(**size)).eval()
        box = BlackBox(lambda x: clip(pixel_values=x).pooler_output, returns="logits")
    made = Coordinator(10, 28, src_dim=98, widths=(4,))
    this = BlackVIP(directions=2).start(
        made, lambda x: x.flatten(1)[:, :10], mean=(0.5,) * 3, std=(0.5,) * 3,
        generator=generator(0, "hf"),
    )  # fmt: skip
    done = this.step(box, torch.rand(4, 3, 28, 28, generator=generator(0, "x")), torch.arange(4))
    assert (done.images, box.images) == (16, 16)
    assert math.isfinite(done.loss)
