"""An interrupt at any line of a step: nothing is left half way, and training goes on."""

from __future__ import annotations

import random
import sys
import warnings

import pytest
import torch
from torch import nn

import toolkit
from toolkit import AdaLoRA, IncreLoRA, LoRAGGPO, LoRAPro, TriAdaptLoRA, adapt
from toolkit.lowrank.lora_ggpo import LoRAMGPO

GROWING = IncreLoRA(target_rank=3, warmup=0, interval=2, top=1, restart_warmup=2)
METHODS = {
    "adalora": AdaLoRA(rank=3, target_rank=1),
    "increlora": GROWING,
    "increlora-late": IncreLoRA(target_rank=2, warmup=0, interval=2, top=1, advance=False),
    "triadaptlora": TriAdaptLoRA(target_rank=2, warmup=1),
    "lora_pro-full": LoRAPro(rank=2),
    "lora_pro": LoRAPro(rank=2, mode="efficient"),
    "lora_ggpo": LoRAGGPO(rank=2, sigma=0.1),
    "lora_mgpo": LoRAMGPO(rank=2),
}
STEPS, BUSY = 10, 4  # in step number 4 ranks are pruned, and grow


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Linear(4, 3))


def prepared(name: str):
    method = METHODS[name]
    generator = torch.Generator().manual_seed(1)
    adapted = adapt(net(), method, ["0", "2"], train="3", generator=generator)
    return adapted, attached(name, adapted)


def attached(name: str, adapted):
    make = torch.optim.SGD if name == "lora_pro-full" else torch.optim.AdamW
    optimizer = make(adapted.parameters(), lr=0.05)
    adapted.attach(optimizer, total_steps=STEPS)
    return optimizer


def backward(adapted, optimizer, number: int) -> None:
    optimizer.zero_grad()
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(number))
    adapted.model(x).square().mean().backward()


def run(adapted, optimizer, numbers) -> None:
    for number in numbers:
        backward(adapted, optimizer, number)
        optimizer.step()


class Interrupt:
    """Counts lines of the toolkit, or of everything, and raises at one of them; at 0 at none."""

    def __init__(self, at: int, ours: bool):
        self.at, self.ours, self.count = at, ours, 0

    def __call__(self, frame, event, _):
        if event == "line" and (not self.ours or "toolkit" in frame.f_code.co_filename):
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
        return self


def step(optimizer, at: int, ours: bool) -> int:
    """One step that is broken off at a line; how many lines were run."""
    tracer, before = Interrupt(at, ours), sys.gettrace()
    sys.settrace(tracer)
    try:
        optimizer.step()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
        torch.set_grad_enabled(True)  # torch's own no_grad may be broken off half way
    return tracer.count


def places(name: str, before: int, ours: bool, number: int) -> list[int]:
    """Some lines of a step, drawn from a seed."""
    adapted, optimizer = prepared(name)
    run(adapted, optimizer, range(before))
    backward(adapted, optimizer, before)
    lines = step(optimizer, 0, ours)
    return random.Random(f"{name} {before} {ours}").sample(range(1, lines + 1), number)


@pytest.mark.parametrize(("before", "ours"), [(BUSY, True), (BUSY, False), (0, False)])
@pytest.mark.parametrize("name", METHODS)
def test_an_interrupt_leaves_all_or_nothing(name, before, ours, tmp_path):
    file = tmp_path / "half.safetensors"
    for at in places(name, before, ours, 4 if ours else 1):
        adapted, optimizer = prepared(name)
        run(adapted, optimizer, range(before))
        backward(adapted, optimizer, before)
        step(optimizer, at, ours)

        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert {id(p) for p in adapted.parameters()} == held, at
        adapted.save(file, resume=True)
        loaded = toolkit.load(net(), file)
        run(loaded, attached(name, loaded), [before])

        run(adapted, optimizer, range(before, STEPS))
        assert all(p.isfinite().all() for p in adapted.parameters()), at
        if hasattr(adapted.controller, "ranks"):
            assert sum(adapted.controller.ranks().values()) == adapted.controller.target, at


def test_a_growth_that_is_broken_off_is_none():
    """At every line of the growth itself."""
    done = 0
    for at in range(1, 1000):
        adapted, optimizer = prepared("increlora")
        controller = adapted.controller
        groups = [len(g["params"]) for g in optimizer.param_groups]
        state = {k: v.clone() for k, v in adapted.model.state_dict().items()}
        tracer = Interrupt(at, ours=True)
        sys.settrace(tracer)
        try:
            controller.grow([1, 0])
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
            torch.set_grad_enabled(True)
        now = adapted.model.state_dict()
        if sum(controller.ranks().values()) == 2:
            assert groups == [len(g["params"]) for g in optimizer.param_groups], at
            assert list(now) == list(state), at
            torch.testing.assert_close(now, state, rtol=0, atol=0, equal_nan=True)
            assert len(controller.history) == 1, at
        else:
            done += 1
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            assert {id(p) for p in adapted.parameters()} == held
        if tracer.count < at:
            break
    assert at > 20, "the growth ran through"
    assert 1 <= done < 10


def test_attach_that_is_refused_leaves_the_optimizer_as_it_was():
    """The first method reserves groups before the second one refuses."""
    methods = {"0": GROWING, "2": AdaLoRA(rank=3, target_rank=1, warmup=99)}
    adapted = adapt(net(), methods)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.05)
    with pytest.raises(ValueError, match="warmup=99"):
        adapted.attach(optimizer, total_steps=STEPS)
    assert len(optimizer.param_groups) == 1
    assert adapted.controller is None
    assert not any(layer.listening for layer in [adapted.adapters["0"]])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adapted.model(torch.randn(2, 5)).sum().backward()
    assert any("nothing is attached" in str(w.message) for w in told)
