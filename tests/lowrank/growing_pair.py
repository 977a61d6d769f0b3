"""Run by test_growth.py, twice at once: ranks and tensors born in training agree between processes.

The contract on two processes ends with the first growth. This goes on from there, with
``DistributedDataParallel``, which knows nothing of tensors that are born later.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from tests.contracts import two_processes
from tests.contracts.rooms import Case, small
from tests.pairs import join
from toolkit import IncreLoRA, TriAdaptLoRA


def main(folder: str) -> None:
    rank = join(folder)
    two_processes.STEPS = 10
    plain = small(IncreLoRA)
    methods = {
        "increlora": plain,
        "increlora, no advance": type(plain)(**IncreLoRA.tiny | {"advance": False}),
        "triadaptlora": small(TriAdaptLoRA),
    }
    verdicts = {
        f"{name} {room}": two_processes.verdict(Case(method, room), rank)
        for name, method in methods.items()
        for room in ("linear", "embedding", "attention")
    }
    if rank == 0:
        Path(folder, "verdicts.json").write_text(json.dumps(verdicts))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
