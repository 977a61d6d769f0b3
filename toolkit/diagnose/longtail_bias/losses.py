r"""Losses for long-tailed training sets, each a module over logits (b, K) and labels (b,).

With :math:`z` the logits, :math:`y` the label, :math:`n_k` the training counts and :math:`\pi` the
training prior:

============================  ====================================================================
:class:`FocalLoss`            :math:`(1 - p_y)^\gamma\,(-\log p_y)`
:class:`LDAMLoss`             cross-entropy of :math:`z - s\,m_y e_y`, :math:`m_k\propto n_k^{-1/4}`
:class:`ClassBalancedLoss`    weights :math:`w_k \propto (1-\beta)/(1-\beta^{n_k})`
:class:`ReweightedLoss`       weights :math:`w_k \propto \pi_k^{-\text{exponent}}`
:class:`BalancedSoftmaxLoss`  cross-entropy of :math:`z + \log \pi`
:class:`LogitAdjustedLoss`    cross-entropy of :math:`z + \tau \log \pi`
:class:`GLATrainLoss`         cross-entropy of :math:`z + \tau \log \pi + \log \hat\pi_P`
:class:`LADELoss`             balanced softmax and an estimate of the balanced log-density
============================  ====================================================================

All return the mean over the batch, as the official code ``JiahaoChen1/Pre-train-Imbalance`` (built
on ``shijxcs/LIFT``) does. Vectors over classes are buffers, so that many modules can be stacked
along a lane axis: see ``toolkit.core.lanes.lane_loss``.

All refuse logits of another number of classes than they were made for (ValueError).

Priors are explicit. A class with probability 0 is refused: its logarithm has no value. The official
code adds 1e-9 inside the logarithm of logit adjustment, which hides such a class; the same number
is added here, after the check, so that values agree.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.diagnose.longtail_bias.tails import check_counts

LOG_EPSILON = 1e-9  # official code, inside the logarithm of logit adjustment and LADE
TOLERANCE = 1e-3  # by which the sum of a prior may miss 1; float16 needs that much


def prior_from_counts(counts: Tensor, floor: float | None = None) -> Tensor:
    """Training prior (K,): counts over their sum.

    Args:
        counts: (K,) examples per class.
        floor: count that a class with less is given, such as 0.5; without it a class without
            examples is an error.

    Raises:
        ValueError: negative, fractional or zero counts, or a floor that is not positive.
    """
    if floor is not None and not floor > 0:
        raise ValueError(f"floor={floor}: must be positive.")
    counts = check_counts(counts, zero=floor is not None)
    counts = counts if floor is None else counts.clamp(min=floor)
    return counts / counts.sum()


def check_prior(prior: Tensor, classes: int | None = None, name: str = "prior") -> Tensor:
    """A prior (K,) of positive numbers that sum to one.

    Raises:
        ValueError: another shape or length, an entry that is not positive, or another sum.
    """
    prior = torch.as_tensor(prior)
    if not prior.is_floating_point():
        raise ValueError(f"{name} holds whole numbers: are these counts? Use prior_from_counts.")
    if prior.dim() != 1 or (classes is not None and len(prior) != classes):
        want = "(K,)" if classes is None else f"({classes},)"
        raise ValueError(
            f"{name} has shape {tuple(prior.shape)}: give one number per class, {want}."
        )
    bad = ~prior.isfinite() | (prior <= 0)
    if bad.any():
        k = int(bad.nonzero()[0])
        raise ValueError(
            f"{name}[{k}] = {prior[k]:g}: every class needs a positive probability; leave the "
            "class out, or build the prior with prior_from_counts(counts, floor=...)."
        )
    total = float(prior.double().sum())
    if abs(total - 1) > TOLERANCE:
        raise ValueError(f"{name} sums to {total:.6g}: divide it by its sum, or were these counts?")
    return prior


def log_of_prior(prior: Tensor, epsilon: float = LOG_EPSILON) -> Tensor:
    """Logarithm (K,) of a prior, in single precision at least: in half precision the share of a
    rare class is 0, and its logarithm would win every answer."""
    if prior.dtype not in (torch.float32, torch.float64):
        prior = prior.float()
    return (prior + epsilon).log()


def check_numbers(logits: Tensor, name: str = "logits") -> Tensor:
    """Logits (..., K) without NaN and +inf; -inf is a class that is not possible.

    Raises:
        ValueError: whole numbers, a NaN or +inf (naming the first such row), or probabilities.
    """
    if not logits.is_floating_point():
        raise ValueError(f"{name} holds whole numbers: give logits, (..., classes).")
    if are_probabilities(logits):
        raise ValueError(f"{name} are probabilities: give logits, or the logarithm of these.")
    bad = (logits.isnan() | (logits == torch.inf)).any(-1)
    if bad.any():
        row = ", ".join(str(int(i)) for i in bad.nonzero()[0])
        raise ValueError(f"{name}[{row}] holds NaN or inf: did the run diverge?")
    return logits


def are_probabilities(z: Tensor) -> bool:
    """Whether each row (..., K) holds numbers from 0 to 1 that sum to 1."""
    if not z.numel() or z.amin() < 0 or z.amax() > 1:
        return False
    return bool(((z.float().sum(-1) - 1).abs() < 10 * TOLERANCE).all())


def check_logits(logits: Tensor, labels: Tensor | None = None, name: str = "logits") -> Tensor:
    """Logits (N, K), and labels (N,) that fit them.

    Raises:
        ValueError: another shape, a NaN (or +inf), probabilities in place of logits, or a label
            outside 0 to K - 1.
    """
    if logits.dim() != 2 or logits.shape[1] < 2 or not len(logits):
        raise ValueError(f"{name} has shape {tuple(logits.shape)}: give (examples, classes).")
    check_numbers(logits, name)
    if labels is not None:
        if labels.shape != logits.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}: give one whole "
                f"number for each of the {len(logits)} rows of {name}."
            )
        if labels.min() < 0 or labels.max() >= logits.shape[1]:
            raise ValueError(f"labels must lie between 0 and {logits.shape[1] - 1}.")
    return logits


def _fit(logits: Tensor, each: Tensor) -> Tensor:
    """A vector over classes where the logits (b, K) are.

    Raises:
        ValueError: logits of another number of classes than the loss was made for.
    """
    if logits.shape[-1:] != each.shape:
        raise ValueError(
            f"logits have {logits.shape[-1]} classes, this loss was made for {len(each)}: give it "
            "the counts or the prior of these classes."
        )
    return each.to(logits.device)


def _log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """log p of each label (b,); unlike F.cross_entropy it can be batched by vmap with weights."""
    return F.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]


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
        loss = -_log_likelihood(logits, labels)
        if self.weight is not None:
            loss = loss * _fit(logits, self.weight)[labels]
        return ((1 - torch.exp(-loss)) ** self.gamma * loss).mean()


class LDAMLoss(nn.Module):
    r"""Label-distribution-aware margins: the label's logit is lowered by :math:`s\,m_y`.

    :math:`m_k = m_{\max}\,n_k^{-1/4} / \max_j n_j^{-1/4}` (arXiv 1906.07413). As in the official
    code only the margin is scaled: the logits of a cosine head carry their scale already.

    Args:
        counts: (K,) training examples per class.
        max_margin: margin of the rarest class.
        scale: s; the head's scale.

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
        margin = _fit(logits, self.margin).to(logits.dtype)
        one = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)
        lowered = logits - self.scale * margin * one
        return -_log_likelihood(lowered, labels).mean()


class _Weighted(nn.Module):
    """Cross-entropy with a weight per class, over the sum of the batch's weights."""

    weight: Tensor

    def _keep(self, weight: Tensor) -> None:
        self.register_buffer("weight", weight / weight.mean())

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (b, K) and labels (b,) to a number."""
        each = _fit(logits, self.weight)[labels]
        return -(each * _log_likelihood(logits, labels)).sum() / each.sum()


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


class _Shifted(nn.Module):
    """Cross-entropy of logits with a number added to each class."""

    shift: Tensor

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (b, K) and labels (b,) to a number."""
        return F.cross_entropy(logits + _fit(logits, self.shift).to(logits.dtype), labels)


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
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()  # 1e-8 is 0 in half precision, and 0 / 0 without an example
        prior = _fit(logits, self.prior)
        shift = log_of_prior(prior, 0.0).to(logits.dtype)
        batch, classes = logits.shape
        one = F.one_hot(labels, classes).to(logits.dtype)
        own = (logits * one).sum(0) / (one.sum(0) + 1e-8)
        spread = logits - log_of_prior(prior).to(logits.dtype) + math.log(1 / classes + LOG_EPSILON)
        bound = spread.logsumexp(0) - math.log(batch)
        estimate = own - bound - self.regularise * bound.square()
        fit = F.cross_entropy(logits + shift, labels)
        return fit - self.weight * (estimate * prior.to(logits.dtype)).sum()
