"""The factored route: its fused form, hooks, subclasses, unbatched inputs and dropout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from toolkit import LoRA, adapt
from toolkit.core.adapt.factored import _LowRankLinear

M, N, R = 5, 7, 3


def tensors(dtype=torch.float64):
    torch.manual_seed(0)
    x, A, B = torch.randn(4, 2, N), torch.randn(R, N), torch.randn(M, R)
    return [t.to(dtype).requires_grad_() for t in (x, A, B)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_fused_equals_composed_with_all_gradients(bias, transposed):
    x, A, B = tensors()
    W = torch.randn(N, M, dtype=torch.float64).T if transposed else torch.randn(M, N).double()
    b = torch.randn(M, dtype=torch.float64, requires_grad=True) if bias else None
    free = [x, A, B] + ([b] if bias else [])
    fused = _LowRankLinear.apply(x, W, b, A, B, 0.7)
    composed = F.linear(x, W + 0.7 * B @ A, b)
    torch.testing.assert_close(fused, composed)
    weight = torch.randn_like(composed)
    ours = torch.autograd.grad((weight * fused).sum(), free)
    theirs = torch.autograd.grad((weight * composed).sum(), free)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_fused_second_derivative_reaches_the_input():
    x, A, B = tensors()
    W = torch.randn(M, N, dtype=torch.float64)

    def function(x, A, B):
        return _LowRankLinear.apply(x, W, None, A, B, 0.7)

    assert torch.autograd.gradcheck(function, (x, A, B))
    assert torch.autograd.gradgradcheck(function, (x, A, B))


@pytest.mark.parametrize("shape", [(N,), (3, N), (2, 3, 4, N), (0, N)])
def test_any_leading_shape(shape):
    model = nn.Sequential(nn.Linear(N, M))
    adapted = adapt(model, LoRA(rank=R))
    with torch.no_grad():
        adapted.adapters["0"].B.normal_()
    x = torch.randn(shape)
    y = model(x)
    assert y.shape == (*shape[:-1], M)
    torch.testing.assert_close(y, model[0].materialised(x), rtol=1e-4, atol=1e-5)
    y.sum().backward()


def test_transposed_and_sliced_inputs():
    model = nn.Sequential(nn.Linear(N, M))
    adapted = adapt(model, LoRA(rank=R))
    with torch.no_grad():
        adapted.adapters["0"].B.normal_()
    x = torch.randn(N, 4, 6).transpose(0, 2)[:, ::2]
    torch.testing.assert_close(model(x), model(x.contiguous()))


def test_hooks_of_the_frozen_layer_still_run():
    model = nn.Sequential(nn.Linear(N, M))
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    adapted = adapt(model, LoRA(rank=R))
    with torch.no_grad():
        adapted.adapters["0"].B.normal_()
    x = torch.randn(2, N)
    y = model(x)
    assert seen == [(2, M)]
    torch.testing.assert_close(y, F.linear(x, *_merged(model[0])))


def _merged(layer):
    return layer.adapter.merged(layer.base)["weight"], layer.base.bias


class Doubled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_keeps_its_own_forward():
    model = nn.Sequential(Doubled(N, M))
    x = torch.randn(2, N)
    expected = model(x)
    adapt(model, LoRA(rank=R))
    torch.testing.assert_close(model(x), expected)


def test_dropout_hits_the_branch_alone_and_only_in_training():
    model = nn.Sequential(nn.Linear(N, M))
    adapted = adapt(model, LoRA(rank=R, dropout=0.5))
    x = torch.randn(64, N)
    torch.testing.assert_close(model(x), model[0].base(x))  # B = 0: nothing to drop
    with torch.no_grad():
        adapted.adapters["0"].B.normal_()
    assert not torch.equal(model(x), model(x))
    model.eval()
    torch.testing.assert_close(model(x), model[0].materialised(x), rtol=1e-4, atol=1e-5)


def test_dropout_on_attention_is_refused_by_name():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    model = Attention()
    adapt(model, LoRA(rank=2, dropout=0.1), "attention")
    with pytest.raises(ValueError, match=r"dropout=0.1.*'attention'.*dropout=0"):
        model(torch.randn(3, 2, 8))


def test_padding_and_stride_settings_of_an_embedding_hold():
    model = nn.Sequential(nn.Embedding(9, 6, padding_idx=0))
    adapted = adapt(model, LoRA(rank=2), "0")
    with torch.no_grad():
        adapted.adapters["0"].A.normal_()
    tokens = torch.tensor([[0, 3, 8]])
    torch.testing.assert_close(model(tokens), model[0].materialised(tokens))
    model(tokens).sum().backward()
    assert not adapted.adapters["0"].A.grad[:, 0].any()
