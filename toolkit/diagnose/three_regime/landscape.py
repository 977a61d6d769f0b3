"""What lies between two networks: error along a path, connectivity, similarity, curvature.

All functions take stacked states (see ``toolkit.core.lanes.nets``) and answer for all lanes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.core.lanes.nets import LaneNet, States, lanes_of, require_same

POINTS = 11
CELLS = 2**16
"""Examples times lanes that are evaluated together; bounds the memory of activations."""


def path_errors(
    net: LaneNet,
    a: States,
    b: States,
    x: Tensor,
    y: Tensor,
    bend: States | None = None,
    points: int = POINTS,
    norm_batch: int = 128,
) -> Tensor:
    r"""Training error (P, points) along the straight line, or along a bent path.

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

    Returns:
        The share of wrong answers at each point.

    Raises:
        ValueError: the ends are not of one architecture.
    """
    require_same(a, b, "a", "b")
    found = []
    for t in torch.linspace(0, 1, points).tolist():
        states = dict(a)
        for name in net.parameters:
            if bend is None:
                states[name] = torch.lerp(a[name], b[name], t)
            else:
                states[name] = (
                    (1 - t) ** 2 * a[name] + 2 * t * (1 - t) * bend[name] + t**2 * b[name]
                )
        found.append(errors(net, net.restate(states, x, norm_batch), x, y))
    return torch.stack(found, 1)


def errors(net: LaneNet, states: States, x: Tensor, y: Tensor) -> Tensor:
    """Share of wrong answers (M,) in evaluation mode."""
    batch = max(1, CELLS // lanes_of(states))
    wrong = torch.zeros(lanes_of(states), device=x.device)
    with torch.no_grad():
        for part, labels in zip(x.split(batch), y.split(batch), strict=True):
            wrong += (net.shared(states, part).argmax(-1) != labels).sum(1)
    return wrong / len(y)


def losses(net: LaneNet, states: States, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy (M,) in evaluation mode."""
    batch = max(1, CELLS // lanes_of(states))
    total = torch.zeros(lanes_of(states), device=x.device, dtype=x.dtype)
    with torch.no_grad():
        for part, labels in zip(x.split(batch), y.split(batch), strict=True):
            out = net.shared(states, part)
            each = F.cross_entropy(out.flatten(0, 1), labels.repeat(len(out)), reduction="none")
            total += each.view(len(out), -1).sum(1)
    return total / len(y)


def lmc(error: Tensor) -> Tensor:
    r"""Linear mode connectivity (...,) from errors along the path (..., points).

    .. math:: \mathrm{LMC} = \bar e - e(t^\star), \quad \bar e = \tfrac12(e(0)+e(1)), \quad
        t^\star = \arg\max_t |\bar e - e(t)|

    Below 0: a barrier; about 0: connected; above 0: the middle is better than the ends. The ends
    take part in the maximum, so with unequal ends and a flat path the value is half their
    difference, its sign set by the order of the pair; :func:`barrier` is free of that.
    """
    gap = (error[..., :1] + error[..., -1:]) / 2 - error
    return gap.gather(-1, gap.abs().argmax(-1, keepdim=True)).squeeze(-1)


def barrier(error: Tensor) -> Tensor:
    r"""The highest rise above the straight line between the ends' errors, (...,), at least 0.

    .. math:: \max_t\; e(t) - (1-t)\,e(0) - t\,e(1)
    """
    t = torch.linspace(0, 1, error.shape[-1], dtype=error.dtype, device=error.device)
    rise = error - error[..., :1] - t * (error[..., -1:] - error[..., :1])
    return rise.amax(-1)


def linear_cka(a: Tensor, b: Tensor, undefined: str = "raise") -> Tensor:
    r"""Linear CKA (...,) of two sets of outputs (..., n, K), biased, in its feature form.

    .. math:: \frac{\|A_c^\top B_c\|_F^2}{\|A_c^\top A_c\|_F\,\|B_c^\top B_c\|_F}

    with columns centred. It costs O(n K^2), where the Gram form costs O(n^2 K), and is equal to it.

    Args:
        a, b: outputs of two networks for the same n inputs, for example softmax outputs.
        undefined: ``raise``, or ``nan`` for the pairs whose value is 0 / 0.

    Raises:
        ValueError: different shapes, or outputs that are the same for every input (0 / 0).
    """
    if a.shape[:-1] != b.shape[:-1]:
        raise ValueError(
            f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}: give the same inputs."
        )
    flat = torch.zeros(a.shape[:-2], dtype=torch.bool, device=a.device)
    centred = []
    for outputs in (a, b):
        centred.append(outputs - outputs.mean(-2, keepdim=True))
        left = centred[-1].abs().amax((-2, -1))
        # what rounding leaves of equal outputs is not a spread
        flat |= left <= 8 * torch.finfo(a.dtype).eps * outputs.abs().amax((-2, -1))
    a, b = centred
    cross = (a.mT @ b).square().sum((-2, -1))
    own = torch.linalg.norm(a.mT @ a, dim=(-2, -1)) * torch.linalg.norm(b.mT @ b, dim=(-2, -1))
    flat |= own == 0
    if undefined == "raise" and bool(flat.any()):
        raise ValueError(
            "outputs do not depend on the input (a single class, or a dead network): CKA is 0 / 0. "
            "Leave that pair out, or look at the run."
        )
    return (cross / own).masked_fill(flat, float("nan"))


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
            states[n] = (1 - t) ** 2 * a[n] + 2 * t * (1 - t) * w + t**2 * b[n]
        out = net.shared(states, x[pick], train=True)
        loss = F.cross_entropy(out.flatten(0, 1), y[pick].repeat(len(out)), reduction="none")
        total = loss.view(len(out), -1).mean(1).sum()
        grads = torch.autograd.grad(total, list(leaves.values()))
        with torch.no_grad():
            for n, g in zip(leaves, grads, strict=True):
                speed[n].mul_(momentum).add_(g * masks[n] if n in masks else g)
                bend[n] = bend[n] - lr * (1 - step / steps) * speed[n]
    return dict(a) | bend


class _Curvature:
    """Products of every lane's Hessian with a vector, on the whole training set."""

    def __init__(self, net: LaneNet, states: States, x: Tensor, y: Tensor):
        self.leaves = [states[n].detach().requires_grad_() for n in net.parameters]
        named = dict(states) | dict(zip(net.parameters, self.leaves, strict=True))
        out = net.shared(named, x)
        loss = F.cross_entropy(out.flatten(0, 1), y.repeat(len(out)), reduction="none")
        total = loss.view(len(out), -1).mean(1).sum()
        self.grads = torch.autograd.grad(total, self.leaves, create_graph=True)

    def product(self, v: Sequence[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(self.grads, self.leaves, v, retain_graph=True))


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return sum((x * y).flatten(1).sum(1) for x, y in zip(a, b, strict=True))


def _column(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.dim() - 1))


def hessian_top(
    net: LaneNet,
    states: States,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
    iterations: int = 20,
) -> Tensor:
    """Eigenvalue of largest size (M,) of the loss's Hessian, by power iteration.

    Args:
        net, states: the lanes, in evaluation mode.
        x, y: the examples that define the loss; all are used at once.
        generator: draws the first vector.
        iterations: products with the Hessian.
    """
    curvature = _Curvature(net, states, x, y)
    v = [torch.randn(w.shape, generator=generator, dtype=w.dtype).to(w.device)
         for w in curvature.leaves]  # fmt: skip
    value = v[0].new_zeros(len(v[0]))
    for _ in range(iterations):
        size = _dot(v, v).sqrt()
        v = [w / _column(size, w) for w in v]
        product = curvature.product(v)
        value, v = _dot(v, product), product
    return value.detach()


def hessian_trace(
    net: LaneNet, states: States, x: Tensor, y: Tensor, generator: torch.Generator, draws: int = 20
) -> Tensor:
    """Trace (M,) of the loss's Hessian, by Hutchinson's estimate with random signs."""
    curvature = _Curvature(net, states, x, y)
    total = curvature.leaves[0].new_zeros(len(curvature.leaves[0]))
    for _ in range(draws):
        v = [(torch.randint(0, 2, w.shape, generator=generator) * 2 - 1).to(w)
             for w in curvature.leaves]  # fmt: skip
        total = total + _dot(v, curvature.product(v))
    return (total / draws).detach()
