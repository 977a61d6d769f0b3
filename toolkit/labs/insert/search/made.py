"""Tuning the small encoder to search, queries and documents alike, and what is judged."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.core.adapt.put import adapt
from toolkit.core.seeds import generator
from toolkit.core.train import rates
from toolkit.core.train.fit import optimise, set_rate
from toolkit.insert.connected_peft_ir import Connected
from toolkit.insert.connected_peft_ir.direction import discrepancy
from toolkit.insert.connected_peft_ir.measures import measured
from toolkit.insert.connected_peft_ir.scoring import info_nce
from toolkit.labs.beds.arms import warm
from toolkit.labs.insert.search import world
from toolkit.lowrank.lora import LoRA

SHARP = 20.0
"""What cosines are multiplied by before the softmax."""
INSIDE, RANK = 4, 8
"""Hidden units of an adapter inside, and of an aside."""
EVERY = 5
"""Steps between two looks."""


def method(arm: str, inside: int = INSIDE, rank: int = RANK, lora: int = 0) -> Any:
    """What an arm puts on an encoder.

    Args:
        arm: "plain" (adapters of ``inside`` hidden units), "wide" (adapters that train as many
            numbers as "layer", up to a bias), "layer", "stream", "sublayer" (asides of half the
            rank, as there are twice as many), "aside" (no adapters, as many numbers) or "lora".
        inside, rank: hidden units of adapters and asides.
        lora: rank of LoRA.
    """
    if arm == "lora":
        return LoRA(rank=lora, alpha=2.0 * lora)
    if arm in ("plain", "wide"):
        return Connected(variant="none", rank=inside if arm == "plain" else inside + rank // 2)
    if arm == "aside":
        return Connected(variant="layer", rank=2 * inside + rank, inside="none")
    if arm == "sublayer":
        return Connected(variant="sublayer", rank=rank // 2, inside_rank=inside)
    variant: Any = arm
    return Connected(variant=variant, rank=rank, inside_rank=inside)


def encoder(scale: str, depth: int | None = None) -> world.Encoder:
    """A fresh copy of the base, or of its first blocks."""
    model = copy.deepcopy(world.base(scale))
    if depth is not None:
        model.blocks = nn.ModuleList(list(model.blocks)[:depth])
    return model


def dressed(
    arm: str, scale: str, seed: int, depth: int | None = None, inside: int = INSIDE,
    rank: int = RANK,
) -> tuple[world.Encoder, list[Tensor]]:  # fmt: skip
    """An encoder with an arm's modules, and what trains."""
    model = encoder(scale, depth)
    if arm == "full":
        return model, list(model.requires_grad_(True).parameters())
    if arm == "nothing":
        return model, []
    put = method(arm, inside, rank)
    adapted = adapt(model, put, generator=generator(seed, "modules"))
    return model, adapted.parameters()


def vectors(model: world.Encoder, seen: world.Pairs) -> tuple[Tensor, Tensor]:
    """Vectors of queries and of documents, both (n, width)."""
    both = model.vectors(torch.cat([seen.queries, seen.documents]))
    return both[: len(seen.queries)], both[len(seen.queries) :]


def step_loss(model: world.Encoder, seen: world.Pairs) -> Tensor:
    """The loss of a batch: in-batch negatives, without documents that answer as well."""
    queries, documents = vectors(model, seen)
    return info_nce(queries, documents, relevant=seen.relevant, temperature=1 / SHARP)


@torch.no_grad()
def judged(model: world.Encoder, held: world.Pairs, rank: bool = True) -> dict[str, float]:
    """Mean loss in nats of held-out queries against all their documents; if asked for, nDCG@10 and
    MRR@10 in per cent, of the documents that hold all that is asked."""
    queries, documents = vectors(model, held)
    loss = info_nce(queries, documents, relevant=held.relevant, temperature=1 / SHARP)
    found = measured(queries @ documents.T, held.relevant) if rank else {}
    return {"loss": loss.item()} | {
        name: 100 * found[name].mean().item() for name in ("ndcg", "mrr") if rank
    }


def tuned(
    arm: str, rate: float, seed: int, scale: str, part: str, depth: int | None = None,
    rank: int = RANK,
) -> dict[str, Any]:  # fmt: skip
    """Tune for search and judge.

    Args:
        arm: see :func:`method`, or "full", "nothing".
        rate: of Adam at its highest; warm-up over a twentieth, then half a cosine.
        seed: of modules, texts and what is held out.
        scale: "ci" or "cpu".
        part: "validation" judges 200 pairs at the end, "end" all held-out pairs; "test" these
            after half of the steps too, and keeps a curve on the validation pairs.
        depth: blocks of the base; left out, all.
        rank: of asides.

    Returns:
        ``loss``, ``trained``; with "test" ``ndcg``, ``mrr``, ``early`` (the loss after half) and
        ``curve``.
    """
    this = world.size(scale)
    model, parameters = dressed(arm, scale, seed, depth, rank=rank)
    record: dict[str, Any] = {"trained": sum(p.numel() for p in parameters)}
    near = world.pairs(min(200, this.held), generator(seed, "validation"))
    held = world.pairs(this.held, generator(seed, "held out"))
    curve = []
    if arm != "nothing":
        optimizer, draws = optimise(parameters, rate), generator(seed, "pairs")
        for step in range(this.steps):
            if part == "test" and step % EVERY == 0:
                curve.append(judged(model, near, rank=False)["loss"])
            if part == "test" and step == this.steps // 2:
                record["early"] = judged(model, held, rank=False)["loss"]
            set_rate(optimizer, rate * warm(step, this.steps) * rates.cosine(step, this.steps))
            optimizer.zero_grad()
            loss = step_loss(model, world.pairs(this.batch, draws))
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"loss {loss.item()} at step {step}")
            loss.backward()
            optimizer.step()
        if part == "test":
            record["curve"] = [*curve, judged(model, near, rank=False)["loss"]]
    return record | judged(model, near if part == "validation" else held, rank=part == "test")


def turned(
    arm: str, depth: int, seed: int, scale: str, rate: float, steps: int = 5
) -> dict[str, float]:
    """Direction discrepancy of one Adam step, after some steps of tuning, in double precision.

    The step is scaled so that the predicted change is a twentieth or a fifth of the vectors' size.
    """
    this, draws = world.size(scale), generator(seed, "pairs")
    model, parameters = dressed(arm, scale, seed, depth)
    model.double()
    optimizer = optimise(parameters, rate)
    for _ in range(steps):
        optimizer.zero_grad()
        step_loss(model, world.pairs(this.batch, draws)).backward()
        optimizer.step()
    seen = world.pairs(2 * this.batch, generator(seed, "held out"))
    before = [p.detach().clone() for p in parameters]
    optimizer.zero_grad()
    step_loss(model, world.pairs(this.batch, draws)).backward()
    optimizer.step()
    step = [p.detach() - old for p, old in zip(parameters, before, strict=True)]
    with torch.no_grad():
        for p, old in zip(parameters, before, strict=True):
            p.copy_(old)
    plain = [p.detach() for p in parameters]

    def outputs() -> Tensor:
        return torch.cat(vectors(model, seen))

    small, _ = discrepancy(outputs, plain, step, size=0.05)
    large, _ = discrepancy(outputs, plain, step, size=0.2)
    return {"small": small, "large": large}
