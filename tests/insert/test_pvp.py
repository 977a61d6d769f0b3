"""PVP: prompts as VPT keeps them, modules in files, both stages, and few-shot draws."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import toolkit
from toolkit import PVP, AdaLoRA, LoRA, adapt
from toolkit.core import nets
from toolkit.insert.pvp import (
    Modules,
    check_labels,
    downstream,
    few_shot,
    fresh_head,
    pretrain,
    start_from,
)

X = torch.rand(12, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 3
SMALL = PVP(tokens=3, patch=2, channels=1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vit(depth: int = 3) -> nn.Module:
    return nets.digits_transformer(width=16, depth=depth, heads=2, generator=seeded())


def with_class_token() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
            image_size=8, patch_size=2, num_channels=1, num_labels=3,
        )
    ).eval()  # fmt: skip


def scores(model: nn.Module, x: Tensor = X) -> Tensor:
    made = model(x[:, None]) if hasattr(model, "vit") else model(x)
    return getattr(made, "logits", made)


def trained(adapted, steps: int = 4, y: Tensor = Y) -> None:
    optimizer = torch.optim.Adam(adapted.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(scores(adapted.model), y).backward()
        optimizer.step()


def learned(model: nn.Module, method=SMALL, targets="blocks.*", classes: int = 3) -> Modules:
    return pretrain(model, method, targets, classes=classes, loop=trained, generator=seeded(3))


# ---------------------------------------------------------------- prompts


def by_hand(model: nn.Module, prompts: list[Tensor], x: Tensor, shallow: bool = False):
    """Deep or shallow prompts on transformers' ViT, written out: scores, and tokens by block."""
    vit, states = model.vit, []
    h = vit.embeddings(x[:, None])
    for i, block in enumerate(vit.layers):
        if not shallow or i == 0:
            p = prompts[i].expand(len(x), -1, -1)
            rest = h[:, 1:] if i == 0 or shallow else h[:, 1 + p.shape[1] :]
            h = torch.cat([h[:, :1], p, rest], 1)
        h = block(h)
        states.append(h)
    return model.classifier(vit.layernorm(h)[:, 0]), states


def test_deep_prompts_are_replaced_before_every_block():
    model, plain = with_class_token(), with_class_token()
    adapted = adapt(model, SMALL, generator=seeded(2))
    assert list(adapted.sites) == [f"vit.layers.{i}" for i in range(3)]
    prompts = [layer.tokens for layer in adapted.adapters.values()]
    expected, states = by_hand(plain, prompts, X)
    torch.testing.assert_close(scores(model), expected)
    assert all(state.shape[1] == 1 + 3 + 16 for state in states)


def test_shallow_prompts_enter_once_and_stay():
    model, plain = with_class_token(), with_class_token()
    adapted = adapt(model, PVP(tokens=3, form="shallow"), generator=seeded(2))
    assert list(adapted.sites) == ["vit.layers.0"]
    prompts = [adapted.adapters["vit.layers.0"].tokens]
    torch.testing.assert_close(scores(model), by_hand(plain, prompts, X, shallow=True)[0])
    assert model.vit(X[:, None]).last_hidden_state.shape[1] == 1 + 3 + 16


def test_deep_prompts_set_to_what_shallow_ones_become_give_the_same():
    one = X[:1]
    plain, deep = with_class_token(), with_class_token()
    start = torch.randn(1, 3, 16, generator=seeded(4))
    expected, states = by_hand(plain, [start], one, shallow=True)
    adapted = adapt(deep, SMALL)
    inputs = [start[0], *(state[0, 1:4] for state in states[:-1])]
    with torch.no_grad():
        for layer, value in zip(adapted.adapters.values(), inputs, strict=True):
            layer.tokens.copy_(value)
    torch.testing.assert_close(scores(deep, one), expected)


def test_order_of_the_prompts_does_not_matter():
    for model in (with_class_token(), vit()):
        adapted = adapt(model, SMALL, generator=seeded(2))
        before = scores(model)
        with torch.no_grad():
            for layer in adapted.adapters.values():
                layer.tokens.copy_(layer.tokens[[2, 0, 1]])
        torch.testing.assert_close(scores(model), before)
        with torch.no_grad():  # other prompts do
            layer.tokens.mul_(torch.linspace(-9, 9, 16))
        assert not torch.allclose(scores(model), before)


def test_a_prompt_is_read_by_its_own_block_only():
    model = vit()
    adapted = adapt(model, SMALL, "blocks.*", generator=seeded(2))
    seen: list[Tensor] = []
    hook = model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(X)
    hook.remove()
    assert seen[0].shape[1] == 16  # what the block before made of its prompts is gone
    seen[0].sum().backward()
    grads = [layer.tokens.grad for layer in adapted.adapters.values()]
    assert grads[0] is not None
    assert grads[0].any()
    assert grads[1] is None
    assert grads[2] is None


def test_counts_and_bounds():
    model = vit()
    adapted = adapt(model, SMALL, "blocks.*", train="head.*", generator=seeded())
    own = sum(layer.tokens.numel() for layer in adapted.adapters.values())
    assert own == 3 * 3 * 16 == sum(SMALL.count(p.site) for p in adapted.sites.values())
    assert sum(p.numel() for p in adapted.parameters()) == own + 16 * 10 + 10
    v = math.sqrt(6 / (1 * 2**2 + 16))
    assert SMALL.bound(16) == pytest.approx(v)
    assert PVP(patch=16).bound(768) == pytest.approx(math.sqrt(6 / (3 * 256 + 768)))
    wide = PVP(tokens=200, patch=2, channels=1)
    size = adapt(vit(), wide, "blocks.0", generator=seeded()).adapters["blocks.0"].tokens
    size = size.detach().abs()
    assert 0.99 * v < size.max() <= v
    assert size.mean().item() == pytest.approx(v / 2, rel=0.05)
    normal = PVP(tokens=200, start="normal", std=0.3)
    drawn = adapt(vit(), normal, "blocks.0", generator=seeded()).adapters["blocks.0"].tokens
    assert drawn.std().item() == pytest.approx(0.3, rel=0.05)


def test_prompts_on_clip_and_on_networks_without_tokens():
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 32}  # fmt: skip
    model = CLIPModel(
        CLIPConfig(
            vision_config=small | {"image_size": 8, "patch_size": 4},
            text_config=small | {"vocab_size": 20, "max_position_embeddings": 8},
            projection_dim=8,
        )
    ).eval()
    with pytest.raises(ValueError, match=r"blocks in 'text_model.*vision_model"):
        adapt(model, SMALL)
    pixels = torch.rand(2, 3, 8, 8, generator=seeded(1))
    before = model.get_image_features(pixels).pooler_output
    adapted = adapt(model, SMALL, "vision_model.encoder.layers.*", generator=seeded())
    assert len(adapted.sites) == 2
    assert not torch.allclose(model.get_image_features(pixels).pooler_output, before)
    adapted.unload()
    assert torch.equal(model.get_image_features(pixels).pooler_output, before)

    network = nets.convnet(1, (4, 8), 3, generator=seeded())
    state = copy.deepcopy(network.state_dict())
    for targets in ("blocks.*", None):
        with pytest.raises(TypeError, match=r"no tokens.*blocks\.0\.0 \(Conv2d\).*head \(Linear\)"):
            adapt(network, SMALL, targets)
    with pytest.raises(ValueError, match=r"'layers.*blocks\.0\.0 \(Conv2d\)"):
        adapt(network, SMALL, "layers.*")
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


def test_places_are_named_and_refused():
    model = vit()
    with pytest.raises(ValueError, match=r"blocks blocks\.0, blocks\.1, blocks\.2"):
        adapt(model, SMALL, "encoder.*")
    with pytest.raises(TypeError, match=r"'norm' is in no block"):
        adapt(model, SMALL, "norm")
    with pytest.raises(ValueError, match=r"enter once.*'blocks\.0'"):
        adapt(model, PVP(form="shallow"), "blocks.*")
    adapted = adapt(model, SMALL, "blocks.*")
    assert list(adapted.sites) == ["blocks.0", "blocks.1", "blocks.2"]  # and not what is inside
    with pytest.raises(TypeError, match="cannot be merged"):
        adapted.merge()


def test_prompts_come_back_from_a_file(tmp_path: Path):
    model = vit()
    adapted = adapt(model, SMALL, "blocks.*", train="head.*", generator=seeded(5))
    trained(adapted)
    adapted.save(tmp_path / "task.safetensors")
    other = vit()
    toolkit.load(other, tmp_path / "task.safetensors")
    assert torch.equal(other(X), model(X))


# ---------------------------------------------------------------- stages

KINDS = {
    "prompts": (SMALL, "blocks.*"),
    "shallow": (PVP(tokens=3, form="shallow"), "blocks.0"),
    "lora": (LoRA(rank=2), ["query", "value"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_both_stages(kind: str, tmp_path: Path):
    method, targets = KINDS[kind]
    model = vit()
    model.head.weight.requires_grad_(False)
    state, head, before = copy.deepcopy(model.state_dict()), model.head, model(X)
    found = learned(model, method, targets, classes=3)
    assert model.head is head
    assert not head.weight.requires_grad
    assert head.bias.requires_grad
    assert torch.equal(model(X), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    found.save(tmp_path / "modules.safetensors")

    adapted = downstream(
        model, method, targets, tmp_path / "modules.safetensors", classes=4, generator=seeded(9)
    )
    assert tuple(model.head.weight.shape) == (4, 16)
    assert model(X).shape == (12, 4)
    for place, layer in adapted.adapters.items():
        for key, value in layer.state_dict().items():
            assert torch.equal(value, found.tensors[place][key])
    random = downstream(vit(), method, targets, classes=4, generator=seeded(9))
    assert torch.equal(random.model.head.weight, model.head.weight)  # the same head for both
    assert not torch.equal(random.model(X), model(X))
    trained(adapted, y=torch.arange(12) % 4)
    now = dict(model.state_dict())
    assert all(torch.equal(now[k], v) for k, v in state.items() if not k.startswith("head"))


def test_pretrained_factors_change_the_base_and_merge():
    model, base = vit(), vit()(X)
    method, targets = KINDS["lora"]
    found = learned(model, method, targets)
    start = downstream(vit(), method, targets, classes=10, generator=seeded())
    start.model.head = nets.digits_transformer(16, 3, 2, generator=seeded()).head
    assert torch.equal(start.model(X), base)  # B = 0
    adapted = downstream(model, method, targets, found, classes=4, generator=seeded())
    assert all(found.tensors[place]["B"].any() for place in found.tensors)
    head, model.head = model.head, start.model.head
    assert not torch.allclose(model(X), base)
    model.head = head
    unmerged = model(X)
    torch.testing.assert_close(adapted.merge()(X), unmerged, atol=1e-5, rtol=1e-4)


def test_a_file_of_a_whole_task_starts_modules_without_its_head(tmp_path: Path):
    adapted = adapt(vit(), SMALL, "blocks.*", train="head.*", generator=seeded(5))
    trained(adapted)
    adapted.save(tmp_path / "task.safetensors")
    new = downstream(vit(), SMALL, "blocks.*", tmp_path / "task.safetensors", classes=2)
    for place, layer in new.adapters.items():
        assert torch.equal(layer.tokens, adapted.adapters[place].tokens)
    assert new.model.head.out_features == 2


def test_between_random_and_pretrained():
    found = learned(vit())
    starts = {}
    for t in (0.0, 0.25, 1.0):
        adapted = adapt(vit(), SMALL, "blocks.*", generator=seeded(7))
        random = Modules.of(adapted)
        start_from(adapted, found, t)
        starts[t] = Modules.of(adapted)
    for place, own in random.tensors.items():
        a, b = own["tokens"], found.tensors[place]["tokens"]
        assert torch.equal(starts[0.0].tensors[place]["tokens"], a)
        assert torch.equal(starts[1.0].tensors[place]["tokens"], b)
        torch.testing.assert_close(starts[0.25].tensors[place]["tokens"], 0.75 * a + 0.25 * b)
    for t in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share from 0 to 1"):
            start_from(adapted, found, t)


def test_modules_that_do_not_fit_are_refused_and_nothing_changes(tmp_path: Path):
    found, lora = learned(vit()), learned(vit(), *KINDS["lora"])
    other_width = nets.digits_transformer(width=8, depth=3, heads=2, generator=seeded())
    cases = [
        (vit(2), SMALL, "blocks.*", found, r"L = 3 places.*L = 2.*blocks\.2"),
        (vit(), SMALL, ["blocks.0", "blocks.1"], found, r"L = 3.*L = 2"),
        (vit(), PVP(tokens=4), "blocks.*", found, r"\(3, 16\) there.*\(4, 16\) here"),
        (other_width, SMALL, "blocks.*", found, r"\(3, 16\).*\(3, 8\)"),
        (vit(), LoRA(rank=3), ["query", "value"], lora, r"A \(2, 16\).*A \(3, 16\)"),
        (vit(), LoRA(rank=2, alpha=8), ["query", "value"], lora, r"alpha=16.*alpha=8"),
        (
            vit(),
            LoRA(rank=2),
            ["query", "key"],
            lora,
            r"not in the file: blocks\.0\.attention\.key",
        ),
        (vit(), PVP(tokens=3, after=0), "blocks.*", found, r"after=1.*after=0"),
        (vit(), toolkit.Prompts(tokens=3), "blocks.?", found, r"PVP at 'blocks\.0'.*Prompts"),
    ]
    for model, method, targets, source, words in cases:
        head, before = model.head, model(X)
        with pytest.raises(ValueError, match=words):
            downstream(model, method, targets, source, classes=4)
        assert model.head is head
        assert torch.equal(model(X), before)
        source.save(tmp_path / "m.safetensors")
        with pytest.raises(ValueError, match=words):
            downstream(model, method, targets, tmp_path / "m.safetensors", classes=4)
    # how the random start was drawn does not matter
    downstream(vit(), PVP(tokens=3, start="normal"), "blocks.*", found, classes=4)


def test_unknown_tensors_and_damaged_files_are_refused(tmp_path: Path):
    found, path = learned(vit()), tmp_path / "m.safetensors"
    adapted = adapt(vit(), SMALL, "blocks.*", generator=seeded(7))
    before = Modules.of(adapted)

    def refused(modules: Modules, words: str) -> None:
        modules.save(path)
        with pytest.raises(ValueError, match=words):
            start_from(adapted, path)
        after = Modules.of(adapted)
        assert all(torch.equal(v["tokens"], after.tensors[k]["tokens"])
                   for k, v in before.tensors.items())  # fmt: skip

    more = {k: dict(v) for k, v in found.tensors.items()}
    more["blocks.2"]["bias"] = torch.zeros(3)
    refused(Modules(more, found.methods), r"\['bias', 'tokens'\] at 'blocks\.2'")
    refused(Modules({**found.tensors, "blocks.7": {"tokens": torch.zeros(3, 16)}}, found.methods),
            r"'blocks\.7\.tokens' belongs to no place")  # fmt: skip
    odd = {k: {"tokens": v["tokens"] * float("nan")} for k, v in found.tensors.items()}
    refused(Modules(odd, found.methods), "not finite")
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no whole safetensors"):
        start_from(adapted, path)
    with pytest.raises(FileNotFoundError, match="no file of modules"):
        start_from(adapted, tmp_path / "none")


def test_a_start_comes_before_an_optimizer():
    method = AdaLoRA(rank=3, target_rank=1)
    found = Modules.of(adapt(vit(), method, "query", generator=seeded()))
    adapted = adapt(vit(), method, "query", generator=seeded(1))
    adapted.attach(torch.optim.Adam(adapted.parameters()), total_steps=10)
    with pytest.raises(RuntimeError, match="before attach"):
        start_from(adapted, found)
    adapted.unload()
    with pytest.raises(RuntimeError, match="unloaded"):
        start_from(adapted, found)


def test_a_loop_that_moves_the_backbone_is_told_and_the_model_comes_back():
    model = vit()
    head, before = model.head, model(X)

    def moves_a_norm(adapted) -> None:
        with torch.no_grad():
            model.norm.weight.add_(1)

    with pytest.raises(RuntimeError, match=r"moved 1 frozen.*norm\.weight"):
        learned_by(model, moves_a_norm)
    with torch.no_grad():
        model.norm.weight.sub_(1)

    def fails(adapted) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        learned_by(model, fails)
    assert model.head is head
    assert torch.equal(model(X), before)
    assert all(p.requires_grad for p in model.parameters())

    norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.raises(RuntimeError, match=r"running_mean.*eval\(\)"):
        pretrain(
            norm, LoRA(rank=1), "0", classes=3, head="2",
            loop=lambda adapted: adapted.model.train()(torch.rand(5, 4)),
        )  # fmt: skip


def learned_by(model: nn.Module, loop) -> Modules:
    return pretrain(model, SMALL, "blocks.*", classes=3, loop=loop)


# ---------------------------------------------------------------- heads and draws


def test_heads():
    model = vit()
    old = fresh_head(model, 4, generator=seeded(1))
    assert old.out_features == 10
    assert model.head.out_features == 4
    assert 0 < model.head.weight.abs().max() <= 1 / 4
    fresh_head(model, 3, zeros=True)
    assert not model.head.weight.any()
    assert not model.head.bias.any()
    held = with_class_token()
    fresh_head(held, 5, "classifier")
    assert scores(held).shape == (12, 5)
    for classes in (1, 2.0, True):
        with pytest.raises(ValueError, match="2 or more"):
            fresh_head(model, classes)
    with pytest.raises(ValueError, match=r"'classifier'.*head"):
        fresh_head(model, 3, "classifier")
    with pytest.raises(TypeError, match="linear"):
        fresh_head(model, 3, "norm")


def test_class_counts_must_agree():
    check_labels(torch.tensor([1, 0, 2, 1]), 3)
    for labels, classes in (([0, 1], 3), ([0, 1, 2, 3], 3), ([1, 2, 3], 3), ([5, 6], 2)):
        with pytest.raises(ValueError, match=rf"{len(labels)} classes.*{classes} outputs"):
            check_labels(torch.tensor(labels), classes)


def test_few_shots():
    labels = torch.randint(4, (200,), generator=seeded(2))
    for k in (1, 3, 8):
        rows = few_shot(labels, k, seeded(5))
        assert torch.equal(labels[rows].bincount(), torch.full((4,), k))
        assert len(set(rows.tolist())) == 4 * k
        assert torch.equal(rows, few_shot(labels, k, seeded(5)))
    assert not torch.equal(rows, few_shot(labels, 8, seeded(6)))
    fewer = few_shot(labels, 3, seeded(5)).view(4, 3)
    assert torch.equal(rows.view(4, 8)[:, :3], fewer)  # draws are nested
    least = int(labels.bincount().min())
    assert len(few_shot(labels, least)) == 4 * least
    with pytest.raises(ValueError, match=rf"class \d has {least} examples"):
        few_shot(labels, least + 1)
    for k in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="1 or more"):
            few_shot(labels, k)
    with pytest.raises(TypeError, match="whole numbers"):
        few_shot(labels.float(), 1)
    with pytest.raises(ValueError, match="shape"):
        few_shot(labels.view(2, 100), 1)
