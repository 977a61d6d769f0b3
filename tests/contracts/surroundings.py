"""Contracts about what surrounds a method: dtypes, autocast, compilation, function transforms."""

from __future__ import annotations

import torch
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.contracts.rooms import Case, objective

BF16 = torch.bfloat16


def works_in_bfloat16(case: Case) -> None:
    """A bfloat16 base: bfloat16 in and out, float32 trained tensors, a merge that agrees."""
    adapted = case.trained(dtype=BF16)
    x = case.input(2, BF16)
    with torch.no_grad():
        plain, y = case.base(BF16)(x), adapted.model(x)
    assert y.dtype == plain.dtype == BF16, f"a bfloat16 model answers in {y.dtype}"
    assert y.isfinite().all(), "the output is not finite"
    kept = {p.dtype for a in adapted.adapters.values() for p in a.parameters()}
    assert kept == {torch.float32}, f"trained tensors are {kept}, small updates would be lost"
    assert not torch.equal(y, plain), "training had no effect"
    if case.method.info.mergeable and case.room != "tied":
        adapted.merge()
        with torch.no_grad():
            gap = (adapted.model(x).float() - y.float()).abs().max()
        assert gap <= 0.05 * y.float().abs().max().clamp_min(1), f"merged output is off by {gap}"


def works_under_autocast(case: Case) -> None:
    x = case.input(2)
    with case.borrowed() as adapted:
        with torch.no_grad():
            exact = adapted.model(x)
        with torch.autocast("cpu", dtype=BF16):
            plain, y = case.base()(x), adapted.model(x)
            loss = objective(y)
        loss.backward()
        assert y.dtype == plain.dtype, f"autocast gives {y.dtype}, the base alone {plain.dtype}"
        gap = (y.float() - exact).abs().max()
        assert gap <= 0.05 * exact.abs().max().clamp_min(1), f"autocast is off by {gap}"
        for name, p in adapted.named_parameters():
            assert p.grad is not None, f"{name} has no gradient under autocast"
            assert p.grad.dtype == p.dtype, f"{name}: gradient is {p.grad.dtype}"
            assert p.grad.isfinite().all(), f"{name}: gradient is not finite"


def works_compiled(case: Case, backend: str = "aot_eager") -> None:
    """Outputs and gradients of the compiled model are those of the eager one."""
    torch._dynamo.reset()
    adapted = case.trained()
    x = case.input(2)
    compiled = torch.compile(adapted.model, backend=backend)
    results = []
    for model in (adapted.model, compiled):
        for p in adapted.parameters():
            p.grad = None
        y = model(x)
        objective(y).backward()
        results.append([y.detach(), *(p.grad for p in adapted.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def works_with_function_transforms(case: Case) -> None:
    """Per-sample gradients by vmap(grad) equal those of a loop."""
    with case.borrowed(dtype=torch.float64) as adapted:
        ours = {id(p) for p in adapted.parameters()}
        state = {n: p.detach() for n, p in adapted.model.named_parameters() if id(p) in ours}
        inputs = torch.stack([case.input(n, torch.float64) for n in (1, 2)])
        # first, because functional_call leaves a module that is used twice with foreign tensors
        eager = []
        for x in inputs:
            adapted.model.zero_grad()
            objective(adapted.model(x)).backward()
            eager.append({n: p.grad for n, p in adapted.model.named_parameters() if n in state})

        def loss(tensors, x):
            return objective(functional_call(adapted.model, tensors, (x,)))

        with sdpa_kernel(SDPBackend.MATH):  # torch's flash attention has no batching rule
            together = vmap(grad(loss), in_dims=(None, 0))(state, inputs)
        for i, x in enumerate(inputs):
            alone = grad(loss)(state, x)
            for name in state:
                torch.testing.assert_close(together[name][i], alone[name], rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(alone[name], eager[i][name], rtol=1e-9, atol=1e-12)


ALL = (works_in_bfloat16, works_under_autocast, works_compiled, works_with_function_transforms)
