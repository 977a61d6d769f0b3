"""Checks of the M2N2 chapter's exercises. Each computes what is right; none holds a solution."""

from __future__ import annotations

import torch

from toolkit.core.show import exercise
from toolkit.merge import m2n2


def _covered(alpha):
    """Examples that an archive of three still solves after a fourth model has asked to join."""
    scores = torch.zeros(3, 100, dtype=torch.bool)
    scores[:2, :60], scores[2, 60:] = True, True
    after = m2n2.update(torch.zeros(3, 1), scores, torch.ones(1), scores[0], alpha)[1]
    return int(after.any(0).sum())


@exercise.check
def check_covered(answer):
    """Examples solved by anyone after the update: with competition, and without."""
    assert isinstance(answer, tuple), "Give two numbers: (with, without)."
    assert len(answer) == 2, "Give two numbers: (with, without)."
    shared, plain = answer
    found = _covered(1.0), _covered(0.0)
    assert shared != 60, "With competition 60 examples are shared by three. What does each earn?"
    assert plain != 100, "Without it each model earns what it solves. Who solves least?"
    assert answer == found, "One of four models leaves. Write down what each of them earns."
    return "two archives were updated just now, and so many examples were still solved."


@exercise.check
def check_attraction(answer):
    """``attraction(S, A)``: how much better each model is than A where A is not good, alpha = 1."""
    draws = torch.Generator().manual_seed(0)
    for K, N in ((2, 9), (5, 40)):
        S = (torch.rand(K, N, generator=draws) < 0.3).double()
        given = S.clone()
        for A in range(K):
            got = answer(S, A)
            assert got is not None, "There is no answer yet: return one number for each model."
            assert torch.is_tensor(got), "Return a tensor with one number for each model."
            assert got.shape == (K,), "One number for each of the K models: sum over the examples."
            assert not got.isnan().any(), "Nobody solves some examples: what is 0 / 0 there?"
            assert torch.equal(S, given), "The table belongs to the archive: leave it as it is."
            assert got[A] == 0, "Nobody is attracted to itself."
            assert (got >= 0).all(), "Where A is better, that does not count against the other."
            right = m2n2.attraction(S, A)
            raw = (S - S[A]).clamp(min=0).sum(1)
            assert not torch.allclose(got, raw) or torch.allclose(raw, right), (
                "An example that many models solve is worth less: share it."
            )
            assert torch.allclose(got, right), "Each example counts 1 over how many solve it."
    return "it agrees with the toolkit's on two archives, for each first parent."
