"""Which arms there are, how large each is, and what trains beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from toolkit.insert.petl_ast import ASTAdapter, beside
from toolkit.insert.petl_ast.prefix import ASTPrefix
from toolkit.insert.petl_ast.prompts import ASTPrompts
from toolkit.lowrank.lora import LoRA

TITLES = {
    "nothing": "do nothing",
    "linear": "head and final norm",
    "prompts": "deep prompts",
    "prefix": "prefix",
    "lora": "LoRA",
    "adapter": "bottleneck adapter",
    "at attention": "the same at the attention",
    "conformer": "Conformer adapter",
    "full": "full training",
}
FAMILIES = ("prompts", "prefix", "lora", "adapter", "conformer")
BUDGETS = ("small", "middle", "large")
SIZES = {
    "ci": {
        "prompts": (2, 4, 8), "prefix": (2, 4, 8), "lora": (1, 2, 3), "adapter": (8, 4, 2),
        "conformer": (16, 8, 4),
    },
    "cpu": {
        "prompts": (8, 20, 68), "prefix": (8, 20, 68), "lora": (2, 5, 17), "adapter": (32, 8, 2),
        "conformer": (64, 16, 4),
    },
}  # fmt: skip
"""Tokens, tokens, rank, reduction rate, reduction rate: about as many trained numbers in a column.
"""
ADAPTERS = ("adapter", "at attention", "conformer")
PLACES = {
    "parallel": {"order": "parallel", "residual": False},
    "parallel, residual": {"order": "parallel", "residual": True},
    "sequential": {"order": "sequential", "residual": False},
    "sequential, residual": {"order": "sequential", "residual": True},
}


@dataclass(frozen=True)
class Part:
    """A method, its layers, and whether the norm that feeds it trains."""

    method: Any
    targets: Any = None


def part(arm: str, scale: str, budget: str = "middle", **changes: Any) -> Part | None:
    """What an arm puts on the network; None where it puts nothing.

    Args:
        arm: a family, or a placement of :data:`PLACES`.
        scale: whose sizes are taken.
        budget: one of :data:`BUDGETS`.
        **changes: other settings of the method.
    """
    sizes = SIZES["ci" if scale == "ci" else "cpu"]
    if arm not in (*FAMILIES, *ADAPTERS, *PLACES):
        return None
    size = sizes[arm if arm in FAMILIES else "adapter"][BUDGETS.index(budget)]
    if arm == "lora":
        return Part(LoRA(rank=size, alpha=2.0 * size), ["*.query", "*.value"])
    if arm == "prefix":
        return Part(ASTPrefix(tokens=size, **changes))
    if arm == "prompts":
        return Part(ASTPrompts(tokens=size, **changes))
    changes |= {"inner": "conformer" if arm == "conformer" else "bottleneck"}
    changes |= {"place": "mhsa" if arm == "at attention" else "ffn"}
    return Part(
        ASTAdapter(reduction=size, **PLACES.get(arm, {}), **changes)  # type: ignore[arg-type]
    )


def trains_beside(network: nn.Module, arm: str, made: Part | None) -> tuple[str, ...]:
    """Names of the base's parameters that an arm trains: head and final norm, and for an adapter
    the norm that feeds it; all of them in full training."""
    if arm == "full":
        return tuple(name for name, _ in network.named_parameters())
    return tuple(beside(network, made.method if made is not None else None))
