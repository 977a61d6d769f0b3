r"""LoRA-Pro's closed form: which changes of A and B come closest to the full gradient.

All functions take any number of leading axes, so many layers of one shape are handled at once.
Shapes below leave them out. Small matrices are computed in float64 whatever the factors are: right
after the start :math:`B^\top B` is near 0 and its inverse would carry no digit in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

# An eigenvalue of a Gram matrix below this share of the largest is rounding, not rank.
RANK_TOLERANCE = 1e-14


def widest(device: torch.device) -> torch.dtype:
    """float64, except on MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def equivalent_gradient(gA: Tensor, gB: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    r"""The change (m, n) of the merged weight that small changes of A and B make, to first order.

    .. math:: \tilde g = s\,B\,g^A + s\,g^B A

    Args:
        gA, gB: (r, n) and (m, r), changes of A and B up to the factor minus learning rate.
        A, B: (r, n) and (m, r). s: scale of BA in the weight.

    Source: paper; the official ``equiv_grad``.
    """
    # one product with inner size 2 r, because two would write the matrix twice
    return torch.cat([B, gB], -1) @ (s * torch.cat([gA, A], -2))


def solve_sylvester(P: Tensor, Q: Tensor, C: Tensor) -> Tensor:
    r"""The X (r, k) with :math:`PX + XQ = C` for positive semi-definite P (r, r) and Q (k, k).

    With :math:`P = U\,\mathrm{diag}(p)\,U^\top` and :math:`Q = V\,\mathrm{diag}(q)\,V^\top`:

    .. math:: X = U \Big[ \frac{(U^\top C V)_{ij}}{p_i + q_j} \Big] V^\top

    Unique when all :math:`p_i + q_j > 0`. Where a sum vanishes the component is 0, which is the
    solution of least norm if there is one.
    """
    (p, U), (q, V) = torch.linalg.eigh(P), torch.linalg.eigh(Q)
    return _sylvester(p, U, q, V, C)


def _sylvester(p: Tensor, U: Tensor, q: Tensor, V: Tensor, C: Tensor) -> Tensor:
    sums = p[..., :, None] + q[..., None, :]
    least = RANK_TOLERANCE * sums.amax((-2, -1), keepdim=True)
    return U @ torch.where(sums > least, (U.mT @ C @ V) / sums, 0.0) @ V.mT


class Frame:
    """What the closed form needs of A and B, computed once and used for several gradients.

    Attributes: ``A`` (r, n) and ``B`` (m, r) in float64; eigenvalues ``p`` (r,) and vectors ``U``
    (r, r) of B'B, ``q`` and ``V`` of AA'; damped inverses ``BB`` and ``AA`` (r, r) of both.
    """

    def __init__(self, A: Tensor, B: Tensor, damping: float):
        """From A (r, n) and B (m, r); errors as in :func:`adjusted`."""
        if not damping >= 0:
            raise ValueError(f"damping={damping!r} must be 0 or a small positive number")
        self.A, self.B = A, B = A.to(widest(A.device)), B.to(widest(A.device))
        values, vectors = torch.linalg.eigh(torch.stack([B.mT @ B, A @ A.mT]))
        (self.p, self.q), (self.U, self.V) = values.clamp_min(0), vectors  # -1e-17 is rounding
        self.BB = (self.U * _reciprocal(self.p, damping, "columns of B")) @ self.U.mT
        self.AA = (self.V * _reciprocal(self.q, damping, "rows of A")) @ self.V.mT

    def pair(
        self, gA_l: Tensor, gB_l: Tensor, s: float, X: str | Tensor = "sylvester"
    ) -> tuple[Tensor, Tensor]:
        """The adjusted pair in float64: see :func:`adjusted`."""
        gA_l, gB_l = gA_l.to(self.A.dtype), gB_l.to(self.A.dtype)
        gA = self.BB @ gA_l / s**2
        right = gB_l @ self.AA / s**2
        gB = right - self.B @ (self.BB @ (self.B.mT @ right))
        if isinstance(X, Tensor):
            chosen = X.to(self.A.dtype)
        elif X == "sylvester":
            chosen = _sylvester(self.p, self.U, self.q, self.V, -gA @ self.A.mT)
        elif X == "symmetric":
            chosen = -0.5 * self.BB @ (self.B.mT @ right)
        elif X == "zero":
            return gA, gB
        else:
            raise ValueError(f"X={X!r} must be sylvester, zero, symmetric or an (r, r) tensor")
        return gA + chosen @ self.A, gB - self.B @ chosen


def adjusted(
    gA_l: Tensor, gB_l: Tensor, A: Tensor, B: Tensor, s: float,
    X: str | Tensor = "sylvester", damping: float = 1e-8,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    r"""The changes of A and B whose joint effect on the weight is nearest to the full gradient.

    They minimise :math:`\|\tilde g - g\|_F` (see :func:`equivalent_gradient`), where g (m, n) is
    the gradient of the merged weight, which is never needed:

    .. math:: g^A = \tfrac1{s^2}(B^\top B)^{-1} g^A_l + XA, \qquad
        g^B = \tfrac1{s^2}\,[I - B(B^\top B)^{-1}B^\top]\,g^B_l\,(AA^\top)^{-1} - BX

    X (r, r) has no effect on :math:`\tilde g`, only on how the change is shared between A and B.

    Args:
        gA_l: (r, n) LoRA's gradient of A, :math:`sB^\top g`.
        gB_l: (m, r) LoRA's gradient of B, :math:`s\,gA^\top`.
        A, B: (r, n) and (m, r). s: scale of BA in the weight.
        X: "sylvester" stays nearest to LoRA's own gradients: :math:`B^\top B X + X AA^\top =
            -\tfrac1{s^2}(B^\top B)^{-1}g^A_lA^\top`. "zero". "symmetric" shares evenly:
            :math:`-\tfrac1{2s^2}(B^\top B)^{-1}B^\top g^B_l(AA^\top)^{-1}`. Or an (r, r) tensor.
        damping: added to the diagonal of both Gram matrices before they are inverted, as in the
            official code. 0 gives the exact projection.

    Returns:
        (r, n) and (m, r), in the dtype of the gradients. A factor that is exactly 0, as B is at
        the start, gets the limit: no change of the other factor through it, and X = 0.

    Raises:
        ValueError: ``damping=0`` and a factor that is not 0 has dependent rows or columns;
            ``damping`` negative; an unknown X.

    Source: paper (its theorem); official ``lorapro_full_adjustment``.
    """
    gA, gB = Frame(A, B, damping).pair(gA_l, gB_l, s, X)
    return gA.to(gA_l.dtype), gB.to(gB_l.dtype)


def _reciprocal(values: Tensor, damping: float, what: str) -> Tensor:
    """1 / (eigenvalues + damping), (1, r); 0 for a factor that is 0, if nothing damps it."""
    if damping > 0:
        return (1 / (values + damping))[..., None, :]
    largest = values.amax(-1, keepdim=True)
    if bool(((values <= RANK_TOLERANCE * largest) & (largest > 0)).any()):
        raise ValueError(
            f"the {what} are linearly dependent, so its Gram matrix has no inverse; use "
            "damping=1e-8, or a lower rank"
        )
    return torch.where(largest > 0, 1 / values, 0.0)[..., None, :]
