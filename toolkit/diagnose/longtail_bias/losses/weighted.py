"""Losses that weigh examples or classes, or ask for a larger margin where a class is rare."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.diagnose.longtail_bias.checks import check_counts, check_prior
from toolkit.diagnose.longtail_bias.losses.per_class import fitted, log_likelihood, mean, read


class FocalLoss(nn.Module):
    r""":math:`(1 - p_y)^\gamma\,\ell`, with :math:`\ell = -w_y \log p_y` (arXiv 1708.02002).

    Args:
        gamma: how much easy examples count less; 0 is cross-entropy.
        weight: (K,) of each class. As in the official code, p is then :math:`e^{-\ell}` of the
            *weighted* loss.

    Raises:
        ValueError: a negative gamma or weight.
    """

    def __init__(self, gamma: float = 2.0, weight: Tensor | None = None):
        super().__init__()
        if not gamma >= 0 or (weight is not None and (weight < 0).any()):
            raise ValueError(f"gamma={gamma} and weight must not be negative.")
        self.gamma = gamma
        self.register_buffer("weight", weight)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (b, K) and labels (b,) to a number."""
        labels, counted = read(logits, labels)
        # a label that does not count may lie on a class that is not possible: inf, and no gradient
        loss = (-log_likelihood(logits, labels)).where(counted, 1)
        if self.weight is not None:
            loss = loss * fitted(logits, self.weight)[labels.clamp(min=0)]
        return mean((1 - torch.exp(-loss)) ** self.gamma * loss, counted)


class LDAMLoss(nn.Module):
    r"""Label-distribution-aware margins: the label's logit is lowered by :math:`s\,m_y`.

    :math:`m_k = m_{\max}\,n_k^{-1/4} / \max_j n_j^{-1/4}` (arXiv 1906.07413). As in the official
    code only the margin is scaled: the logits of a cosine head carry their scale already.

    Args:
        counts: (K,) training examples per class.
        max_margin: margin of the rarest class.
        scale: s; the head's scale, ``head.scale`` of a :class:`CosineHead`.

    Raises:
        ValueError: zero or negative counts, a margin or scale below 0.
    """

    def __init__(self, counts: Tensor, max_margin: float = 0.5, scale: float = 30.0):
        super().__init__()
        if not max_margin >= 0 or not scale > 0:
            raise ValueError(f"max_margin={max_margin}, scale={scale}: must be positive.")
        margin = check_counts(counts).sqrt().sqrt().reciprocal()
        self.register_buffer("margin", margin * (max_margin / margin.max()))
        self.scale = scale

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (b, K) and labels (b,) to a number."""
        labels, counted = read(logits, labels)
        margin = fitted(logits, self.margin).to(logits.dtype)
        one = F.one_hot(labels.clamp(min=0), logits.shape[-1]).to(logits.dtype)
        lowered = logits - self.scale * margin * one
        return -mean(log_likelihood(lowered, labels), counted)


class _Weighted(nn.Module):
    """Cross-entropy with a weight per class, over the sum of the batch's weights."""

    weight: Tensor

    def _keep(self, weight: Tensor) -> None:
        self.register_buffer("weight", weight / weight.mean())

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (b, K) and labels (b,) to a number."""
        labels, counted = read(logits, labels)
        each = fitted(logits, self.weight)[labels.clamp(min=0)].where(counted, 0)
        return -(each * log_likelihood(logits, labels).where(counted, 0)).sum() / each.sum()


class ClassBalancedLoss(_Weighted):
    r"""Weights by the effective number of examples, :math:`(1-\beta)/(1-\beta^{n_k})`, mean 1.

    Source: arXiv 1901.05555. The batch mean divides by the sum of the weights, as PyTorch does.
    Weights are computed in the precision of the counts, as in the official code; whole numbers are
    taken as float32, where the weight of a class of one example is off by 2e-4 of itself.

    Args:
        counts: (K,) training examples per class.
        beta: in [0, 1); 0 is cross-entropy.

    Raises:
        ValueError: zero or negative counts, beta outside [0, 1) or too close to 1.
    """

    def __init__(self, counts: Tensor, beta: float = 0.9999):
        super().__init__()
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta}: must lie in [0, 1).")
        weight = (1 - beta) / (1 - beta ** check_counts(counts))
        if not weight.isfinite().all():
            raise ValueError(
                f"beta={beta} is 1 in {weight.dtype}: give counts in double precision."
            )
        self._keep(weight)


class ReweightedLoss(_Weighted):
    r"""Generalised re-weighting: weights :math:`\pi_k^{-\text{exponent}}` with mean 1.

    Source: arXiv 2103.16370.

    Args:
        prior: (K,) training prior.
        exponent: 0 is cross-entropy, 1 the inverse frequency.

    Raises:
        ValueError: a prior with a zero, a wrong sum or shape.
    """

    def __init__(self, prior: Tensor, exponent: float = 1.0):
        super().__init__()
        self._keep(check_prior(prior) ** -exponent)
