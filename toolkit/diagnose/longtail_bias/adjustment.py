"""Logit adjustment after training, and how much of a prior is still in the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from toolkit.diagnose.longtail_bias.checks import (
    check_logits,
    check_numbers,
    check_prior,
    log_of_prior,
)
from toolkit.diagnose.longtail_bias.prior import estimate_prior


def logit_adjust(logits: Tensor, prior: Tensor, tau: float = 1.0) -> Tensor:
    r"""Post-hoc logit adjustment: :math:`z - \tau \log\pi` (arXiv 2007.07314).

    Not for a model that was trained with logit adjustment: its logits are adjusted already. The
    tensor returned carries a mark, and adjusting it again is refused; so do those of ``gla``, and
    of ``backdoor_adjust`` for marked ones. Marks do not survive arithmetic:
    :func:`adjustment_left` finds out from held-out data.

    Args:
        logits: (..., K).
        prior: (K,).
        tau: strength.

    Raises:
        ValueError: a prior that does not fit, logits with NaN, probabilities in place of logits, or
            logits that were adjusted before.
    """
    logits = torch.as_tensor(logits)
    prior = check_prior(prior, logits.shape[-1])
    refuse_adjusted(check_numbers(logits))
    adjusted = logits - (tau * log_of_prior(prior)).to(logits)
    adjusted.adjusted_for = prior
    return adjusted


def refuse_adjusted(logits: Tensor, name: str = "logits") -> None:
    """Raise ValueError for logits that carry the mark of :func:`logit_adjust`."""
    if getattr(logits, "adjusted_for", None) is not None:
        raise ValueError(
            f"{name} were adjusted for a prior already: subtracting it twice turns the bias round. "
            "Pass the model's own logits."
        )


def adjustment_left(logits: Tensor, labels: Tensor, prior: Tensor) -> float:
    r"""How much of a prior is still in the logits: about 1 before, 0 after, -1 after two rounds.

    The slope of the logits' own estimated log-prior on :math:`\log\pi` over the classes, by least
    squares. It sees what marks cannot: a model trained with logit adjustment and adjusted again.
    1 and -1 are for calibrated logits: logits that are c times as large give about c times as much.
    A prior from elsewhere counts as far as it resembles :math:`\pi`. It is rough where the
    classifier is weak or held-out examples are few.

    Args:
        logits: (N, K).
        labels: (N,) balanced and held out.
        prior: (K,) training prior.

    Raises:
        ValueError: as :func:`estimate_prior`, or a prior that is uniform: it has no slope.
    """
    logits = check_logits(torch.as_tensor(logits))
    log_prior = check_prior(prior, logits.shape[1]).double().log()
    log_prior = log_prior - log_prior.mean()
    if log_prior.norm() < 1e-6:
        raise ValueError("prior is uniform: there is nothing that could be adjusted for.")
    own = estimate_prior(logits, labels).log_prior.double()
    log_prior = log_prior.to(own)
    return float(log_prior @ (own - own.mean()) / (log_prior @ log_prior))
