"""Losses that add the logarithm of a prior to the logits: logit adjustment and its relatives."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.diagnose.longtail_bias.checks import LOG_EPSILON, check_prior, log_of_prior
from toolkit.diagnose.longtail_bias.losses.per_class import fitted, read


class _Shifted(nn.Module):
    """Cross-entropy of logits with a number added to each class."""

    shift: Tensor

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (b, K) and labels (b,) to a number."""
        labels, _ = read(logits, labels)
        return F.cross_entropy(logits + fitted(logits, self.shift).to(logits.dtype), labels)


class BalancedSoftmaxLoss(_Shifted):
    r"""Cross-entropy of :math:`z + \log\pi` (arXiv 2007.10740): logit adjustment at tau = 1.

    In the official code this option is broken (a comparison in place of an assignment).

    Args:
        prior: (K,) training prior.

    Raises:
        ValueError: a prior with a zero, a wrong sum or shape.
    """

    def __init__(self, prior: Tensor):
        super().__init__()
        self.register_buffer("shift", check_prior(prior).log())


class LogitAdjustedLoss(_Shifted):
    r"""Cross-entropy of :math:`z + \tau\log\pi` (arXiv 2007.07314); at test z is used as it is.

    The official code reads a vector that sums to less than 10 as a prior and any other as counts.
    Here it is a prior; ``prior_from_counts`` makes one.

    Args:
        prior: (K,) training prior.
        tau: strength; 0 is cross-entropy.

    Raises:
        ValueError: a prior with a zero, a wrong sum or shape.
    """

    def __init__(self, prior: Tensor, tau: float = 1.0):
        super().__init__()
        self.register_buffer("shift", tau * log_of_prior(check_prior(prior)))


class GLATrainLoss(_Shifted):
    r"""Cross-entropy of :math:`z + \tau\log\pi + \log\hat\pi_P`: the paper's negative control.

    Inferred from the text and from an unused class of the official code (``MultiExpertLoss``).

    Args:
        prior: (K,) training prior.
        model_prior: (K,) estimated prior of the foundation model.
        tau: strength of the training prior.

    Raises:
        ValueError: a prior with a zero, a wrong sum or shape.
    """

    def __init__(self, prior: Tensor, model_prior: Tensor, tau: float = 1.0):
        super().__init__()
        prior = check_prior(prior)
        other = check_prior(model_prior, len(prior), "model_prior").to(prior)
        self.register_buffer("shift", tau * prior.log() + other.log())


class LADELoss(nn.Module):
    r"""Balanced softmax plus a regularised Donsker-Varadhan bound (arXiv 2012.00321).

    .. math:: \mathrm{CE}(z + \log\pi, y) - \alpha \sum_k \pi_k \Big[ \bar z_{k|k} - R_k
        - \lambda R_k^2 \Big], \quad R_k = \log\tfrac1b \sum_i e^{z_{ik} - \log\pi_k - \log K}

    :math:`\bar z_{k|k}` is the mean logit k of the batch's examples of class k (0 without any).
    This is the official code: R takes the prior of class k for every example, not of its label.

    Args:
        prior: (K,) training prior.
        regularise: :math:`\lambda`.
        weight: :math:`\alpha`.

    Raises:
        ValueError: a prior with a zero, a wrong sum or shape.
    """

    def __init__(self, prior: Tensor, regularise: float = 0.1, weight: float = 0.1):
        super().__init__()
        self.register_buffer("prior", check_prior(prior))
        self.regularise, self.weight = regularise, weight

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (b, K) and labels (b,) to a number."""
        labels, counted = read(logits, labels)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()  # 1e-8 is 0 in half precision, and 0 / 0 without an example
        prior = fitted(logits, self.prior)
        shift = log_of_prior(prior, 0.0).to(logits.dtype)
        batch, classes = logits.shape
        one = (F.one_hot(labels.clamp(min=0), classes) * counted[:, None]).to(logits.dtype)
        # the logits of other classes may be -inf, where a class is not possible
        own = logits.masked_fill(one == 0, 0).sum(0) / (one.sum(0) + 1e-8)
        spread = logits - log_of_prior(prior).to(logits.dtype) + math.log(1 / classes + LOG_EPSILON)
        spread = spread.masked_fill(~counted[:, None], -torch.inf)
        share = counted.to(logits.dtype).mean()  # of the batch that counts; its logarithm is 0 at 1
        bound = spread.logsumexp(0) - math.log(batch) - share.log()
        estimate = own - bound - self.regularise * bound.square()
        fit = F.cross_entropy(logits + shift, labels)
        return fit - self.weight * (estimate * prior.to(logits.dtype)).sum()
