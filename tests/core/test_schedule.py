"""What happens around optimizer steps, and going on after a break."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import toolkit
from toolkit import AdaLoRA, LoRA, adapt
from toolkit.core.adapt.steps import wrappers

METHOD = AdaLoRA(rank=4, target_rank=2, warmup=2, final=3, interval=2)
STEPS = 12


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))


def prepared(method=METHOD, make=torch.optim.AdamW):
    adapted = adapt(
        net(), method, ["0", "2"], train="3", generator=torch.Generator().manual_seed(1)
    )
    optimizer = make(adapted.parameters(), lr=0.02)
    return adapted, optimizer


def steps(adapted, optimizer, numbers) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        optimizer.zero_grad()
        adapted.model(torch.randn(9, 6, generator=generator)).square().mean().backward()
        optimizer.step()


def test_attaching_twice_is_refused_and_harmless():
    adapted, optimizer = prepared()
    adapted.attach(optimizer, total_steps=STEPS)
    with pytest.raises(RuntimeError, match="attach was called before"):
        adapted.attach(optimizer, total_steps=STEPS)
    steps(adapted, optimizer, range(3))
    assert adapted.controller.step == 3  # one controller, one count for each step


@pytest.mark.parametrize("method", [LoRA(rank=2), METHOD], ids=["lora", "adalora"])
def test_an_optimizer_without_the_adapters_is_refused(method):
    adapted, _ = prepared(method)
    part = adapted.parameters()[1:]
    with pytest.raises(ValueError, match=r"'0\.[AP]'.*\(1 trained.*adapted.parameters"):
        adapted.attach(torch.optim.SGD(part), total_steps=STEPS)
    with pytest.raises(TypeError, match="got list"):
        adapted.attach(part, total_steps=STEPS)
    assert adapted.controller is None


def test_a_method_without_a_schedule_takes_no_options():
    adapted, optimizer = prepared(LoRA(rank=2))
    with pytest.raises(TypeError, match="scorer"):
        adapted.attach(optimizer, scorer=len)
    assert adapted.attach(optimizer) is adapted
    steps(adapted, optimizer, range(2))


@pytest.mark.parametrize(
    ("total", "method", "words"),
    [
        (None, METHOD, "total_steps=T"),
        (5, METHOD, "warmup=2 and final=3 leave no step"),
        (STEPS, AdaLoRA(rank=2, total_rank=99), "total_rank=99 is above"),
    ],
)
def test_schedules_that_do_not_fit(total, method, words):
    adapted, optimizer = prepared(method)
    with pytest.raises(ValueError, match=words):
        adapted.attach(optimizer, total_steps=total)
    assert adapted.controller is None
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("finish", ["merge", "unload"])
def test_hooks_go_when_the_method_goes(finish):
    adapted, optimizer = prepared()
    adapted.attach(optimizer, total_steps=STEPS)
    steps(adapted, optimizer, range(2))
    getattr(adapted, finish)()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert adapted.controller is None


def test_wrapped_optimizers_are_unwrapped():
    adapted, optimizer = prepared()
    wrapper = type("Wrapper", (), {"optimizer": optimizer})()
    assert wrappers.unwrap(wrapper) is optimizer
    adapted.attach(wrapper, total_steps=STEPS)
    steps(adapted, optimizer, range(1))
    assert adapted.controller.step == 1


@pytest.mark.parametrize("stop", [1, 5, 8, 10])
def test_going_on_after_a_break_changes_no_bit(stop, tmp_path):
    """Saved with resume=True in the warm-up, the shrinking and the final phase."""
    adapted, optimizer = prepared()
    adapted.attach(optimizer, total_steps=STEPS)
    steps(adapted, optimizer, range(STEPS))

    first, optimizer = prepared()
    first.attach(optimizer, total_steps=STEPS)
    steps(first, optimizer, range(stop))
    first.save(tmp_path / "half.safetensors", resume=True)
    state = copy.deepcopy(optimizer.state_dict())

    second = toolkit.load(net(), tmp_path / "half.safetensors")
    optimizer = torch.optim.AdamW(second.parameters(), lr=0.02)
    optimizer.load_state_dict(state)
    second.attach(optimizer, total_steps=STEPS)
    assert second.controller.step == stop
    steps(second, optimizer, range(stop, STEPS))

    assert second.controller.ranks() == adapted.controller.ranks()
    assert second.controller.budget == adapted.controller.budget
    for (name, one), (_, other) in zip(
        adapted.named_parameters(), second.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    for key, value in adapted.controller.state().items():
        assert torch.equal(value, second.controller.state()[key]), key


def test_without_resume_the_schedule_starts_anew(tmp_path):
    adapted, optimizer = prepared()
    adapted.attach(optimizer, total_steps=STEPS)
    steps(adapted, optimizer, range(4))
    adapted.save(tmp_path / "a.safetensors")
    loaded = toolkit.load(net(), tmp_path / "a.safetensors")
    loaded.attach(torch.optim.AdamW(loaded.parameters()), total_steps=STEPS)
    assert loaded.controller.step == 0


def test_any_optimizer_drives_the_schedule():
    for make in (torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop):
        adapted, optimizer = prepared(make=make)
        adapted.attach(optimizer, total_steps=STEPS)
        steps(adapted, optimizer, range(STEPS))
        assert sum(adapted.controller.ranks().values()) <= 4
        assert adapted.controller.budget == 4
