"""The methods that are compared, each with as many trained numbers as a budget has, and a run.

The network is the bed's small ViT: 64 features, 4 blocks, 16 tokens. The head trains beside every
method. What remains open in a method takes what its page found or its paper has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from toolkit.core.nets.anatomy import anatomy
from toolkit.insert.connected_peft_ir import Connected
from toolkit.insert.petl_ast import ASTAdapter
from toolkit.insert.petl_ast.prefix import ASTPrefix
from toolkit.insert.petl_ast.prompts import ASTPrompts
from toolkit.insert.ssf import SSF, places
from toolkit.labs.beds import images
from toolkit.labs.beds.arms import Arm
from toolkit.lowrank.lora import LoRA

SHIFT = "rotated"
STEPS = {"ci": 6, "cpu": 60}


@dataclass(frozen=True)
class Kind:
    """One method on one network.

    Attributes:
        method: width and number of blocks -> the toolkit's method.
        targets: a network -> where it acts.
        merges: whether it can be folded into the weights.
    """

    method: Callable[[int, int], Any]
    targets: Callable[[nn.Module], Any]
    merges: bool = False


def _blocks(model: nn.Module) -> list[str]:
    return [block.name for block in anatomy(model).blocks]


def _some(model: nn.Module) -> list[str]:
    """Norms and what leaves the attention: about a quarter of all places."""
    return [n for n in places(model) if "norm" in n or n.endswith("attention.output")]


def _adapter(order: Literal["parallel", "sequential"], width: int) -> Kind:
    def method(features: int, _: int) -> ASTAdapter:
        reduction = min(features, round(features / width))
        return ASTAdapter(inner="bottleneck", reduction=reduction, place="both", order=order)

    return Kind(method, _blocks)


def _prompts(tokens: int, deep: bool = True) -> Kind:
    """``tokens`` in each block, or as many numbers before the first."""

    def method(_: int, depth: int) -> ASTPrompts:
        count = tokens if deep else tokens * depth
        return ASTPrompts(tokens=count, deep=deep, kept=False, patch=7)

    return Kind(method, _blocks)


def _lora(rank: int, *parts: str) -> Kind:
    return Kind(
        lambda *_: LoRA(rank=rank, alpha=2.0 * rank),
        lambda m: anatomy(m).names(*parts),
        merges=True,
    )


KINDS: dict[str, dict[str, Kind]] = {
    "many": {
        "ssf": Kind(lambda *_: SSF(), places, merges=True),
        "serial": _adapter("sequential", 5),
        "parallel": _adapter("parallel", 5),
        "connected": Kind(lambda *_: Connected("layer", rank=4, inside_rank=3), _blocks),
        "deep": _prompts(23),
        "prefix": Kind(lambda *_: ASTPrefix(tokens=24, patch=7), _blocks),
        "lora": _lora(6, "query", "value"),
    },
    "few": {
        "ssf": Kind(lambda *_: SSF(), _some, merges=True),
        "serial": _adapter("sequential", 1),
        "parallel": _adapter("parallel", 1),
        "deep": _prompts(6),
        "shallow": _prompts(6, deep=False),
        "prefix": Kind(lambda *_: ASTPrefix(tokens=6, patch=7), _blocks),
        "lora": _lora(1, "query", "key", "value"),
    },
}
"""Budget -> arm -> what it is. At ``cpu`` about 5,900 and 1,540 numbers, the head's 650 aside."""


def dressed(budget: str, arm: str, model: Any) -> Arm:
    """The bed's arm: "nothing", "head" and "full" are its own, others those of a budget."""
    if budget == "none":
        return Arm({"full": "all"}.get(arm, arm))
    kind = KINDS[budget][arm]
    method = kind.method(model.head.in_features, len(model.blocks))
    return Arm("method", method, targets=kind.targets(model))


def run(budget: str, arm: str, rate: float, seed: int, scale: str, part: str) -> dict[str, Any]:
    """Train an arm on 1,000 turned images and judge it.

    Returns:
        ``loss`` (nats) and ``accuracy`` (%) on the part, and ``trained`` numbers.
    """
    torch.set_num_threads(1)
    made = dressed(budget, arm, images.network("vit", scale))
    _, _, record = images.train(
        made, rate, seed, shift=SHIFT, scale=scale, steps=STEPS["ci" if scale == "ci" else "cpu"],
        parts=(part,),
    )  # fmt: skip
    return {
        "loss": record[part], "accuracy": record[f"{part}_accuracy"], "trained": record["trained"]
    }  # fmt: skip
