"""The plain training loop that Trainer and Accelerate are compared with."""

from __future__ import annotations

import torch

from tests.hf.models import bert
from tests.small_methods import METHODS
from toolkit import adapt

STEPS, BATCH, RATE, CLIP = 8, 4, 0.01, 0.5


def rows(number: int = STEPS * BATCH) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(11)
    return [
        {
            "input_ids": torch.randint(40, (7,), generator=generator),
            "labels": torch.randint(3, (), generator=generator),
        }
        for _ in range(number)
    ]


def prepared(slug: str):
    """An adapted BERT with a head, and its optimizer with the schedule on it."""
    generator = torch.Generator().manual_seed(7)
    adapted = adapt(
        bert(), METHODS[slug], ["query", "value"], train="classifier", generator=generator
    )
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=RATE, weight_decay=0.01)
    adapted.attach(optimizer, total_steps=STEPS)
    return adapted, optimizer


def stacked(batch):
    return {key: torch.stack([row[key] for row in batch]) for key in batch[0]}


def plain(slug: str) -> dict[str, torch.Tensor]:
    """Clip, step, clear; the learning rate falls linearly to 0."""
    adapted, optimizer = prepared(slug)
    scheduler = linear(optimizer)
    data = rows()
    adapted.model.train()
    for step in range(STEPS):
        batch = stacked(data[step * BATCH : (step + 1) * BATCH])
        optimizer.zero_grad()
        adapted.model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(adapted.model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
    return {n: p.detach().clone() for n, p in adapted.named_parameters()}


def linear(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
