"""Run by test_two_processes.py, twice at once: every method under DistributedDataParallel."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.contracts.broken_methods import BROKEN
from tests.contracts.rooms import Case, cases
from tests.pairs import join

STEPS = 3


def train(case: Case, rank: int) -> dict[str, torch.Tensor]:
    """Each process takes every other batch; returns the trained tensors."""
    adapted = case.adapt(seed=5 + rank)  # DDP sends the first process's start to the other
    model = DistributedDataParallel(adapted.model)
    optimizer = case.optimizer(adapted)
    for step in range(STEPS):
        optimizer.zero_grad()
        case.loss(model, 2 * step + rank).backward()
        optimizer.step()
    return {n: p.detach() for n, p in adapted.named_parameters()}


def alone(case: Case) -> dict[str, torch.Tensor]:
    """The same training in one process, on both batches of each step."""
    adapted = case.adapt(seed=5)
    optimizer = case.optimizer(adapted)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(2):
            (case.loss(adapted.model, 2 * step + rank) / 2).backward()
        optimizer.step()
    return {n: p.detach() for n, p in adapted.named_parameters()}


def verdict(case: Case, rank: int) -> str:
    ours = train(case, rank)
    for name, value in ours.items():
        other = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(other, value.contiguous())
        if not torch.equal(*other):
            return f"{name} differs between the processes"
    for name, value in alone(case).items():
        if not torch.allclose(ours[name], value, rtol=1e-4, atol=1e-5):
            return f"{name} differs from training alone"
    return "same"


def main(folder: str) -> None:
    rank = join(folder)
    rooms = ("linear", "grouped_conv", "embedding", "attention", "twice")
    runs = {f"{c.method.info.slug} {c.room}": c for c in cases(shapes=1, rooms=rooms)}
    for broken in BROKEN["works_on_two_processes"]:
        runs[f"broken {type(broken).__name__}"] = Case(broken, "linear")
    verdicts = {name: verdict(case, rank) for name, case in runs.items()}
    if rank == 0:
        Path(folder, "verdicts.json").write_text(json.dumps(verdicts))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
