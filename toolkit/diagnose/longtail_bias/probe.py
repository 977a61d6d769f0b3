"""What features know: a nearest-neighbour probe, and which parts of an input a class rests on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.core.train.labels import class_numbers


def knn_probe(
    features: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    classes: int,
    k: int = 200,
    temperature: float = 0.1,
) -> Tensor:
    r"""Scores (N, K) of the k nearest neighbours: the sum of :math:`e^{\cos / t}` over each class.

    Args:
        features: (N, width) to be classified.
        bank: (B, width) labelled features. The official code takes its validation set.
        bank_labels: (B,).
        classes: K.
        k: neighbours.
        temperature: t of the weights.

    Raises:
        ValueError: fewer than k features in the bank, or shapes that do not fit.
    """
    if features.shape[1:] != bank.shape[1:] or len(bank) != len(bank_labels):
        raise ValueError(
            f"features {tuple(features.shape)}, bank {tuple(bank.shape)} and bank_labels "
            f"{tuple(bank_labels.shape)} do not fit."
        )
    if not 1 <= k <= len(bank):
        raise ValueError(f"k={k}: the bank has {len(bank)} features; choose 1 to {len(bank)}.")
    bank_labels = class_numbers(bank_labels, len(bank), "bank_labels").to(features.device)
    near, place = (F.normalize(features, dim=1) @ F.normalize(bank, dim=1).T).topk(k, dim=1)
    scores = features.new_zeros(len(features), classes)
    return scores.scatter_add_(1, bank_labels[place], (near / temperature).exp())


@torch.no_grad()
def occlusion_map(
    predict: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor,
    parts: Mapping[str, Tensor],
    classes: int,
    fill: float = 0.0,
) -> pd.DataFrame:
    """Accuracy of each class with nothing hidden, and with each part of the input hidden.

    A class whose accuracy survives hiding a part does not rest on that part.

    Args:
        predict: inputs (N, ...) to logits (N, K).
        x: (N, ...).
        labels: (N,).
        parts: name -> mask of the shape of one input, true where hidden.
        classes: K.
        fill: what hidden entries become.

    Returns:
        One row per class: ``whole`` and one column per part, shares in [0, 1]; NaN for a class
        without examples.

    Raises:
        ValueError: a mask of another shape than one input, or a part named ``whole``.
    """
    if "whole" in parts:
        raise ValueError('parts: "whole" is the name of the column with nothing hidden.')
    for name, mask in parts.items():
        if mask.shape != x.shape[1:]:
            raise ValueError(
                f"parts[{name!r}] has shape {tuple(mask.shape)}, one input {tuple(x.shape[1:])}."
            )
    views = {"whole": x} | {n: x.masked_fill(m.to(x.device), fill) for n, m in parts.items()}
    labels = class_numbers(labels, len(x)).to(x.device)
    counts = torch.bincount(labels, minlength=classes).double()
    table = {}
    for name, view in views.items():
        right = (predict(view).argmax(-1) == labels).double()
        table[name] = (torch.bincount(labels, right, minlength=classes) / counts).cpu().numpy()
    return pd.DataFrame(table).rename_axis("class")
