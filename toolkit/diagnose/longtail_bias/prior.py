r"""The prior that a classifier carries, read off its behaviour on balanced data.

If logits behave like :math:`z_k = \log P(x|k) + \log q_k`, then subtracting :math:`\log q` gives
the best classifier for balanced classes. So q is estimated as

.. math:: \hat q = \arg\min_{q \in \Delta} \frac1N \sum_i \mathrm{CE}(z_i - \log q, y_i),

which is convex in :math:`\log q`. At the optimum the mean of the softmax is the share of each
class: the *residual* says by how much that is missed.

Source: GLA, arXiv 2310.08106 (code ``BeierZhu/GLA``), which solves it by 1000 steps of gradient
descent and ascent on q and two multipliers. Here :math:`q = \mathrm{softmax}(\phi)` and L-BFGS find
the same optimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from toolkit.diagnose.longtail_bias.checks import check_logits


@dataclass(frozen=True)
class PriorEstimate:
    """What :func:`estimate_prior` found.

    Attributes:
        prior: (K,) estimated prior, in the dtype of the logits, but single precision at least.
        log_prior: (K,) its logarithm.
        residual: largest distance of a class's mean probability from its share of the labels.
        loss: mean cross-entropy at the optimum, nats.
        steps: steps of L-BFGS.
        temperature: by which the logits were divided before.
    """

    prior: Tensor
    log_prior: Tensor
    residual: float
    loss: float
    steps: int
    temperature: float


def estimate_prior(
    logits: Tensor,
    labels: Tensor,
    temperature: float | str = 1.0,
    reweight: bool = False,
    tolerance: float = 1e-7,
    max_steps: int = 500,
) -> PriorEstimate:
    r"""Estimate the prior of a classifier on labelled held-out data.

    Args:
        logits: (N, K) of the classifier whose prior is asked for, such as the zero-shot model.
        labels: (N,). The classes should be balanced: a class with more labels than another gets a
            smaller estimate, q over its share. Never use the long-tailed training set.
        temperature: by which logits are divided first. T turns q into about :math:`q^{1/T}`.
            ``"calibrate"`` finds the one at which mean confidence equals accuracy, as GLA's code
            does. That flattens a correct prior: logits with a prior in them are too sure of
            themselves on balanced data. The order of the classes stays.
        reweight: let every class count alike, whatever its share of the labels.
        tolerance: residual at which to stop.
        max_steps: most steps of L-BFGS.

    Returns:
        The estimate. A ``residual`` above ``tolerance`` means that it has not converged.

    Raises:
        ValueError: a class without a label (its estimate would run off to infinity), logits that
            are not finite or do not fit the labels, probabilities in place of logits, a temperature
            that is not positive.
    """
    logits, labels = torch.as_tensor(logits), torch.as_tensor(labels)
    check_logits(logits, labels)
    labels = labels.long()
    if not logits.isfinite().all():
        raise ValueError("logits holds -inf: the prior of a class that is never possible is 0.")
    classes = logits.shape[1]
    seen = torch.bincount(labels.cpu(), minlength=classes)
    if (seen == 0).any():
        missing = (seen == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"labels hold no example of class {missing[0]} ({len(missing)} such classes): the "
            "estimate of its prior has no optimum. Hold out examples of every class, or drop it."
        )
    if temperature == "calibrate":
        temperature = calibrate_temperature(logits, labels)
    if isinstance(temperature, str) or not 0 < temperature < float("inf"):
        raise ValueError(f'temperature={temperature!r}: give a positive number or "calibrate".')
    z, labels = logits.detach().double() / temperature, labels.to(logits.device)
    share = seen.double() / seen.sum()
    weight = torch.full((len(z),), 1 / len(z), dtype=torch.float64, device=z.device)
    if reweight:
        weight = (1 / (classes * seen.double())).to(z.device)[labels]
        share = torch.full_like(share, 1 / classes)
    share = share.to(z.device)

    # one exponential of all logits; after it an evaluation is two products with this matrix
    top = z.amax(1)
    size = (z - top[:, None]).exp()

    # probabilities on average: exact already where z has one informative class per example
    start = (weight @ (size / size.sum(1, keepdim=True))).clamp(min=1e-12).log() - share.log()
    phi = start.requires_grad_()
    search = torch.optim.LBFGS(
        [phi], max_iter=max_steps, history_size=20, tolerance_grad=tolerance, tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    @torch.no_grad()
    def objective() -> Tensor:
        scale = (-phi).exp()
        total = size @ scale
        # softmax(phi) has log q = phi - const, and the constant changes nothing
        phi.grad = share - scale * (size.T @ (weight / total))
        return weight @ (top + total.log()) + share @ phi

    search.step(objective)
    fit = float(objective())
    log_prior = phi.detach().log_softmax(0)
    own = float(weight @ z.gather(1, labels[:, None])[:, 0])
    kept = torch.promote_types(logits.dtype, torch.float32)  # a rare class is 0 in half precision
    return PriorEstimate(
        prior=log_prior.exp().to(kept),
        log_prior=log_prior.to(kept),
        residual=float(phi.grad.abs().max()),
        loss=fit - own,
        steps=int(search.state[phi]["n_iter"]),
        temperature=float(temperature),
    )


def calibrate_temperature(
    logits: Tensor, labels: Tensor, low: float = 1e-3, high: float = 1e3
) -> float:
    """The temperature T at which the mean largest probability of softmax(z / T) is the accuracy.

    The mean confidence falls as T rises, so there is one. GLA's code stops within 0.1 points.

    Args:
        logits: (N, K).
        labels: (N,).
        low, high: where T is sought.

    Raises:
        ValueError: no temperature there gives that confidence: all answers right, or fewer than
            by chance; logits with NaN, or probabilities in their place.
    """
    from scipy.optimize import brentq

    logits, labels = torch.as_tensor(logits), torch.as_tensor(labels)
    check_logits(logits, labels)
    z = logits.detach().double()
    accuracy = float((z.argmax(1) == labels.to(z.device)).double().mean())

    def gap(log_t: float) -> float:
        return float((z / np.exp(log_t)).softmax(1).amax(1).mean()) - accuracy

    ends = float(np.log(low)), float(np.log(high))
    if not gap(ends[0]) > 0 > gap(ends[1]):
        raise ValueError(
            f"accuracy {accuracy:.3g} is no mean confidence of these logits for a temperature from "
            f"{low:g} to {high:g} (chance is {1 / z.shape[1]:.3g}): pass a temperature instead."
        )
    return float(np.exp(brentq(gap, *ends, xtol=1e-10)))
