"""PVP's lab: what the arms share, what they are judged on, and the base that fills in patches."""

from __future__ import annotations

import pytest
import torch

from tests.labs.test_beds_data import needs
from toolkit.labs.beds import bases, images, masked
from toolkit.labs.insert import pvp as lab
from toolkit.labs.insert.transfer import world
from toolkit.labs.insert.transfer.attention import mass


def test_arms_of_a_seed_share_images_head_and_random_start():
    x, y = world.shots(3, 2, "ci")
    again = world.shots(3, 2, "ci")
    assert torch.equal(x, again[0])
    assert y.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    model, random = world.prepared("random", 3, "ci")
    _, zero = world.prepared("pvp", 3, "ci", t=0.0)
    _, taught = world.prepared("pvp", 3, "ci")
    assert not model.head.weight.any()
    stage = world.stage_one("prompts", False, 0, "ci")[0]
    for place, layer in random.adapters.items():
        assert torch.equal(layer.tokens, zero.adapters[place].tokens)
        assert torch.equal(taught.adapters[place].tokens, stage.tensors[place]["tokens"])
        assert not torch.equal(layer.tokens, taught.adapters[place].tokens)


def test_source_and_target_share_no_digit():
    every = images.load("ci")
    for name in ("pool", "validation", "test"):
        y = getattr(every, name)[1]
        parts = [world.part(name, "ci", target) for target in (False, True)]
        assert [len(part[1]) for part in parts] == [int((y < 5).sum()), int((y >= 5).sum())]
        assert all(set(part[1].tolist()) == set(range(5)) for part in parts)


def test_blocks_are_judged_on_halves_of_the_test():
    halves = [world.judges(seed, "ci")[0] for seed in (0, 400)]
    whole = world.part("test", "ci", True)[0]
    assert len(halves[0]) + len(halves[1]) == len(whole)
    assert torch.equal(halves[0], whole[::2])
    assert torch.equal(halves[1], whole[1::2])
    search = world.judges(901, "ci")[0]
    assert torch.equal(search, world.part("validation", "ci", True)[0][:100])


def test_the_backbone_never_moves_and_a_head_alone_is_the_same_either_way():
    before = {k: v.clone() for k, v in masked.base("ci").state_dict().items()}
    one = world.learn("frozen", 2, 0.0, 0.05, 1, "ci")
    alone = world.learn_head("frozen", 2, 0.05, 1, "ci")
    assert one["loss"] == pytest.approx(alone["loss"], abs=1e-4)
    assert one["accuracy"] == alone["accuracy"]
    world.learn("pvp", 2, 0.01, 0.05, 1, "ci")
    world.seen(0, "ci")
    assert all(torch.equal(v, before[k]) for k, v in masked.base("ci").state_dict().items())


def test_attention_on_prompts_is_a_share():
    model, adapted = world.prepared("random", 0, "ci")
    found = mass(model, adapted, world.judges(0, "ci")[0][:9])
    assert len(found) == len(adapted.sites)
    assert all(0 < value < 100 for value in found)
    with torch.no_grad():  # without keys all tokens are alike
        for block in model.blocks:
            block.attention.key.weight.zero_()
            block.attention.key.bias.zero_()
    even = 100 * world.PROMPTS.tokens / (16 + world.PROMPTS.tokens)
    assert mass(model, adapted, world.judges(0, "ci")[0][:9]) == pytest.approx([even] * len(found))


def test_every_arm_is_measured_where_its_claims_look():
    assert lab.shots_of("pvp", "cpu") == (1, 2, 4, 8, 16)
    for arm in ("lora", "lora pvp", "disturbed"):
        assert lab.shots_of(arm, "cpu") == (1, 16)
    assert {k for used in lab.REGIMES.values() for k in used} == set(lab.SHOTS["cpu"])


def test_the_base_that_fills_in_patches():
    needs("mnist")
    entry = bases.entries()["images_vit_masked"]
    model = masked.network("cpu")
    assert not model.head.weight.any()
    assert not model.head.bias.any()
    filler = masked.Filler(model, bases.seeded())
    with torch.no_grad():  # its decoder is not kept; a fresh one is worse than what was reached
        assert filler(images.load().test[0][:50]).mean() > entry["reached"]
    x, y = world.part("pool", "cpu", False)
    read = world.features(model, x[:400])
    centres = torch.stack([read[y[:400] == c].mean(0) for c in range(5)])
    right = (torch.cdist(read, centres).argmin(1) == y[:400]).double().mean()
    assert right > 0.5, "its features tell digits apart better than chance"
