r"""How alike the outputs of two networks are: linear centred kernel alignment (CKA).

CKA is a normalised HSIC, the Hilbert-Schmidt independence criterion of the Gram matrices
:math:`K = AA^\top` and :math:`L = BB^\top` of the two outputs:

.. math:: \mathrm{CKA} = \frac{\mathrm{HSIC}(K, L)}{\sqrt{\mathrm{HSIC}(K, K)\,
    \mathrm{HSIC}(L, L)}}

Two estimators of HSIC are offered. The biased one, :math:`\|A_c^\top B_c\|_F^2` up to a factor that
cancels, is that of the official code; it grows with the number of features over examples even for
independent outputs. The unbiased one is the U-statistic of Song et al. (2012, *Feature Selection
via Dependence Maximization*), used for CKA by Nguyen et al. (2021, arXiv 2010.15327).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 64
"""Machine precisions below which an HSIC is what rounding left of 0."""


def linear_cka(a: Tensor, b: Tensor, undefined: str = "raise", *, unbiased: bool = False) -> Tensor:
    r"""Linear CKA (...,) of two sets of outputs (..., n, K).

    .. math:: \mathrm{biased:}\quad
        \frac{\|A_c^\top B_c\|_F^2}{\|A_c^\top A_c\|_F\,\|B_c^\top B_c\|_F}

    with columns centred. The unbiased form takes, with :math:`\tilde K, \tilde L` the Gram matrices
    with their diagonals set to 0,

    .. math:: \mathrm{HSIC}(K, L) = \frac{1}{n(n-3)} \Big[ \mathrm{tr}(\tilde K \tilde L)
        + \frac{1^\top \tilde K 1 \; 1^\top \tilde L 1}{(n-1)(n-2)}
        - \frac{2}{n-2} 1^\top \tilde K \tilde L 1 \Big].

    The biased form costs O(n K^2), where Gram matrices would cost O(n^2 K). So does the unbiased
    form if there are no more features than inputs; otherwise it makes the Gram matrices.

    Args:
        a, b: outputs of two networks for the same n inputs, for example softmax outputs; their
            numbers of features may differ. All but double precision is computed in single
            precision, also under autocast. Each set is divided by a power of two first, which
            changes nothing but that squares of very large or small outputs neither overflow nor
            vanish.
        undefined: ``raise``, or ``nan`` for the pairs whose value is 0 / 0.
        unbiased: the unbiased form, from -1 to 1 and 0 on average for independent outputs; the
            biased one lies in [0, 1].

    Returns:
        The values, in float64 if ``a`` or ``b`` is, otherwise in float32.

    Raises:
        ValueError: different shapes, outputs that are no real numbers or (unless ``undefined`` is
            ``nan``) not finite, outputs that are the same for every input (0 / 0; for the
            unbiased form for all inputs but one), or fewer than 4 inputs for the unbiased form.
    """
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    for name, outputs in (("a", a), ("b", b)):
        if outputs.dim() < 2 or outputs.is_complex():
            raise ValueError(
                f"{name} has shape {tuple(outputs.shape)} and dtype {outputs.dtype}: give real "
                "numbers, (..., inputs, features)."
            )
    if a.shape[:-1] != b.shape[:-1]:
        raise ValueError(
            f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}: give the same inputs."
        )
    n = a.shape[-2]
    if unbiased and n < 4:
        raise ValueError(f"a and b hold {n} inputs: unbiased=True needs at least 4.")
    # products of half precision overflow or lose all digits, and autocast would make them so
    kind = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    a, b = a.to(kind), b.to(kind)
    if undefined == "raise":
        for name, outputs in (("a", a), ("b", b)):
            if not bool(outputs.isfinite().all()):
                raise ValueError(
                    f"{name} holds NaN or inf: did the run diverge, or half precision overflow?"
                )
    with torch.autocast(a.device.type, enabled=False):
        value, flat = _alignment(_at_hand(a), _at_hand(b), unbiased)
    if undefined == "raise" and bool(flat.any()):
        raise ValueError(
            "outputs do not depend on the input (a single class, or a dead network): CKA is 0 / 0. "
            "Leave that pair out, or look at the run."
        )
    return value.masked_fill(flat, float("nan"))


def _at_hand(outputs: Tensor) -> Tensor:
    """Outputs (..., n, K) times a power of two that brings the largest of each set near 1."""
    top = outputs.detach().abs().amax((-2, -1), keepdim=True)
    most = 126 if outputs.dtype == torch.float32 else 1022
    exponent = torch.frexp(top).exponent.clamp(-most, most)
    return torch.ldexp(outputs, -exponent)


def _alignment(a: Tensor, b: Tensor, unbiased: bool) -> tuple[Tensor, Tensor]:
    """CKA (...,), and whether it is 0 / 0."""
    eps = torch.finfo(a.dtype).eps
    flat = torch.zeros(a.shape[:-2], dtype=torch.bool, device=a.device)
    centred = []
    for outputs in (a, b):
        centred.append(outputs - outputs.mean(-2, keepdim=True))
        left = centred[-1].abs().amax((-2, -1))
        # what rounding leaves of equal outputs is not a spread
        flat |= left <= 8 * eps * outputs.abs().amax((-2, -1))
    a, b = centred
    if not unbiased:
        cross = (a.mT @ b).square().sum((-2, -1))
        own = torch.linalg.norm(a.mT @ a, dim=(-2, -1)) * torch.linalg.norm(b.mT @ b, dim=(-2, -1))
        return cross / own, flat | (own == 0)
    cross, _ = _hsic(a, b)
    for outputs in (a, b):
        own, trace = _hsic(outputs, outputs)
        # 0 also where the outputs of all inputs but one are the same
        flat |= own <= ROUNDING * eps * trace
        cross = cross / own.clamp(min=0).sqrt()
    return cross, flat


def _hsic(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    r"""n (n - 3) times the unbiased HSIC (...,) of centred outputs (..., n, K), and tr(K L).

    The estimate does not change when columns are centred. Rows of K and L then sum to 0, and with
    their diagonals k and l what the equation of :func:`linear_cka` says becomes

    .. math:: \mathrm{tr}(KL) - \frac{n}{n-2}\, k^\top l
        + \frac{1^\top k\; 1^\top l}{(n-1)(n-2)}.
    """
    n = a.shape[-2]
    if max(a.shape[-1], b.shape[-1]) <= n:
        trace = (a.mT @ b).square().sum((-2, -1))
    else:
        trace = ((a @ a.mT) * (b @ b.mT)).sum((-2, -1))
    k, l = (outputs.square().sum(-1) for outputs in (a, b))
    sums = k.sum(-1) * l.sum(-1) / ((n - 1) * (n - 2))
    return trace - n / (n - 2) * (k * l).sum(-1) + sums, trace
