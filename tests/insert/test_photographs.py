"""Photographs with few labels: parts that are apart, shifts, nested draws, what each arm moves."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from toolkit import adapt
from toolkit.core.nets.anatomy import anatomy
from toolkit.insert.ssf import places
from toolkit.labs.insert.photographs import arms, world

RUN = functools.partial(arms.run, shift="hazy", scale="ci", part="test")


def test_what_is_kept_from_the_network_is_drawn_from_and_judged() -> None:
    parts = world.load("ci")
    kept = [{x.numpy().tobytes() for x in images} for images, _ in parts]
    for one, own in enumerate(kept):
        assert all(not own & other for other in kept[one + 1 :])
    assert (len(parts.few[1]), len(parts.validation[1])) == world.size("ci").held
    for images, labels in parts:
        assert images.shape == (len(labels), 3, world.SIDE, world.SIDE)
        assert images.min() >= 0
        assert images.max() <= 1


def test_shifts_keep_the_range_and_draw_a_haze_for_each() -> None:
    x = world.load("ci").test[0][:50]
    hazy = world.shifted(x, "hazy", 0, "test")
    depth = hazy - world.LEFT * x
    assert depth.std((1, 2, 3)).max() < 1e-6  # one grey for all of a photograph
    assert depth.mean((1, 2, 3)).std() > 0.1
    assert hazy.min() >= 0
    assert hazy.max() <= 1
    assert torch.equal(hazy, world.shifted(x, "hazy", 0, "test"))
    assert not torch.equal(hazy, world.shifted(x, "hazy", 0, "few"))
    turned = x
    for _ in range(3):
        turned = world.shifted(turned, "exchanged", 0, "test")
    assert torch.equal(turned, x)
    assert not torch.equal(world.shifted(x, "exchanged", 0, "test"), x)
    with pytest.raises(ValueError, match="shift: choose one of hazy, exchanged"):
        world.shifted(x, "foggy", 0, "test")


def test_a_seeds_few_photographs_are_among_its_many() -> None:
    few, many = (world.few(3, k, "hazy", "ci") for k in (1, 3))
    assert few[1].tolist() == list(range(10))
    rows = {x.numpy().tobytes() for x in many[0]}
    assert all(x.numpy().tobytes() in rows for x in few[0])
    assert not torch.equal(world.few(4, 1, "hazy", "ci")[0], few[0])
    with pytest.raises(ValueError, match="class"):
        world.few(3, 300, "hazy", "ci")


def test_methods_find_the_convolutions_and_the_blocks() -> None:
    model = world.network("ci")
    assert {"stem.0", "stem.3", "stem.6"} < set(places(model))
    assert [block.name for block in anatomy(model).blocks] == ["blocks.0"]
    adapted = adapt(model, arms.PROMPTS, "blocks.?")
    assert list(adapted.adapters) == ["blocks.0"]


@pytest.mark.parametrize("arm", ["nothing", *arms.INSIDE, *arms.OUTSIDE])
def test_arms_train_what_they_say_and_ask_only_from_outside(arm: str) -> None:
    before = {name: value.clone() for name, value in world.base("ci").state_dict().items()}
    found = RUN(arm, 1e-2, 1, 2)
    network, size = world.base("ci"), world.size("ci")
    pairs = 2 * (sum(size.channels) + size.width * (1 + 2 + 4 + 4 + 1 + 1))
    wanted = {
        "nothing": 0, "head": 10 * (size.width + 1), "ssf": pairs,
        "full": sum(p.numel() for p in network.parameters()), "map": 110,
        "prompts": 8 * size.width, "pvp": 8 * size.width,
    }  # fmt: skip
    if arm in wanted:
        assert found["trained"] == wanted[arm]
    queries = size.asked * 2 * arms.DIRECTIONS * arms.BATCH
    assert found["asked"] == {"map": 20, "blackvip": queries}.get(arm, 0)
    assert found == RUN(arm, 1e-2, 1, 2)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("arm", "rate"),
    [("head", 0.5), ("full", 0.5), ("ssf", 0.5), ("map", 0.5), ("blackvip", 500.0)],
)
def test_a_rate_of_almost_nothing_changes_nothing(arm: str, rate: float) -> None:
    still, nothing = RUN(arm, 1e-9, 1, 2), RUN("nothing", 1.0, 1, 2)
    assert still["loss"] == pytest.approx(nothing["loss"], rel=1e-4)
    assert abs(RUN(arm, rate, 1, 2)["loss"] - nothing["loss"]) > 1e-4


def test_prompts_start_anew_or_from_the_first_stage(monkeypatch: Any) -> None:
    begun = {}

    def kept(model: Any, *rest: Any, **more: Any) -> Any:
        adapted, parameters = dress(model, *rest, **more)
        begun["adapted"] = adapted
        return adapted, parameters

    dress = arms.dress
    monkeypatch.setattr(arms, "dress", kept)
    stage = arms.stage_one(0, "ci").tensors["blocks.0"]
    for arm, same in (("prompts", False), ("pvp", True)):
        RUN(arm, 1e-9, 1, 1)
        (tokens,) = begun["adapted"].adapters["blocks.0"].state_dict().values()
        (learned,) = stage.values()
        assert torch.allclose(tokens, learned, atol=1e-6) == same


def test_what_the_encoder_says_has_spread_one_and_no_correlation() -> None:
    z = arms.encode(world.load("ci").base[0], "ci")
    assert z.shape[1] == world.size("ci").components
    torch.testing.assert_close(z.T.cov(), torch.eye(z.shape[1]), atol=0.02, rtol=0)


def test_every_block_and_the_search_have_a_first_stage_of_their_own() -> None:
    assert [arms._stage(seed, "cpu") for seed in (0, 9, 500, 901)] == [0, 0, 1, 2]
