r"""Bias of foundation models under long-tailed data: two imbalances, and an average against one.

*Data imbalance* is in the downstream training set and can be counted, :math:`\pi_S`. *Parameter
imbalance* came with the frozen weights: the prior :math:`\pi_P` of the pre-training data, which
only the model's behaviour shows. Logit adjustment removes the first. For the second the paper
averages M foundation models that were fine-tuned apart, each with logit adjustment:

.. math:: P(Y|do(x)) \approx \frac1M \sum_m P_m(Y|x)

Source: Chen et al., *Rethinking the Bias of Foundation Model under Long-tailed Distribution*, arXiv
2501.15955; official code ``JiahaoChen1/Pre-train-Imbalance``. The paper's body was not at hand: the
cut of the P groups into thirds and the form of GLA-Train are inferred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from toolkit.core.declare.fields import Declared, Range
from toolkit.core.declare.info import Info
from toolkit.diagnose.longtail_bias.accuracy import cell_table, group_table
from toolkit.diagnose.longtail_bias.adaptformer import (
    AdaptFormer,
    CosineHead,
    add_adaptformer,
    bottleneck_for,
    class_means,
)
from toolkit.diagnose.longtail_bias.adjustment import adjustment_left, logit_adjust
from toolkit.diagnose.longtail_bias.checks import prior_from_counts
from toolkit.diagnose.longtail_bias.diagnosis import Diagnosis
from toolkit.diagnose.longtail_bias.ensemble import backdoor_adjust, fit_weights, gla
from toolkit.diagnose.longtail_bias.losses import (
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    FocalLoss,
    GLATrainLoss,
    LADELoss,
    LDAMLoss,
    LogitAdjustedLoss,
    ReweightedLoss,
)
from toolkit.diagnose.longtail_bias.prior import (
    PriorEstimate,
    calibrate_temperature,
    estimate_prior,
)
from toolkit.diagnose.longtail_bias.probe import knn_probe, occlusion_map
from toolkit.diagnose.longtail_bias.tails import (
    correlated_order,
    groups_by_count,
    groups_by_rank,
    longtail_counts,
    longtail_sample,
    rank_correlation,
)

__all__ = [
    "AdaptFormer",
    "BackdoorAdjustment",
    "BalancedSoftmaxLoss",
    "ClassBalancedLoss",
    "CosineHead",
    "Diagnosis",
    "FocalLoss",
    "GLATrainLoss",
    "LADELoss",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "PriorEstimate",
    "ReweightedLoss",
    "add_adaptformer",
    "adjustment_left",
    "backdoor_adjust",
    "bottleneck_for",
    "calibrate_temperature",
    "cell_table",
    "class_means",
    "correlated_order",
    "estimate_prior",
    "fit_weights",
    "gla",
    "group_table",
    "groups_by_count",
    "groups_by_rank",
    "knn_probe",
    "logit_adjust",
    "longtail_counts",
    "longtail_sample",
    "occlusion_map",
    "prior_from_counts",
    "rank_correlation",
]


@dataclass(frozen=True)
class BackdoorAdjustment(Declared):
    """Fine-tune each foundation model with :meth:`loss`, then average them with :meth:`predict`.

    Args:
        tau: strength of logit adjustment in training; 0 is cross-entropy. Source: official code.
        reduce: what is averaged over the models. Source: official code sums logits; the paper's
            equation averages probabilities.

    Raises:
        TypeError, ValueError: a hyperparameter of the wrong type or outside its range.
    """

    tau: Annotated[float, Range(0.0, 4.0)] = 1.0
    reduce: Literal["logit", "prob"] = "logit"

    info: ClassVar[Info] = Info(
        slug="longtail_bias",
        part="diagnose",
        title="Bias under long tails",
        arxiv="2501.15955",
        year=2025,
        code="JiahaoChen1/Pre-train-Imbalance",
        equation=r"\frac1M \sum_m P_m(Y \mid x)",
        acts_on="M models, each with adapters and a head of its own; their answers are averaged",
        count=r"2nr + 3n + r + 1 \text{ per block}",
        inference="M forward passes",
        colour="#332288",
        zero_init=True,
        mergeable=False,
    )

    def loss(self, counts: Tensor, floor: float | None = None) -> LogitAdjustedLoss:
        """The training loss of every model, from the downstream counts (K,).

        Raises:
            ValueError: negative counts, or a zero without a ``floor``.
        """
        return LogitAdjustedLoss(prior_from_counts(counts, floor), self.tau)

    def predict(
        self,
        logits: Tensor | Sequence[Tensor],
        weights: Tensor | Sequence[float] | None = None,
        classes: Sequence[Sequence[str]] | None = None,
    ) -> Tensor:
        """Logits (N, K) of the average over M models (M, N, K).

        Args:
            logits, weights, classes: as in :func:`backdoor_adjust`.

        Raises:
            ValueError: as :func:`backdoor_adjust`.
        """
        return backdoor_adjust(logits, self.reduce, weights, classes)
