"""AdaLoRA step by step against peft's RankAllocator, on the same gradients."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.hf.models import bert, tokens
from toolkit import AdaLoRA, adapt
from toolkit.core.adapt.steps.orthogonality import orthogonality
from toolkit.lowrank.adalora.allocation import AllocationController

peft = pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

STEPS, LAYERS = 24, ["query", "value", "intermediate.dense"]
# peft closes its schedule with one allocation at T - t_f, the official code with the last regular
# one: T - t_f is a multiple of the interval here, where the two are the same.
METHODS = [
    AdaLoRA(rank=4, target_rank=2, warmup=3, final=6, interval=3, orthogonality=0.3),
    AdaLoRA(rank=4, target_rank=1, warmup=0, final=0, interval=1, beta1=0.6, beta2=0.9),
]


@pytest.fixture(params=METHODS, ids=["late", "every-step"])
def pair(request):
    """Our adapted model and peft's, with the same triplets."""
    method = request.param
    ours = adapt(bert(), method, LAYERS, generator=torch.Generator().manual_seed(4))
    config = peft.AdaLoraConfig(
        init_r=method.rank,
        target_r=method.target_rank,
        lora_alpha=method.alpha,
        tinit=method.warmup,
        tfinal=method.final,
        deltaT=method.interval,
        beta1=method.beta1,
        beta2=method.beta2,
        orth_reg_weight=method.orthogonality,
        total_step=STEPS,
        target_modules=LAYERS,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(bert(), config)
    names = {"P": "lora_B", "E": "lora_E", "Q": "lora_A"}
    modules = dict(theirs.base_model.model.named_modules())
    twins = [
        (mine, getattr(modules[layer], names[key])["default"])
        for layer, adapter in ours.adapters.items()
        for key, mine in adapter.named_parameters()
    ]
    with torch.no_grad():
        for mine, yours in twins:
            yours.copy_(mine)
    return ours, theirs, twins


def test_scores_budgets_and_masks_step_by_step(pair):
    ours, theirs, twins = pair
    allocator = theirs.base_model.rankallocator
    optimizer = torch.optim.AdamW(ours.parameters(), lr=5e-3, weight_decay=0.0)
    ours.attach(optimizer, total_steps=STEPS)
    other = torch.optim.AdamW([p for _, p in twins], lr=5e-3, weight_decay=0.0)
    controller = ours.controller
    labels = torch.tensor([0, 1, 2, 1])
    masks = []
    for step in range(STEPS):
        optimizer.zero_grad()
        ours.model(tokens(40, step), labels=labels).loss.backward()
        penalty = orthogonality([(a.P, a.Q) for a in ours.adapters.values()])
        shares = torch.autograd.grad(penalty, [t for t, _ in twins], allow_unused=True)
        # the same gradients for both: the task's plus the penalty's, from autograd
        for (mine, yours), share in zip(twins, shares, strict=True):
            more = 0 if share is None else ours.method.orthogonality * share
            yours.grad = mine.grad + more
        other.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.step()
        budget, _ = allocator.budget_schedule(step)
        assert controller.budget == budget, f"budget at step {step}"
        for (mine, yours), sensitivity in zip(twins, _scores(controller, twins), strict=True):
            torch.testing.assert_close(mine, yours, rtol=2e-4, atol=1e-6)
            _same_scores(allocator, theirs, yours, sensitivity, step < STEPS - ours.method.final)
        ranks = [int((y != 0).sum()) for _, y in twins if y.shape[1] == 1]
        masks.append(ranks)
        assert list(controller.ranks().values()) == ranks, f"masks at step {step}"
        for mine, yours in twins:  # the next gradients start from bit-equal tensors
            yours.data.copy_(mine.data)
    assert sum(masks[-1]) == ours.method.target_rank * len(ours.sites)
    assert len({tuple(m) for m in masks}) > 2, "nothing was ever pruned"


def _scores(controller: AllocationController, twins) -> list[tuple[torch.Tensor, torch.Tensor]]:
    held = {
        id(t): (s, u)
        for t, s, u in zip(
            controller.tensors, controller.sensitivity, controller.uncertainty, strict=True
        )
    }
    return [held[id(mine)] for mine, _ in twins]


def _same_scores(allocator, theirs, yours, held, still_scored) -> None:
    if not still_scored:  # peft clears its scores in the final phase, the official code keeps them
        return
    name = next(n for n, p in theirs.base_model.model.named_parameters() if p is yours)
    for mine, table in zip(held, (allocator.exp_avg_ipt, allocator.exp_avg_unc), strict=True):
        torch.testing.assert_close(mine, table[name], rtol=2e-3, atol=1e-9)
