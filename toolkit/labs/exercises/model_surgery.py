"""Checks of the Model Surgery chapter's exercises. Each computes what is right; none holds a
solution."""

from __future__ import annotations

import torch

from toolkit.core.show import exercise
from toolkit.merge.model_surgery import ModelSurgery

COSINES = {"a": (-0.9, -0.6, 0.1, 0.8), "b": (-0.5, -0.2, 0.0, 0.3), "c": (-0.8, -0.7, -0.4, 0.2)}


def _state(cosines):
    """Gates of width 2 whose rows have given cosines with (1, 0)."""
    made = {}
    for name, values in cosines.items():
        c = torch.tensor(values)
        made[f"{name}.gate_proj.weight"] = torch.stack([c, (1 - c * c).sqrt()], 1)
    return made


@exercise.check
def check_rows(answer):
    """How many rows of layer b move when k = 5 of the twelve rows do."""
    assert not callable(answer), "Give one number."
    rows = ModelSurgery(k=5).rows(_state(COSINES), torch.tensor([1.0, 0.0]))
    found = len(rows.get("b.gate_proj.weight", ()))
    assert answer != 2, "No layer has a share of its own: sort all twelve rows together."
    assert answer != 5, "k counts the rows of all layers together."
    assert answer == found, "Sort the twelve cosines and take the five smallest."
    return "five of the twelve were chosen just now, and so many of them lie in layer b."


@exercise.check
def check_operate(answer):
    """``operate(gates, v, k, alpha)``: new gates (m, d), of which the k most opposed rows moved."""
    draws = torch.Generator().manual_seed(0)
    gates = [torch.randn(6, 4, generator=draws) for _ in range(3)]
    gates[1] *= 3.0
    v, k, alpha = 2.0 * torch.randn(4, generator=draws), 7, 0.5
    given = [gate.clone() for gate in gates]
    got = answer(gates, v, k, alpha)
    assert got is not None, "There is no answer yet: return the list of new gates."
    assert all(map(torch.equal, gates, given)), "The old gates must stay: work on copies."
    assert len(got) == 3, "Return one matrix for each of the gates."
    state = {f"{i}.gate_proj.weight": gate for i, gate in enumerate(gates)}
    edit = ModelSurgery(k=k, alpha=alpha).edit(state, v)
    wanted = list((state | edit.applied(state)).values())
    moved = [(new != old).any(1) for new, old in zip(got, gates, strict=True)]
    count = sum(int(rows.sum()) for rows in moved)
    assert count == k, f"{count} rows have moved, k = {k} should: k is of all gates together."
    right = [(new != old).any(1) for new, old in zip(wanted, gates, strict=True)]
    assert all(map(torch.equal, moved, right)), (
        "Other rows should move: those with the smallest cosines, whatever their length."
    )
    assert all(map(torch.allclose, got, wanted)), "Each row moves by alpha times v, as v is."
    assert all(map(torch.equal, answer(gates, v, 0, alpha), gates)), "With k = 0 nothing moves."
    return "the same rows as the toolkit's, by the same vector, and the old gates stay."
