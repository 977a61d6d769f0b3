"""Parts that do not overlap, speakers apart, windows that count each character once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from toolkit.core import data
from toolkit.core.data import sets
from toolkit.labs.beds import characters, images, new_classes, sounds, speech, texts


def needs(name: str) -> None:
    entry = sets._entries()[name]
    if not any(
        all((data.directory() / file.path).is_file() for file in form.files) for form in entry.forms
    ):
        pytest.skip(f"the data set {name} is not in the data directory")


def test_windows_predict_every_character_once() -> None:
    rows = characters.windows(torch.arange(50), 7, most=100)
    assert rows.shape == (7, 8)
    assert rows[:, 1:].flatten().tolist() == list(range(1, 50))
    assert characters.windows(torch.arange(50), 7, most=3).shape == (3, 8)


def test_batches_pair_a_character_with_the_next() -> None:
    draws = torch.Generator().manual_seed(0)
    for x, y in characters.batches(torch.arange(40), 5, 6, 9, draws):
        assert x.shape == y.shape == (6, 9)
        assert torch.equal(y, x + 1)


def test_uniform_scores_cost_the_logarithm_of_the_alphabet() -> None:
    class Flat(torch.nn.Module):
        def forward(self, text: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*text.shape, 80)

    rows = torch.randint(80, (13, 10), generator=torch.Generator().manual_seed(0))
    assert characters.nats(Flat(), rows, batch=5) == pytest.approx(np.log(80), rel=1e-6)


def test_nats_weigh_batches_by_their_size() -> None:
    model = characters.network("ci")
    rows = characters.load("ci").test[:7]
    assert characters.nats(model, rows, 3) == pytest.approx(characters.nats(model, rows), rel=1e-6)


def test_a_strange_character_is_named() -> None:
    with pytest.raises(ValueError, match="é"):
        characters.numbers("caf\N{LATIN SMALL LETTER E WITH ACUTE}")


def test_the_alphabet_is_that_of_both_texts() -> None:
    needs("tinyshakespeare")
    needs("cranfield")
    text = data.load("tinyshakespeare") + "".join(data.load("cranfield").documents.text)
    assert "".join(sorted(set(text))) == characters.ALPHABET


def test_held_out_abstracts_are_not_trained_on() -> None:
    needs("tinyshakespeare")
    needs("cranfield")
    found = characters.load("cpu")
    assert found.test[:, 1:].numel() == 100_352
    read = ["".join(characters.ALPHABET[i] for i in part) for part in
            (found.train.tolist(), found.validation[:, 1:].flatten().tolist(),
             found.test[:, 1:].flatten().tolist())]  # fmt: skip
    starts = range(2000, 40_000, 4000)
    assert not any(
        read[a][at : at + 120] in read[b] for a, b in ((2, 0), (2, 1), (1, 0)) for at in starts
    )


def test_images_come_in_parts_that_do_not_overlap() -> None:
    parts = images.load("ci")
    rows = [{tuple(x.flatten().tolist()) for x in part[0]} for part in parts]
    assert [len(part[1]) for part in parts] == [1337, 100, 360]
    every = sum(len(part[1]) for part in parts)
    doubles = every - len(set().union(*rows))  # scikit-learn's digits hold a few twice
    assert sum(len(a & b) for i, a in enumerate(rows) for b in rows[:i]) <= doubles


def test_mnist_is_whole_and_mixed() -> None:
    needs("mnist")
    parts = images.load("cpu")
    assert [len(part[1]) for part in parts] == [55_000, 5_000, 10_000]
    for _, labels in parts:
        assert torch.bincount(labels[:1000], minlength=10).min() > 60


def test_shifts_are_what_they_say() -> None:
    x = torch.rand(2, 28, 28, generator=torch.Generator().manual_seed(0))
    turned = images.shifted(x, "rotated")
    assert torch.equal(turned[0, 27 - 5, 3], x[0, 3, 5])
    assert torch.equal(images.shifted(x, "inverted"), 1 - x)
    with pytest.raises(ValueError, match="sheared"):
        images.shifted(x, "sheared")


def test_known_and_new_digits_are_apart_and_whole() -> None:
    whole, known, new = images.load("ci"), new_classes.load("ci", new=False), new_classes.load("ci")
    for every, left, right in zip(whole, known, new, strict=True):
        assert len(left[1]) + len(right[1]) == len(every[1])
        assert torch.equal(left[0], every[0][every[1] < 5])
        assert torch.equal(right[0], every[0][every[1] >= 5])
        assert set(left[1].tolist()) == set(right[1].tolist()) == set(range(5))


def test_a_seed_draws_as_many_examples_of_each_new_class(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def learn(model, arm, rate, seed, draw, loss, **more):
        seen.append(torch.cat([y for _, y in draw(5)]))  # 16 a step, 80 examples: each one once
        return None, 0

    monkeypatch.setattr(new_classes.arms, "learn", learn)
    for seed in (0, 1):
        new_classes.train("full", 1e-3, seed, scale="ci", parts=())
        assert seen[seed].bincount().tolist() == [16] * 5
    assert not torch.equal(*seen)


def test_the_head_for_new_digits_starts_at_zero() -> None:
    x, y = new_classes.load("ci").test
    scores = new_classes.network("ci")(x)
    assert scores.shape == (len(y), 5)
    assert not scores.any()
    assert any(p.any() for p in new_classes.base("ci").head.parameters()), "the base keeps its own"


def test_moved_images_keep_their_pixels() -> None:
    x = torch.zeros(40, 28, 28)
    x[:, 14, 14] = 1
    found = images.moved(x, 2, torch.Generator().manual_seed(0)).nonzero()
    assert len(found) == 40
    assert found[:, 1:].min() == 12
    assert found[:, 1:].max() == 16


@pytest.mark.parametrize("split", speech.SPLITS)
def test_speakers_of_a_split_are_not_in_its_base(split: int) -> None:
    every = speech.load("ci")
    rows = speech.rows(split, 5, "ci")
    who = {part: set(every.speaker[at].tolist()) for part, at in rows.items()}
    assert who["base"] | who["test"] == set(range(6))
    assert not who["base"] & who["test"]
    assert who["train"] == who["validation"] == who["test"] == set(speech.out(split))
    places = torch.cat(list(rows.values()))
    assert len(places.unique()) == len(places) == len(every.digit)


def test_seeds_draw_other_recordings_but_share_the_test() -> None:
    one, two = (speech.rows(0, seed, "ci") for seed in (1, 2))
    assert torch.equal(one["test"], two["test"])
    assert not torch.equal(one["train"], two["train"])
    for part in ("train", "validation"):
        counts = torch.bincount(speech.load("ci").digit[one[part]], minlength=10)
        assert counts.min() == counts.max()


def test_real_speech_has_600_test_recordings_a_split() -> None:
    needs("fsdd")
    for split in speech.SPLITS:
        rows = speech.rows(split, 0)
        assert {part: len(at) for part, at in rows.items()} == {
            "base": 2000, "train": 200, "validation": 200, "test": 600,
        }  # fmt: skip


def test_a_tone_lights_the_band_of_its_frequency() -> None:
    filters = sounds.mel_filters()
    assert filters.shape == (32, 129)
    time = np.arange(4000) / 8000
    for hertz in (300, 1000, 3000):
        sound = (9000 * np.sin(2 * np.pi * hertz * time)).astype(np.int16)
        made = sounds.frames([sound])
        assert made.shape == (1, 48, 32)
        lit = made[0, 24].argmax()
        assert lit == filters[:, round(hertz * 256 / 8000)].argmax()
        assert made.mean().abs() < 1e-5
        assert made.std() == pytest.approx(1, abs=1e-4)


def test_long_and_short_recordings_are_centred() -> None:
    loud = np.zeros(20_000, np.int16)
    loud[9_900:10_100] = 9000
    short = np.full(1200, 9000, np.int16)
    short[::2] = -9000
    made = sounds.frames([loud, short])
    assert 20 <= made[0].mean(1).argmax() <= 28
    alive = (made[1] > made[1].min() + 1e-3).any(1).nonzero()[:, 0]
    assert abs(float(alive.double().mean()) - 23.5) < 1


def test_variation_masks_frames_and_bands() -> None:
    batch = torch.ones(20, 48, 32)
    found = sounds.varied(batch, torch.Generator().manual_seed(0))
    dark = (found == 0).sum((1, 2))
    assert set(dark.tolist()) == {6 * 32 + 4 * 48 - 6 * 4}


def test_texts_are_judged_on_the_whole_test_set() -> None:
    task = texts.load("ci", 1)
    assert [len(part.labels) for part in task[2:4]] == [8, 12]
    assert 16 <= len(task.train.labels) <= 20
    assert texts.load("ci", 2).test is task.test
    assert texts.SIZES["cpu"]["test"] == 1821
