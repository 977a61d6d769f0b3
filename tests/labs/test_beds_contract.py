"""What every bed promises: one job, plain numbers, the same again, arms that nest and learn."""

from __future__ import annotations

import math

import pytest
import torch

from toolkit import LoRA
from toolkit.labs.beds import arms, reference
from toolkit.labs.beds.arms import Arm

BEDS = (
    "characters", "images_vit_rotated", "images_cnn_rotated", "images_vit_new", "speech", "texts",
)  # fmt: skip
FAST = {"images_cnn_rotated": 5.0, "texts": 40.0}
"""Rates at ``ci`` as multiples of the first tried: its runs are too short for those."""


def run(name: str, arm: str | Arm, seed: int = 0, **more: object) -> dict:
    module, options = reference.bed(name)
    rate = FAST.get(name, 2.0) * reference.start(name).get(str(arm), 1e-2)
    if isinstance(arm, Arm):
        return module.train(arm, rate, seed, scale="ci", **options, **more)[2]
    return module.adapt(arm, rate, seed, scale="ci", **options, **more)


@pytest.mark.parametrize("name", BEDS)
def test_a_job_repeats_and_returns_plain_numbers(name: str) -> None:
    first = run(name, "lora", 3)
    torch.rand(7)  # nothing may come from the global generator
    assert run(name, "lora", 3) == first
    assert run(name, "lora", 4) != first
    assert {"validation", "test", "trained"} <= set(first)
    assert all(type(value) in (int, float) and math.isfinite(value) for value in first.values())


@pytest.mark.parametrize("name", BEDS)
def test_arms_nest(name: str) -> None:
    trained = [run(name, arm)["trained"] for arm in ("nothing", "head", "lora", "full")]
    assert trained[0] == 0
    assert trained == sorted(set(trained))
    assert run(name, "full_twice")["trained"] == trained[-1]


@pytest.mark.parametrize("name", BEDS)
def test_full_training_beats_doing_nothing_and_twice_the_steps_differ(name: str) -> None:
    none, full, twice = (run(name, arm)["test"] for arm in ("nothing", "full", "full_twice"))
    assert full < none
    assert twice < none
    assert twice != full


@pytest.mark.parametrize(
    "name", ["characters", "images_vit_rotated", "images_cnn_rotated", "images_vit_new", "speech"]
)
def test_doing_nothing_is_the_base(name: str) -> None:
    module, options = reference.bed(name)
    kept = {k: v for k, v in options.items() if k == "net"}
    model, handle, record = module.train("nothing", 1.0, 0, scale="ci", **options)
    base = module.network(scale="ci", **kept)
    assert handle is None
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), base.state_dict().values(), strict=True)
    )
    assert record == module.train("nothing", 5.0, 9, scale="ci", **options)[2] or name == "speech"


@pytest.mark.parametrize("name", BEDS)
def test_training_leaves_the_cached_base_alone(name: str) -> None:
    before = run(name, "nothing")
    run(name, "full")
    assert run(name, "nothing") == before


@pytest.mark.parametrize("name", BEDS)
def test_any_method_can_be_an_arm(name: str) -> None:
    module, options = reference.bed(name)
    arm = Arm("method", LoRA(rank=2, alpha=4.0))
    model, handle, record = module.train(arm, 1e-2, 0, scale="ci", **options)
    assert handle.model is model
    assert 0 < record["trained"] < run(name, "lora")["trained"]


@pytest.mark.parametrize("name", BEDS)
def test_the_head_alone_moves_nothing_but_the_head(name: str) -> None:
    module, options = reference.bed(name)
    kept = {k: v for k, v in options.items() if k == "net"}
    model = module.train("head", 1e-2, 0, scale="ci", **options)[0]
    base = module.network(scale="ci", **kept).state_dict()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, base[key])}
    assert moved == (set() if name == "texts" else {"head.weight", "head.bias"})


def test_only_the_parts_asked_for_are_judged() -> None:
    record = run("characters", "head", parts=("validation",))
    assert set(record) == {"validation", "trained"}


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"part": "some"}, "part"),
        ({"part": "method"}, "method"),
        ({"part": "all", "method": LoRA()}, "method"),
        ({"part": "all", "longer": 0.0}, "longer"),
    ],
)
def test_an_arm_that_makes_no_sense_is_refused(words: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Arm(**words)


@pytest.mark.parametrize("name", BEDS)
def test_bad_arguments_are_named(name: str) -> None:
    module, options = reference.bed(name)
    for words, match in (
        ({"arm": "lore"}, "arm"), ({"rate": 0.0}, "rate"), ({"rate": math.nan}, "rate"),
        ({"scale": "tpu"}, "scale"),
    ):  # fmt: skip
        good = {"arm": "full", "rate": 1e-3, "seed": 0, "scale": "ci"} | options
        with pytest.raises(ValueError, match=match):
            module.adapt(**good | words)


def test_warm_up_rises_to_one() -> None:
    shares = [arms.warm(step, 100) for step in range(100)]
    assert shares[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert arms.warm(0, 3) == 1.0
