"""SAM's step in half precision; the rest is tested with the methods that use it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from toolkit.core.train.sam import sam_step


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_norm_of_half_precisions_is_summed_in_float32(dtype):
    """Its square is beyond float16, and its sum would stop growing in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(n, generator=generator).mul(300).to(dtype) for n in (4000, 3000)]
    parameters = [nn.Parameter(torch.zeros(len(g), dtype=dtype)) for g in grads]
    seen = []

    def closure():
        seen.append([p.detach().clone() for p in parameters])
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g.clone()
        return torch.tensor(1.0)

    sam_step(parameters, closure, rho=50.0)
    moved = torch.cat([p.double() for p in seen[1]])
    whole = torch.cat([g.double() for g in grads])
    want = 50 * whole / whole.norm()
    torch.testing.assert_close(moved, want, rtol=1e-2, atol=1e-4)
    assert moved.norm() == pytest.approx(50.0, rel=1e-3)
    assert all(not p.any() for p in parameters)
