"""Scales: one name decides device, type and sizes."""

import pytest
import torch

from toolkit.core.scale import SCALES, scale


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv("TOOLKIT_SCALE", raising=False)


@pytest.mark.parametrize("name", ["ci", "cpu"])
def test_small_scales_stay_on_the_cpu(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen = scale(name)
    assert (chosen.name, chosen.device, chosen.dtype) == (name, torch.device("cpu"), torch.float32)
    assert chosen.threads >= 1


def test_gpu_takes_the_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert scale("gpu").device == torch.device("cuda")


def test_gpu_without_cuda_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        RuntimeError, match=r'needs a CUDA device and PyTorch sees none\. Choose "cpu"'
    ):
        scale("gpu")


def test_pick_takes_the_value_of_the_scale(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [scale(name).pick(ci=1, cpu=2, gpu=3) for name in SCALES] == [1, 2, 3]
    with pytest.raises(TypeError):
        scale("ci").pick(ci=1, cpu=2)


@pytest.mark.parametrize(("name", "near"), [("CPU", "cpu"), ("gup", "gpu"), ("cii", "ci")])
def test_a_misspelt_scale_suggests_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"SCALE: unknown scale '{name}'. Did you mean '{near}'"):
        scale(name)


def test_a_strange_scale_lists_the_choices():
    with pytest.raises(ValueError, match=r"'enormous'\. Choose one of ci, cpu, gpu\."):
        scale("enormous")


def test_the_environment_wins(monkeypatch):
    monkeypatch.setenv("TOOLKIT_SCALE", "ci")
    assert scale("gpu").name == "ci"
    monkeypatch.setenv("TOOLKIT_SCALE", "cj")
    with pytest.raises(ValueError, match="from the environment variable TOOLKIT_SCALE"):
        scale("cpu")


def test_choosing_a_scale_changes_no_global_setting():
    torch.manual_seed(5)
    before = (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed())
    scale("ci")
    assert (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed()) == before
