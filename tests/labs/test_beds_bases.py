"""The shipped bases: small, checked, refused by name when altered, as good as their entry says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.labs.test_beds_data import needs
from toolkit.core.data.manifest import ChecksumError
from toolkit.core.sample.loop import generate
from toolkit.core.sample.plans import UniPC
from toolkit.core.sample.schedule import Schedule
from toolkit.labs.beds import (
    arms,
    bases,
    characters,
    denoiser,
    images,
    new_classes,
    pretrain,
    speech,
)

NAMES = tuple(pretrain.MAKERS)


@pytest.mark.parametrize("name", NAMES)
def test_a_base_is_small_right_and_described(name: str) -> None:
    entry = bases.entries()[name]
    path = bases.folder() / f"{name}.safetensors"
    assert path.stat().st_size == entry["bytes"] < bases.LIMIT
    assert {"learned_from", "licence", "command", "quantity", "reached"} <= set(entry)
    found = bases.tensors(name)
    assert sum(t.numel() for t in found.values()) >= entry["numbers"]
    assert all(t.dtype == torch.float32 for t in found.values() if t.is_floating_point())


def test_every_file_has_an_entry() -> None:
    files = {path.stem for path in bases.folder().glob("*.safetensors")}
    assert files == set(bases.entries()) == set(NAMES)


def test_an_altered_base_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("characters.safetensors", "manifest.toml"):
        shutil.copy(bases.folder() / name, tmp_path)
    path = tmp_path / "characters.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChecksumError, match=r"'characters'.*sha256.*pretrain characters"):
        bases.tensors("characters", tmp_path)
    path.unlink()
    with pytest.raises(ChecksumError, match="missing"):
        bases.tensors("characters", tmp_path)
    with pytest.raises(ValueError, match="shakespeare"):
        bases.tensors("shakespeare", tmp_path)


def test_a_stored_base_comes_back_rounded(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    facts = {"quantity": 'a "quoted" thing', "reached": 1.5}
    bases.store("one", model, facts, tmp_path)
    bases.store("two", model, facts, tmp_path)
    assert bases.entries(tmp_path)["one"]["quantity"] == 'a "quoted" thing'
    assert sorted(bases.entries(tmp_path)) == ["one", "two"]
    back = bases.fill(
        torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)), "one", tmp_path
    )
    assert torch.equal(back[0].weight, model[0].weight.half().float())
    assert back[1].num_batches_tracked.dtype == torch.int64
    assert not list(tmp_path.glob("*.part"))


def test_too_large_a_base_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model"):
        bases.store("big", torch.nn.Linear(1100, 1000), {}, tmp_path)
    with pytest.raises(ValueError, match="facts"):
        bases.store("odd", torch.nn.Linear(1, 1), {"list": [1]}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_pretraining_repeats() -> None:
    first, second = (characters.pretrain("ci") for _ in range(2))
    assert first[1] == second[1]
    assert all(
        torch.equal(a, b)
        for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True)
    )
    with pytest.raises(ValueError, match="name"):
        pretrain.make("shakespeare")


def test_the_character_base_reaches_what_it_says() -> None:
    needs("tinyshakespeare")
    needs("cranfield")
    rows = characters.windows(characters.load().before_rest, 128, 96)
    reached = characters.nats(characters.network(), rows)
    assert reached == pytest.approx(bases.entries()["characters"]["reached"], abs=0.08)


@pytest.mark.parametrize("net", images.NETS)
def test_an_image_base_reaches_what_it_says(net: str) -> None:
    needs("mnist")
    x, y = images.load().test
    found = arms.judged(arms.scores(images.network(net), x[:1000]), y[:1000])
    assert found["accuracy"] == pytest.approx(bases.entries()[f"images_{net}"]["reached"], abs=2)


def test_the_base_of_known_digits_reaches_what_it_says() -> None:
    needs("mnist")
    x, y = new_classes.load(new=False).test
    assert set(y.tolist()) == set(range(new_classes.KNOWN))
    found = arms.judged(arms.scores(new_classes.base(), x[:1000]), y[:1000])
    said = bases.entries()["images_vit_known"]["reached"]
    assert found["accuracy"] == pytest.approx(said, abs=2)


@pytest.mark.parametrize("split", speech.SPLITS)
def test_a_speech_base_reaches_what_it_says(split: int) -> None:
    needs("fsdd")
    every, at = speech.load(), speech.rows(split, 0)["test"]
    found = arms.judged(arms.scores(speech.network(split), every.frames[at]), every.digit[at])
    assert found["accuracy"] == pytest.approx(
        bases.entries()[f"speech_{split}"]["reached"], abs=0.2
    )


DENOISERS = {"denoiser": "cpu", "denoiser_digits": "ci"}


def test_a_base_that_is_not_there_says_how_to_make_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "entries", lambda: {})
    denoiser._base.cache_clear()
    with pytest.raises(ChecksumError, match=r"pretrain denoiser_digits"):
        denoiser.network("ci")
    with pytest.raises(ChecksumError, match=r"pretrain denoiser`"):
        denoiser.network("cpu")


@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoiser_reaches_what_it_says(name: str) -> None:
    scale = DENOISERS[name]
    needs("mnist") if scale == "cpu" else None
    found = denoiser.judged(denoiser.network(scale), scale, 250)
    said = bases.entries()[name]["reached"]
    assert sum(found.values()) / 4 == pytest.approx(said, rel=0.1)


@pytest.mark.parametrize("name", DENOISERS)
def test_samples_of_a_denoiser_are_digits(name: str) -> None:
    """Nearer to images of their own class than to those of others."""
    scale = DENOISERS[name]
    needs("mnist") if scale == "cpu" else None
    side, labels = denoiser.size(scale).side, torch.arange(40) % 10
    made = generate(
        denoiser.network(scale), Schedule.edm(10), UniPC(3), (1, side, side), range(40),
        labels=labels,
    ).x  # fmt: skip
    x, y = (part[:10_000] for part in denoiser.load(scale).pool)
    nearest = torch.cdist(made.flatten(1), x.flatten(1)).argmin(1)
    assert float((y[nearest] == labels).double().mean()) >= 0.75
