r"""Combining models: generalised logit adjustment, and the backdoor adjustment over M models.

.. math:: P(Y|do(x)) \approx \frac1M \sum_m P_m(Y|x)

The equation averages probabilities, the official code (``Tester.backdoor_adjustment``) sums logits.
Both are offered; logits are averaged rather than summed, which has the same argmax and makes M
equal models the same as one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.diagnose.longtail_bias.adjustment import refuse_adjusted
from toolkit.diagnose.longtail_bias.checks import (
    check_logits,
    check_numbers,
    check_prior,
    log_of_prior,
)

REDUCE = ("logit", "prob")


def gla(
    fine_tuned: Tensor,
    zero_shot: Tensor,
    model_prior: Tensor,
    prior: Tensor | None = None,
) -> Tensor:
    r"""Generalised logit adjustment: :math:`z_{ft} + z_{zs} - \log\hat\pi_P - \log\pi_S`.

    Args:
        fine_tuned: (..., K) logits of the fine-tuned model.
        zero_shot: (..., K) logits of the untouched one, at the temperature at which ``model_prior``
            was estimated.
        model_prior: (K,) from :func:`estimate_prior`.
        prior: (K,) training prior. Leave it out if the model was trained with logit adjustment: it
            would be subtracted twice.

    Raises:
        ValueError: shapes or priors that do not fit, logits with NaN, probabilities in place of
            logits, or logits that carry the mark of :func:`logit_adjust` together with a prior.
    """
    fine_tuned, zero_shot = torch.as_tensor(fine_tuned), torch.as_tensor(zero_shot)
    if fine_tuned.shape != zero_shot.shape:
        raise ValueError(
            f"fine_tuned has shape {tuple(fine_tuned.shape)} and zero_shot "
            f"{tuple(zero_shot.shape)}: the same examples and classes are needed."
        )
    classes = fine_tuned.shape[-1]
    refuse_adjusted(check_numbers(zero_shot, "zero_shot"), "zero_shot")
    check_numbers(fine_tuned, "fine_tuned")
    model_prior = check_prior(model_prior, classes, "model_prior")
    adjusted = fine_tuned + zero_shot - log_of_prior(model_prior, 0.0).to(fine_tuned)
    if prior is not None:
        refuse_adjusted(fine_tuned, "fine_tuned")
        adjusted = adjusted - log_of_prior(check_prior(prior, classes)).to(fine_tuned)
    adjusted.adjusted_for = model_prior
    return adjusted


def backdoor_adjust(
    logits: Tensor | Sequence[Tensor],
    reduce: str = "logit",
    weights: Tensor | Sequence[float] | None = None,
    classes: Sequence[Sequence[str]] | None = None,
) -> Tensor:
    r"""Average M models, each fine-tuned on its own with logit adjustment.

    Args:
        logits: (M, N, K), or M tensors (N, K).
        reduce: ``logit`` for :math:`\sum_m w_m z_m`, ``prob`` for
            :math:`\log \sum_m w_m\,\mathrm{softmax}(z_m)`.
        weights: (M,) that sum to one; 1/M each by default, the paper's P(c).
        classes: the class names of each model, in the order of its logits, to be compared.

    Returns:
        (N, K) logits. One model, or M equal ones, come back as they are (for ``prob`` up to a
        constant per row).

    Raises:
        ValueError: no model, models of different examples or class sets, logits with NaN, weights
            that are negative or do not sum to one, or an unknown ``reduce``.
    """
    if reduce not in REDUCE:
        raise ValueError(f'reduce={reduce!r}: choose "logit" or "prob".')
    models = [torch.as_tensor(z) for z in logits]
    if not models:
        raise ValueError("logits holds no model: give at least one.")
    for i, z in enumerate(models):
        if z.shape != models[0].shape:
            raise ValueError(
                f"logits[{i}] has shape {tuple(z.shape)} and logits[0] {tuple(models[0].shape)}: "
                "models of one ensemble answer the same examples with the same classes."
            )
        check_logits(z, name=f"logits[{i}]")
    if classes is not None:
        names = [list(c) for c in classes]
        odd = [i for i, c in enumerate(names) if c != names[0]]
        if len(names) != len(models) or len(names[0]) != models[0].shape[1] or odd:
            raise ValueError(
                f"classes: model {odd[0] if odd else 0} does not have the class names, in the "
                "order, of the others: bring the columns of the logits into one order first."
            )
    z = logits if isinstance(logits, Tensor) else torch.stack(models)
    share = _weights(weights, len(models)).to(z)
    if (share == 0).any():  # 0 times -inf would be no number
        z, share = z[share > 0], share[share > 0]
    if reduce == "logit":
        mean = torch.einsum("m,mnk->nk", share, z)
    else:
        mean = (z.log_softmax(-1) + share.log()[:, None, None]).logsumexp(0)
    marks = [getattr(model, "adjusted_for", None) for model in (logits, *models)]
    mean.adjusted_for = next((mark for mark in marks if mark is not None), None)
    return mean


def _weights(weights: Tensor | Sequence[float] | None, count: int) -> Tensor:
    if weights is None:
        return torch.full((count,), 1 / count, dtype=torch.float64)
    share = torch.as_tensor(weights, dtype=torch.float64).cpu()
    total = float(share.detach().sum())
    if share.shape != (count,) or not (share >= 0).all() or abs(total - 1) > 1e-3:
        raise ValueError(
            f"weights={share.tolist()}: give {count} numbers of 0 or more that sum to 1."
        )
    return share


def fit_weights(logits: Tensor, labels: Tensor, reduce: str = "logit") -> Tensor:
    """Weights (M,) of least cross-entropy on held-out data: a control for equal weights.

    Args:
        logits: (M, N, K).
        labels: (N,).
        reduce: as in :func:`backdoor_adjust`.

    Returns:
        (M,) float64 weights, found by L-BFGS on their softmax.

    Raises:
        ValueError: logits that do not fit the labels, or an unknown ``reduce``.
    """
    from scipy.optimize import minimize

    logits, labels = torch.as_tensor(logits), torch.as_tensor(labels)
    for z in logits:
        check_logits(z, labels)
    labels = labels.long()
    z = logits.detach().double()

    def objective(free: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.tensor(free, requires_grad=True)
        loss = F.cross_entropy(backdoor_adjust(z, reduce, at.softmax(0)), labels)
        (slope,) = torch.autograd.grad(loss, at)
        return float(loss.detach()), slope.numpy()

    found = minimize(objective, np.zeros(len(z)), jac=True, method="L-BFGS-B")
    return torch.as_tensor(found.x).softmax(0)
