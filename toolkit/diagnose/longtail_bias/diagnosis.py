"""Which of two imbalances hurts a classifier: its accuracy by groups of classes.

Classes are cut twice into Many, Medium and Few: by the downstream training counts (data imbalance)
and by the estimated prior of the foundation model (parameter imbalance). The gap of a cut is the
mean class accuracy of Many minus that of Few. The classifier may come from any framework.

Groups follow arXiv 2501.15955. The intervals and the words are ours.
"""

from __future__ import annotations

import textwrap
from collections.abc import Hashable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from toolkit.diagnose.longtail_bias import figures, frames
from toolkit.diagnose.longtail_bias.accuracy import cell_table, class_accuracy, gap, group_table
from toolkit.diagnose.longtail_bias.adjustment import adjustment_left
from toolkit.diagnose.longtail_bias.checks import check_counts, prior_from_counts
from toolkit.diagnose.longtail_bias.inputs import answers, check_groups, model_prior, vector
from toolkit.diagnose.longtail_bias.reading import reading
from toolkit.diagnose.longtail_bias.tails import (
    GROUPS,
    groups_by_count,
    groups_by_rank,
    rank_correlation,
)

BALANCED = 1.5  # most that the test examples of two classes may differ for `left`


class Diagnosis:
    """Accuracy of any classifier by data group, by parameter group, and by both.

    Three lines, with a table of predictions from anywhere::

        counts = train["label"].value_counts()
        found = Diagnosis.from_frame(test, counts, prediction="predicted")
        print(found.reading())

    Args:
        predictions_or_logits: (N, K) logits, log-probabilities or probabilities (each row sums to
            1), or (N,) predicted classes, on a test set. Of equal logits the class with the smaller
            number is predicted.
        labels: (N,) true classes.
        counts: (K,) downstream *training* examples per class; 0 is allowed.
        prior: (K,) the foundation model's estimated prior.
        zero_shot: logits (n, K) of the untouched foundation model and labels (n,), held out, from
            which the prior is estimated at the temperature that makes confidence equal accuracy.
            Classes are re-weighted, so that their shares of these labels matter little. That
            temperature flattens the prior; only its order cuts the groups.
        d_groups: (K,) 0 Many, 1 Medium, 2 Few, in place of the cut by count.
        names: (K,) names of the classes.
        level: confidence level of all intervals; None leaves them out, which is much quicker where
            many classifiers are compared.

    Attributes:
        accuracy: balanced accuracy, the mean over the classes that have test examples (share).
        micro: share of right answers.
        per_class: one row per class: class, count, prior (if known), tested (test examples),
            accuracy, data and parameter (its groups).
        data, parameter: see :func:`group_table`; parameter is None without a prior.
        cells: see :func:`cell_table`, or None.
        tail_tail: accuracy of the classes that are Few in both cuts; NaN if there are none.
        data_gap, parameter_gap: Many minus Few, a share.
        data_interval, parameter_interval: Welch's t interval of the gap over the classes, (low,
            high); None with fewer than two classes in a group, or no spread in both.
        cut: ``thresholds`` (above 100, below 20 images), ``thirds`` (if those leave a group empty)
            or ``given``.
        rank_correlation: Spearman's, of counts and prior; None if one is missing or constant.
        left: how much of the training prior is still in the logits, from ``adjustment_left``: 1
            all, 0 nothing, -1 subtracted twice. Too large for overconfident logits, and it counts
            in whatever of the model's own prior resembles the training prior. None for predictions
            without logits, test labels that lack a class or differ by more than a factor of 1.5,
            and counts that are all equal or include 0.
        counts, prior, d_groups, p_groups, names, level: what was used.

    Raises:
        ValueError: arguments of the wrong shape or range, both ``prior`` and ``zero_shot``, or a
            ``zero_shot`` that cannot be calibrated.
    """

    def __init__(
        self,
        predictions_or_logits: Any,
        labels: Any,
        counts: Any,
        prior: Any = None,
        zero_shot: tuple[Any, Any] | None = None,
        d_groups: Any = None,
        names: Sequence[Hashable] | None = None,
        level: float | None = 0.95,
    ) -> None:
        self.counts = check_counts(vector(counts, "counts").double(), zero=True)
        classes, self.level = len(self.counts), level
        if classes < 3:
            raise ValueError(f"counts has {classes} classes: three groups need at least three.")
        self.names = [str(name) for name in (range(classes) if names is None else names)]
        if len(self.names) != classes:
            raise ValueError(
                f"names has {len(self.names)} entries, counts {classes}: give one each."
            )
        logits, predictions, labels = answers(predictions_or_logits, labels, classes)
        each = class_accuracy(predictions, labels, classes)
        self.accuracy = float(each.nanmean())
        self.micro = float((predictions == labels).double().mean())

        self.d_groups, self.cut = self._cut(d_groups)
        self.data = group_table(each, self.d_groups, level)
        self.data_gap, self.data_interval = gap(each, self.d_groups, level)

        self.prior = model_prior(prior, zero_shot, classes)
        self.p_groups = self.parameter = self.cells = self.tail_tail = None
        self.parameter_gap = self.parameter_interval = self.rank_correlation = None
        if self.prior is not None:
            self.p_groups = groups_by_rank(self.prior)
            self.parameter = group_table(each, self.p_groups, level)
            self.parameter_gap, self.parameter_interval = gap(each, self.p_groups, level)
            self.cells = cell_table(each, self.d_groups, self.p_groups, level)
            self.tail_tail = float(self.cells["accuracy"].iloc[-1])
            if _uneven(self.counts) and _uneven(self.prior):
                self.rank_correlation = rank_correlation(self.counts, self.prior)
        tested = torch.bincount(labels, minlength=classes)
        self.left = self._left(logits, labels, tested)
        self.per_class = self._per_class(each, tested)

    def _cut(self, d_groups: Any) -> tuple[Tensor, str]:
        if d_groups is not None:
            given = vector(d_groups, "d_groups")
            return check_groups(given, len(self.counts), "d_groups", self.level), "given"
        groups = groups_by_count(self.counts)
        if len(groups.unique()) == 3:
            return groups, "thresholds"
        return groups_by_rank(self.counts), "thirds"

    def _left(self, logits: Tensor | None, labels: Tensor, tested: Tensor) -> float | None:
        even = tested.min() > 0 and tested.max() <= BALANCED * tested.min()
        if logits is None or not even or not logits.isfinite().all():
            return None
        if self.counts.min() == 0 or not _uneven(self.counts):
            return None
        return adjustment_left(logits, labels, prior_from_counts(self.counts))

    def _per_class(self, each: Tensor, tested: Tensor) -> pd.DataFrame:
        table = pd.DataFrame({"class": self.names, "count": self.counts.long().numpy()})
        if self.prior is not None:
            table["prior"] = self.prior.numpy()
        table["tested"], table["accuracy"] = tested.numpy(), each.numpy()
        table["data"] = [GROUPS[g] for g in self.d_groups]
        if self.p_groups is not None:
            table["parameter"] = [GROUPS[g] for g in self.p_groups]
        return table

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        counts: Any,
        label: Hashable = "label",
        prediction: Hashable | None = None,
        scores: Sequence[Hashable] | None = None,
        **kwargs: Any,
    ) -> Diagnosis:
        """Diagnose a table of predictions, one row per test example.

        Args:
            frame: The table: of pandas, polars or Arrow, or a mapping from names to columns.
            counts: Training examples by class name, as a mapping or Series, whose order is that of
                the classes; or (K,) numbers, if the classes are 0 to K - 1.
            label: Column of true classes.
            prediction: Column of predicted classes.
            scores: K columns of logits, log-probabilities or probabilities, in the order of
                ``counts``.
            **kwargs: ``prior``, ``zero_shot``, ``d_groups``, ``names``, ``level`` of the class.
                A ``prior`` or ``d_groups`` by name is brought into the order of ``counts``.

        Raises:
            TypeError: a frame that is no table or not computed yet, or a table of counts.
            ValueError: both or neither of ``prediction`` and ``scores``, a missing column, a name
                without a count, or what the class itself refuses.
        """
        return cls(**frames.arguments(frame, counts, label, prediction, scores, kwargs))

    def reading(self, width: int | None = None) -> str:
        """What the numbers say, in sentences, and what to try next.

        Args:
            width: characters of a line; by default a line for each subject, however long.

        Raises:
            ValueError: without intervals (``level=None``) nothing could be said with care.
        """
        if self.level is None:
            raise ValueError("level=None left the intervals out: a reading needs level=0.95, say.")
        said = reading(self)
        if width is None:
            return said
        return "\n".join(textwrap.fill(line, width) for line in said.splitlines())

    def figure(self) -> Any:
        """Return bars of accuracy by group, with intervals and numbers of classes (matplotlib)."""
        return figures.bars(self)

    def figure_alt(self) -> str:
        """Return :meth:`figure` in words."""
        return figures.bars_alt(self)

    def heat(self) -> Any:
        """Return the heat map of the nine cells.

        Raises:
            ValueError: If no prior is known.
        """
        return figures.heat(self)

    def heat_alt(self) -> str:
        """Return :meth:`heat` in words.

        Raises:
            ValueError: If no prior is known.
        """
        return figures.heat_alt(self)


def _uneven(values: Tensor) -> bool:
    """Whether the values are not all the same."""
    return bool(values.max() > values.min())
