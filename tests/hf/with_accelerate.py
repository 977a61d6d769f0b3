"""Run by test_training.py, twice at once: the plain loop under Accelerate."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from tests.hf.loops import BATCH, CLIP, METHODS, linear, prepared, rows, stacked
from tests.pairs import join


def main(folder: str) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "1"
    join(folder)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    for slug in METHODS:
        adapted, optimizer = prepared(slug)
        loader = torch.utils.data.DataLoader(rows(), BATCH // 2, collate_fn=stacked)
        model, optimizer, loader, scheduler = accelerator.prepare(
            adapted.model, optimizer, loader, linear(optimizer)
        )
        scheduler.split_batches = True  # one step of the schedule for each of the optimizer
        model.train()
        steps = 0
        for batch in loader:
            optimizer.zero_grad()
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            steps += 1
        ours = {n: p.detach().clone().contiguous() for n, p in adapted.named_parameters()}
        ours["steps"] = torch.tensor(steps)
        save_file(ours, Path(folder) / f"{slug}.{accelerator.process_index}.safetensors")
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
