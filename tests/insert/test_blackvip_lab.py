"""The lab of BlackVIP: its haze, its encoder, equal counts and queries, the probe."""

from __future__ import annotations

import pytest
import torch

from toolkit.labs.beds import images
from toolkit.labs.insert.hazy import arms, world


@pytest.fixture(autouse=True)
def easy_box(monkeypatch):
    """A box that needs no training: brightness of ten regions."""

    def answers(scale):
        return lambda x: (x.flatten(1)[:, :780].unflatten(1, (10, 78)).mean(2) * 9).softmax(1)

    monkeypatch.setattr(world, "answers", answers)


def test_haze_is_each_images_own_or_the_same():
    own, same = (world.haze(5, kind, 3, "few") for kind in world.KINDS)
    assert own.shape == (5, 1, 1)
    assert len(own.unique()) == 5
    assert same.shape == (1, 28, 28)
    assert torch.equal(same, world.haze(9, "same", 3, "test"))
    assert not torch.equal(same, world.haze(9, "same", 4, "test"))
    for depth in (own, same):
        hazy = world.hazed(torch.rand(5, 28, 28), depth)
        assert float(hazy.min()) >= 0
        assert float(hazy.max()) <= 1


def test_the_encoder_gives_features_of_spread_one_on_clean_digits():
    z = world.encode(images.load("ci").pool[0], "ci")
    assert z.shape[1] == 100
    torch.testing.assert_close(z.T.cov()[:20, :20], torch.eye(20), rtol=0, atol=0.05)
    assert torch.equal(
        arms.features(torch.rand(3, 1, 28, 28), "constant", "ci"), torch.zeros(3, 100)
    )


def test_arms_train_as_many_numbers_and_send_as_many_images():
    found = {
        arm: arms.learned(arm, 0.01, 3, "own", "validation", "ci")
        for arm in arms.ROUNDS if arm != "white"
    }  # fmt: skip
    assert {run["trained"] for run in found.values()} == {300}
    assert {tuple(run["queries"]) for run in found.values()} == {(0, 80, 160, 240)}
    assert len({run["start"] for run in found.values()}) == 1
    assert arms.method("gc", 0.5).a == pytest.approx(0.05)
    assert arms.method("spsa", 0.5).a == 0.5


def test_the_probe_learns_from_one_answer_an_image():
    weak, strong = (arms.probed(rate, 3, "own", "validation", "ci") for rate in (100.0, 1e-3))
    assert weak["queries"] == [40]
    assert strong["accuracy"] > weak["start"]
