"""Counts, priors and logits, checked, and the logarithm of a prior.

Priors are explicit. A class with probability 0 is refused: its logarithm has no value. The official
code adds 1e-9 inside the logarithm of logit adjustment, which hides such a class; the same number
is added here, after the check, so that values agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOG_EPSILON = 1e-9  # official code, inside the logarithm of logit adjustment and LADE
TOLERANCE = 1e-3  # by which the sum of a prior may miss 1; float16 needs that much


def check_counts(counts: Tensor | Sequence[float], zero: bool = False) -> Tensor:
    """Counts (K,) as a float tensor.

    Raises:
        ValueError: no vector, a negative, fractional or infinite count, or (unless ``zero``) a
            class without examples.
    """
    counts = torch.as_tensor(counts)
    made = counts if counts.is_floating_point() else counts.to(torch.get_default_dtype())
    if made.dim() != 1 or len(made) < 2:
        raise ValueError(f"counts has shape {tuple(made.shape)}: give one number per class, (K,).")
    bad = ~made.isfinite() | (made < 0) | (made != made.round())
    if bad.any():
        k = int(bad.nonzero()[0])
        raise ValueError(f"counts[{k}] = {made[k]:g}: a class has 0, 1, 2, ... examples.")
    if not zero and (made == 0).any():
        k = int((made == 0).nonzero()[0])
        raise ValueError(
            f"counts[{k}] is 0, and the logarithm of its share is minus infinity: leave the class "
            "out, count it as 1 (counts.clamp(min=1)), or set prior_from_counts(counts, floor=...)."
        )
    return made


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
    """Whether each row (..., K) holds numbers from 0 to 1 that sum to 1.

    One row alone is taken at its word: of logits for two classes one in a hundred looks like this.
    """
    if z.numel() <= z.shape[-1] or z.amin() < 0 or z.amax() > 1:
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
        whole = not labels.is_floating_point() and labels.dtype != torch.bool
        if labels.shape != logits.shape[:1] or not whole:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}: give one whole "
                f"number for each of the {len(logits)} rows of {name}."
            )
        if labels.min() < 0 or labels.max() >= logits.shape[1]:
            raise ValueError(f"labels must lie between 0 and {logits.shape[1] - 1}.")
    return logits
