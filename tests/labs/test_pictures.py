"""``python -m toolkit sample``: a picture by any solver; bad input named first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import image

from toolkit import __main__ as command
from toolkit.core.sample.plans import DDIM, PLANS, DPMpp2M, UniPC
from toolkit.labs.beds import denoiser
from toolkit.labs.pictures import grid, pictures, write_png


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> list:
    """In place of a base: its clean image is as bright as the label says."""
    asked = []

    def answer(x, level, labels):
        asked.append(labels)
        return (labels.view(-1, 1, 1, 1) / 5 - 1).expand(x.shape)

    monkeypatch.setattr(denoiser, "network", lambda scale: answer)
    return asked


def run(tmp_path: Path, *arguments: str) -> tuple[int, Path]:
    out = tmp_path / "made" / "grid.png"
    return command.main(["sample", "--base", "digits", "--out", str(out), *arguments]), out


@pytest.mark.parametrize("method", PLANS)
def test_a_picture_by_every_solver(method: str, network: list, tmp_path: Path, capsys) -> None:
    code, out = run(tmp_path, "--method", method, "--steps", "6", "--rows", "2")
    assert code == 0
    calls = 11 if method == "heun" else 6
    assert capsys.readouterr().out == f"{out}: 20 pictures, 6 steps, {calls} network calls\n"
    seen = np.asarray(image.imread(out))[..., 0] * 255
    assert seen.shape == (4 * (2 * 9 - 1), 4 * (10 * 9 - 1))
    # the middle of each image, label by label
    assert seen[16, 16::36].tolist() == pytest.approx([25.5 * n for n in range(10)], abs=0.51)
    assert len(network) == calls


def test_labels_guidance_and_seeds(network: list, tmp_path: Path) -> None:
    code, out = run(tmp_path, "--labels", "3", "10", "--rows", "1", "--guidance", "2")
    assert code == 0
    assert network[0].tolist() == [3, 10, 10, 10]
    first = out.read_bytes()
    assert run(tmp_path, "--labels", "3", "10", "--rows", "1")[1].read_bytes() != first


def test_pictures_of_a_seed_do_not_depend_on_the_others(monkeypatch) -> None:
    monkeypatch.setattr(denoiser, "network", lambda scale: lambda x, level, labels: x.tanh())
    one = pictures("digits", UniPC(), 5, labels=[4], rows=3, seed=7).x
    two = pictures("digits", UniPC(), 5, labels=[4], rows=1, seed=9).x
    torch.testing.assert_close(one[2], two[0], rtol=1e-5, atol=1e-5)
    assert (one[0] - one[1]).abs().max() > 0.1


@dataclass(frozen=True)
class Tried(DDIM):
    """A solver of the catalogue."""

    rate: float = 1.0


def test_a_method_of_the_catalogue_that_is_a_solver(monkeypatch, network: list, tmp_path) -> None:
    hyper = SimpleNamespace(name="rate", type=float, optional=False)
    found = SimpleNamespace(slug="tried", method=Tried, hyperparameters=[hyper])
    monkeypatch.setattr(command, "entry", lambda slug: {"tried": found}[slug])
    assert command.solver("tried", ["rate=0.5"]) == Tried(0.5)
    assert run(tmp_path, "--method", "tried", "--steps", "3")[0] == 0
    assert len(network) == 3


def test_ratios_of_dc_solver_are_searched_on_noises_of_their_own(
    monkeypatch, tmp_path: Path, capsys
) -> None:
    asked = []

    def answer(x, level, labels):
        asked.append(x.detach().clone())
        return (x / (1 + level.sigma)).tanh() * (labels.view(-1, 1, 1, 1) / 10 - 0.5)

    monkeypatch.setattr(denoiser, "network", lambda scale: answer)
    code, out = run(tmp_path, "--method", "dc_solver", "--steps", "4", "--rows", "1")
    assert code == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "ratios for 4 steps: searched on 10 noises of their own"
    assert told[2] == f"{out}: 10 pictures, 4 steps, 4 network calls"
    ratios = told[1].rpartition("=")[2]
    assert ratios.startswith("1.0,1.0,")
    assert ratios != "1.0,1.0,1.0,1.0"
    # the pictures start at other noises, and the same ratios give the same picture
    starts = [x for x in asked if float(x.std()) > 40]
    assert not any(torch.isclose(a, b).all() for a in starts[0] for b in starts[-1])
    first, count = out.read_bytes(), len(asked)
    again = ["--method", "dc_solver", "--set", f"ratios={ratios}", "--steps", "4", "--rows", "1"]
    assert run(tmp_path, *again)[1].read_bytes() == first
    assert len(asked) == count + 4
    assert capsys.readouterr().out.splitlines() == told[2:]


def test_settings_of_solvers() -> None:
    made = command.solver("unipc", ["order=3", "variant=bh1", "corrector=False"])
    assert made == UniPC(3, "bh1", corrector=False)
    assert command.solver("dpmpp_2m", ["lower_last=False"]) == DPMpp2M(lower_last=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "euler"], "--method euler: no such solver; choose ddim, heun, dpmpp_2m"),
        (["--method", "lora"], "is no solver"),
        (["--method", "dc_solver", "--steps", "1"], "fewer than the order 2"),
        (["--method", "dc_solver", "--set", "ratios=1,1,1.2"], "one for each of the 18 steps"),
        (["--set", "order=x"], "--set order=x: order must be int"),
        (["--set", "order=9"], "order: 1, 2 or 3"),
        (["--set", "corrector=1"], "corrector must be True or False"),
        (["--set", "rank=1"], "write NAME=VALUE with a NAME of"),
        (["--set", "uncorrected=1"], "write NAME=VALUE with a NAME of"),
        (["--steps", "0"], "steps: at least 1"),
        (["--steps", "1"], "fewer than the order 2"),
        (["--labels", "11"], "labels: digits 0 to 9, or 10 for any"),
        (["--rows", "0"], "rows"),
        (["--rows", "1000000000"], "GB are free"),
        (["--guidance", "nan"], "guidance: a finite weight"),
        (["--low", "0"], "low, high"),
        (["--base", "cifar"], "base: choose one of mnist, digits"),
        (["--out", "grid.jpg"], "a name that ends in .png"),
    ],
)
def test_bad_input_is_named(arguments: list[str], words: str, network, tmp_path, capsys) -> None:
    assert run(tmp_path, *arguments)[0] == 2
    assert words in capsys.readouterr().err
    assert not network
    assert not list(tmp_path.iterdir())


def test_answers_that_are_not_finite_are_an_error(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(denoiser, "network", lambda scale: lambda x, level, labels: x * torch.nan)
    assert run(tmp_path)[0] == 2
    assert "error: denoiser: its answer at level 0" in capsys.readouterr().err


def test_grids_have_gaps_and_clip() -> None:
    images = torch.tensor([-2.0, 0.0, 2.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    assert grid(images, 2)[:, ::3].tolist() == [[0, 128], [0, 128], [128] * 2] + [[255, 128]] * 2
    assert grid(images, 3, enlarge=2).shape == (4, 16)
    for columns, shown in ((0, images), (2, images[0]), (2, images.expand(3, 3, 2, 2))):
        with pytest.raises(ValueError, match="images"):
            grid(shown, columns)
    with pytest.raises(ValueError, match="out"):
        write_png(grid(images, 2), "x.gif")
