"""Models as flat vectors, and networks of one architecture scored side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from toolkit.merge.m2n2.population import Score

Model: TypeAlias = nn.Module | Mapping[str, Tensor]


def flatten(models: Sequence[Model]) -> Tensor:
    """Models of one architecture as vectors (P, D), copied.

    A vector holds the floating tensors of a state dict, end to end in its order.

    Args:
        models: networks, or their state dicts.

    Raises:
        ValueError: no model, or one whose tensors differ from the first one's in name or shape.
    """
    if not models:
        raise ValueError("models is empty: give two networks or more.")
    states = [_floating(model) for model in models]
    for i, state in enumerate(states):
        odd = sorted(state.keys() ^ states[0].keys())
        odd += [n for n in state.keys() & states[0].keys() if state[n].shape != states[0][n].shape]
        if odd:
            raise ValueError(
                f"models[{i}] and models[0] are not of one architecture: {odd[0]!r} is missing in "
                "one, or its shape differs. Merge networks that one call makes."
            )
    return torch.stack([torch.cat([s[n].flatten() for n in states[0]]) for s in states])


def unflatten(vector: Tensor, model: Model) -> dict[str, Tensor]:
    """A vector as the tensors of a model: views, for ``load_state_dict(..., strict=False)``.

    Args:
        vector: (D,), or (..., D): then every tensor has the same axes in front.
        model: what says names and shapes.

    Raises:
        ValueError: the vector is shorter or longer than the model.
    """
    like = _floating(model)
    sizes = [t.numel() for t in like.values()]
    if vector.shape[-1] != sum(sizes):
        raise ValueError(
            f"vector has {vector.shape[-1]} numbers and the model {sum(sizes)}: flatten models of "
            "this architecture."
        )
    parts = vector.split(sizes, -1)
    front = vector.shape[:-1]
    return {n: p.view(*front, *t.shape) for (n, t), p in zip(like.items(), parts, strict=True)}


def correctness(
    model: nn.Module, inputs: Tensor, labels: Tensor, chunk: int | None = None
) -> Score:
    """A score function: which of R networks is right on which example, all called at once.

    Args:
        model: the architecture; its own values do not matter.
        inputs: (N, ...); labels: classes (N,).
        chunk: networks at once, where all of them would outgrow memory or cache; None for all.

    Returns:
        A function from parameters (R, D) to truth values (R, N).
    """

    def logits(state: dict[str, Tensor]) -> Tensor:
        return functional_call(model, state, (inputs,))

    @torch.no_grad()
    def score(parameters: Tensor) -> Tensor:
        return vmap(logits, chunk_size=chunk)(unflatten(parameters, model)).argmax(-1) == labels

    return score


def _floating(model: Model) -> dict[str, Tensor]:
    state = model.state_dict() if isinstance(model, nn.Module) else model
    return {n: t.detach() for n, t in state.items() if t.is_floating_point()}
