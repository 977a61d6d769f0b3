"""Run a test script in two processes that find each other through a file (gloo)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_pair(script: Path, folder: Path, *arguments: str, seconds: int = 150) -> None:
    """Run ``script folder arguments`` twice, with RANK 0 and 1; raise if either fails."""
    world = {
        **os.environ,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
    }
    processes = []
    for rank in ("0", "1"):
        with open(folder / f"{script.stem}.{rank}.log", "w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(script), str(folder), *arguments],
                    env={**world, "RANK": rank, "LOCAL_RANK": rank},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [p.wait(seconds) for p in processes]
    finally:
        for p in processes:
            p.kill()
    logs = [(folder / f"{script.stem}.{rank}.log").read_text() for rank in ("0", "1")]
    if any(codes):
        raise AssertionError(f"exit codes {codes}\n" + "\n".join(log[-3000:] for log in logs))


def join(folder: str) -> int:
    """In the script: meet the other process; returns the rank."""
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    return rank
