"""Hooks, taking off, wrapped optimizers, tables and files: what users do and no lab does."""

import contextlib

import pandas as pd
import torch
from torch import nn

from toolkit import AdaLoRA, DAREx, LoRA, adapt
from toolkit.core.states.deltas import SparseDelta
from toolkit.diagnose.longtail_bias.frames import places, table_of
from toolkit.merge.darex.stored import Pruned
from toolkit.merge.model_surgery.edit import Edit


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def trained(model: nn.Module, adapted, optimizer, steps: int = 3) -> None:
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        print(f"{float(loss.detach()):.12f}")


def hooked() -> None:
    """Hooks of a layer see what goes into the sum and what comes out of it."""
    model = network()
    model[0].register_forward_pre_hook(lambda _, given: (2 * given[0],))
    model[0].register_forward_hook(lambda _, given, y: y + given[0].sum())
    adapted = adapt(model, LoRA(rank=2), generator=torch.Generator().manual_seed(1))
    trained(model, adapted, torch.optim.SGD(adapted.parameters(), lr=0.1))
    x = torch.ones(2, 6, dtype=torch.float64)
    before = model(x)
    adapted.merge()
    merged = model(x)
    adapted.unmerge()
    print("merged", torch.allclose(before, merged), "unmerged", torch.equal(before, model(x)))
    adapted.unload()
    print("unloaded", f"{float(model(x).sum().detach()):.12f}")


class Passing:
    """A wrapper that does no more than the optimizer inside it."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.zero_grad, self.step = optimizer.zero_grad, optimizer.step


def wrapped() -> None:
    model = network()
    method = AdaLoRA(rank=2, target_rank=1, warmup=0, final=0)
    adapted = adapt(model, method, generator=torch.Generator().manual_seed(1))
    optimizer = Passing(torch.optim.AdamW(adapted.parameters(), lr=0.05))
    adapted.attach(optimizer, total_steps=3)
    trained(model, adapted, optimizer)


def tables() -> None:
    frame = table_of({"label": ["a", "b", "a"], "score": [0.1, 0.2, 0.3]}, ["label", "score"])
    print(frame.to_string(), places(frame["label"], ["b", "a"]).tolist())
    print(table_of(pd.DataFrame({"label": [1, 2]}), ["label"]).to_string())


def differences() -> None:
    old, new = {"w": torch.zeros(3, 4)}, {"w": torch.zeros(3, 4)}
    new["w"][1, 2] = 1.5
    SparseDelta.between(old, new).save("difference.safetensors")
    again = SparseDelta.load("difference.safetensors")
    print(again.applied(old)["w"].tolist())
    drawn = {"w": torch.linspace(-1, 1, 12).view(3, 4)}
    Pruned.between(old, drawn, DAREx(drop=0.5), seed=1).save("pruned.safetensors")
    print(Pruned.load("pruned.safetensors").applied(old)["w"].tolist())
    edit = Edit({"w": torch.tensor([0, 2])}, torch.eye(4)[0], 0.5, {})
    edit.save("edit.safetensors")
    print(len(Edit.load("edit.safetensors")))
    for kind in (SparseDelta, Pruned, Edit):
        with contextlib.suppress(FileNotFoundError):
            kind.load("nothing.safetensors")


torch.set_num_threads(1)
hooked()
wrapped()
tables()
differences()
