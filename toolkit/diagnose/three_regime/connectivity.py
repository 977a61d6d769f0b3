r"""Linear mode connectivity: error or loss along the line between two networks, and its barrier.

.. math:: \theta(t) = (1-t)\,\theta_0 + t\,\theta_1, \qquad
    \mathrm{LMC} = \bar e - e(t^\star), \quad t^\star = \arg\max_t |\bar e - e(t)|

States are stacked along a lane axis (see ``toolkit.core.lanes.nets``); answers are for all pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolkit.core.lanes.nets import LaneNet, States, require_same
from toolkit.core.lanes.steps import cross_entropy
from toolkit.diagnose.three_regime.evaluation import errors, losses

POINTS = 11
MEASURES = {"error": errors, "loss": losses}


def path_errors(
    net: LaneNet,
    a: States,
    b: States,
    x: Tensor,
    y: Tensor,
    bend: States | None = None,
    points: int = POINTS,
    norm_batch: int = 128,
    measure: str = "error",
) -> Tensor:
    r"""Training error or loss (P, points) along the straight line, or along a bent path.

    .. math:: \theta(t) = (1-t)\,\theta_0 + t\,\theta_1, \qquad t = 0, 1/10, \dots, 1

    With a bend :math:`\theta_m` it is the quadratic Bezier curve
    :math:`(1-t)^2\theta_0 + 2t(1-t)\theta_m + t^2\theta_1`, which for
    :math:`\theta_m = (\theta_0+\theta_1)/2` is the line. Batch-norm's scale and shift are
    interpolated like weights; its statistics are estimated anew at every point.

    Args:
        net: calls the lanes.
        a, b: states of the P first and P second ends.
        x: training inputs (N, ...), without augmentation.
        y: labels (N,), as they were trained on.
        bend: states of the P middle points of the curve.
        points: how many values of t.
        norm_batch: batch in which statistics are estimated.
        measure: ``error``, or ``loss`` (the official figures show the error).

    Returns:
        The share of wrong answers at each point, or the mean cross-entropy in nats.

    Raises:
        ValueError: the ends are not of one architecture, or an unknown measure.
    """
    if measure not in MEASURES:
        raise ValueError(f'measure={measure!r}: choose "error" or "loss".')
    require_same(a, b, "a", "b")
    found = []
    for t in torch.linspace(0, 1, points).tolist():
        states = dict(a)
        for name in net.parameters:
            if bend is None:
                states[name] = torch.lerp(a[name], b[name], t)
            else:
                states[name] = _bezier(a[name], bend[name], b[name], t)
        found.append(MEASURES[measure](net, net.restate(states, x, norm_batch), x, y))
    return torch.stack(found, 1)


def _bezier(start: Tensor, bend: Tensor, end: Tensor, t: float) -> Tensor:
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end


def lmc(error: Tensor) -> Tensor:
    r"""Linear mode connectivity (...,) from errors or losses along the path (..., points).

    .. math:: \mathrm{LMC} = \bar e - e(t^\star), \quad \bar e = \tfrac12(e(0)+e(1)), \quad
        t^\star = \arg\max_t |\bar e - e(t)|

    Below 0: a barrier; about 0: connected; above 0: the middle is better than the ends. The ends
    take part in the maximum, so with unequal ends and a flat path the value is half their
    difference, its sign set by the order of the pair; :func:`barrier` is free of that.
    """
    gap = _below_ends(error)
    return gap.gather(-1, gap.abs().argmax(-1, keepdim=True)).squeeze(-1)


def lmc_place(error: Tensor) -> Tensor:
    r"""Where on the path the value of :func:`lmc` is taken: :math:`t^\star` (...,), in [0, 1].

    Of equally large deviations the one with the smallest t counts; of a flat path that is 0.

    Args:
        error: (..., points) errors or losses at evenly spaced t, as from :func:`path_errors`.

    Raises:
        ValueError: fewer than two points.
    """
    points = error.shape[-1]
    if points < 2:
        raise ValueError(f"error has {points} point along the path: a path has at least two.")
    return _below_ends(error).abs().argmax(-1).to(error.dtype) / (points - 1)


def _below_ends(error: Tensor) -> Tensor:
    """How far each point (..., points) lies below the mean of the ends."""
    return (error[..., :1] + error[..., -1:]) / 2 - error


def barrier(error: Tensor) -> Tensor:
    r"""The highest rise above the straight line between the ends' errors, (...,), at least 0.

    .. math:: \max_t\; e(t) - (1-t)\,e(0) - t\,e(1)
    """
    t = torch.linspace(0, 1, error.shape[-1], dtype=error.dtype, device=error.device)
    rise = error - error[..., :1] - t * (error[..., -1:] - error[..., :1])
    return rise.amax(-1)


def curved(
    net: LaneNet,
    a: States,
    b: States,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
    steps: int = 500,
    batch: int = 64,
    lr: float = 0.05,
    momentum: float = 0.9,
    masks: States | None = None,
) -> States:
    """Train the middle point of a Bezier curve between two ends (Garipov et al., 2018).

    Each step draws one t in (0, 1) and one batch, shared by all pairs, and lowers the loss at that
    point of the curve. The rate falls linearly to 0.

    Args:
        net, a, b, x, y: as in :func:`path_errors`.
        generator: draws t and the batches.
        steps, batch, lr, momentum: of the descent.
        masks: parameter name -> (P, ...); what is pruned at both ends stays pruned between them.

    Returns:
        States of the middle points, for ``path_errors(..., bend=...)``.
    """
    require_same(a, b, "a", "b")
    masks = masks or {}
    bend = {n: (a[n] + b[n]) / 2 for n in net.parameters}
    speed = {n: torch.zeros_like(t) for n, t in bend.items()}
    for step in range(steps):
        t = float(torch.rand((), generator=generator))
        pick = torch.randint(len(x), (batch,), generator=generator).to(x.device)
        leaves = {n: w.detach().requires_grad_() for n, w in bend.items()}
        states = {n: v.clone() if n not in bend else v for n, v in a.items()}
        for n, w in leaves.items():
            states[n] = _bezier(a[n], w, b[n], t)
        out = net.shared(states, x[pick], train=True)
        total = cross_entropy(out, y[pick].expand(len(out), -1)).mean(1).sum()
        grads = torch.autograd.grad(total, list(leaves.values()))
        with torch.no_grad():
            for n, g in zip(leaves, grads, strict=True):
                speed[n].mul_(momentum).add_(g * masks[n] if n in masks else g)
                bend[n] = bend[n] - lr * (1 - step / steps) * speed[n]
    return dict(a) | bend
