"""Run by test_handles.py, twice at once: adapters put on first, then sharded by fully_shard."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import toolkit
from tests.pairs import join
from toolkit import AdaLoRA, LoRA, adapt


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))


def train(adapted, optimizer, rank: int | None) -> None:
    for step in range(4):
        optimizer.zero_grad()
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        share = x if rank is None else x[2 * rank : 2 * rank + 2]
        adapted(share).square().mean().backward()
        optimizer.step()


def refused(use) -> None:
    with pytest.raises(TypeError, match="sharded"):
        use()


def main(folder: str) -> None:
    warnings.simplefilter("ignore")
    rank = join(folder)
    mesh = init_device_mesh("cpu", (2,))
    adapted = adapt(make(), LoRA(rank=2), generator=torch.Generator().manual_seed(1))
    fully_shard(adapted.model, mesh=mesh)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.attach(optimizer)
    train(adapted, optimizer, rank)
    adapted.save(Path(folder) / f"{rank}.safetensors")

    alone = adapt(make(), LoRA(rank=2), generator=torch.Generator().manual_seed(1))
    train(alone, torch.optim.AdamW(alone.parameters(), lr=1e-2), None)
    loaded = toolkit.load(make(), Path(folder) / f"{rank}.safetensors")
    for (name, one), other in zip(loaded.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)

    scheduled = adapt(make(), AdaLoRA(rank=3, target_rank=1, warmup=0, final=1, interval=1))
    fully_shard(scheduled.model, mesh=mesh)
    optimizer = torch.optim.AdamW(scheduled.parameters(), lr=1e-2)
    refused(lambda: scheduled.attach(optimizer, total_steps=4))
    refused(scheduled.merge)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
