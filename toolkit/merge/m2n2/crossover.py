r"""How M2N2 makes a child of two parents: spherical interpolation with a split point.

Everything works on flat vectors (..., D); leading axes are independent pairs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

PARALLEL = 1e-6
"""Sine of the angle up to which vectors count as parallel and are mixed linearly."""
CHUNK = 2**24
"""Coordinates that are held in double precision at a time."""


def slerp(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    r"""Spherical interpolation of raw vectors: a at t = 0, b at t = 1.

    .. math:: \frac{\sin((1-t)\omega)}{\sin\omega}\,a + \frac{\sin(t\omega)}{\sin\omega}\,b,
        \qquad \omega = \arccos\frac{\langle a, b\rangle}{\|a\|\,\|b\|}

    Norms are not divided away. Where :math:`\sin\omega \le 10^{-6}` it is (1 - t) a + t b.

    Args:
        a, b: vectors (..., D).
        t: the ratio: a number, or a tensor that broadcasts against a and b, such as (D,) with one
            ratio for each coordinate.

    Returns:
        The mixture (..., D), in the type of ``a``.

    Raises:
        ValueError: shapes differ, or a vector is zero or not finite, so that there is no angle.
    """
    _same_shape(a, b)
    ratio = torch.as_tensor(t, dtype=torch.float64, device=a.device)
    return _mixed(a, b, *_shares(_angle(a, b)[..., None], ratio))


def crossover(
    a: Tensor,
    b: Tensor,
    w: float | Tensor,
    split: int | Tensor | None = None,
    angle: Literal["full", "segment"] = "full",
) -> Tensor:
    r"""The child of two parents: ratio w before the split point, 1 - w from there on.

    .. math:: \theta_i = \mathrm{slerp}(\theta^A, \theta^B, t_i)_i, \qquad
        t_i = w \text{ for } i < m, \quad t_i = 1 - w \text{ for } i \ge m

    Args:
        a, b: parents (..., D).
        w: mixing ratio in [0, 1]: a number, or one for each pair (...,).
        split: split point m in 0..D, a number or (...,); None mixes all with w.
        angle: one angle between whole parents (official code), or an angle of its own for each
            segment (the paper's text; a segment that is zero in one parent is mixed linearly).

    Returns:
        The child (..., D), in the type of ``a``.

    Raises:
        ValueError: parents of different shapes, a zero parent, a ratio outside [0, 1] or a split
            point outside 0..D.
    """
    _same_shape(a, b)
    if angle not in ("full", "segment"):
        raise ValueError(f"angle = {angle!r}: choose 'full' or 'segment'.")
    length = a.shape[-1]
    ratio = torch.as_tensor(w, dtype=torch.float64, device=a.device)
    if not bool(((ratio >= 0) & (ratio <= 1)).all()):
        raise ValueError(f"w = {w}: the mixing ratio lies in [0, 1].")
    ratio = ratio[..., None]
    if split is None:
        return _mixed(a, b, *_shares(_angle(a, b)[..., None], ratio))
    place = torch.as_tensor(split, device=a.device)
    if place.is_floating_point() or not bool(((place >= 0) & (place <= length)).all()):
        raise ValueError(f"split = {split}: give whole numbers from 0 to D = {length}.")
    left = torch.arange(length, device=a.device) < place[..., None]
    if angle == "full":
        # the other side of the split has 1 - w: the parents change their parts
        first, second = _shares(_angle(a, b)[..., None], ratio)
        return _mixed(a, b, torch.where(left, first, second), torch.where(left, second, first))
    zero = a.new_zeros(())
    sides = []
    for side, t in ((left, ratio), (~left, 1 - ratio)):
        own = _angle(torch.where(side, a, zero), torch.where(side, b, zero), strict=False)
        sides.append(_shares(own[..., None], t))
    return _mixed(a, b, *(torch.where(left, x, y) for x, y in zip(*sides, strict=True)))


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"the parents have shapes {tuple(a.shape)} and {tuple(b.shape)}: merge models of one "
            "architecture, flattened in one order."
        )


def _angle(a: Tensor, b: Tensor, strict: bool = True) -> Tensor:
    """The angle (...,) in double precision; without ``strict`` 0 where a vector is zero."""
    pairs = zip(a.split(CHUNK, -1), b.split(CHUNK, -1), strict=True)
    # exact products: near 180 degrees what rounding leaves of the angle would decide the child
    dot = torch.stack([(x.double() * y.double()).sum(-1) for x, y in pairs]).sum(0)
    norms = torch.linalg.vector_norm(a, dim=-1, dtype=torch.float64)
    norms = norms * torch.linalg.vector_norm(b, dim=-1, dtype=torch.float64)
    cosine = dot / norms
    if not strict:
        cosine = torch.where(norms > 0, cosine, 1.0)
    if not bool(cosine.isfinite().all()):
        raise ValueError(
            "a parent is zero or not finite, so the parents have no angle: leave that model out."
        )
    return cosine.clamp(-1, 1).arccos()


def _shares(omega: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """What both parents are multiplied by."""
    sine = omega.sin()
    apart = sine > PARALLEL
    safe = torch.where(apart, sine, 1.0)
    a = torch.where(apart, ((1 - t) * omega).sin() / safe, 1 - t)
    return a, torch.where(apart, (t * omega).sin() / safe, t)


def _mixed(a: Tensor, b: Tensor, first: Tensor, second: Tensor) -> Tensor:
    kind = torch.promote_types(a.dtype, torch.float32)
    return (first.to(kind) * a + second.to(kind) * b).to(a.dtype)
