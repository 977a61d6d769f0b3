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

All take labels of any whole-number type. Examples of label -100 do not count, as in
``torch.nn.functional.cross_entropy``; if none counts, the loss is NaN. All refuse (ValueError)
logits that are no (b, K) of floating point or of another number of classes than they were made for,
soft, one-hot and multi-label targets, bools, labels (b, 1), and labels outside the classes (on a
GPU PyTorch's kernels refuse these). Logits are never taken for probabilities, whatever they look
like.

Only :class:`LDAMLoss` has a scale, and it must be that of the head: a margin is meant in cosines,
so ``LDAMLoss(counts, scale=head.scale)`` beside a :class:`CosineHead`. The defaults are those of
the official code, 30 there and 25 here, and do not belong together; a loss cannot see it, because
cosines times 25 are logits like any others.
"""

from toolkit.diagnose.longtail_bias.losses.adjusted import (
    BalancedSoftmaxLoss,
    GLATrainLoss,
    LADELoss,
    LogitAdjustedLoss,
)
from toolkit.diagnose.longtail_bias.losses.weighted import (
    ClassBalancedLoss,
    FocalLoss,
    LDAMLoss,
    ReweightedLoss,
)

__all__ = [
    "BalancedSoftmaxLoss",
    "ClassBalancedLoss",
    "FocalLoss",
    "GLATrainLoss",
    "LADELoss",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "ReweightedLoss",
]
