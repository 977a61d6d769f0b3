"""A random network and a teacher that differs from it by known ranks."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from toolkit.core.nets.models import mlp


def planted_teacher(
    ranks: Sequence[int] = (0, 6, 0, 2, 0),
    widths: Sequence[int] = (32, 48, 48, 48, 48, 8),
    scale: float = 2.0,
    generator: torch.Generator | None = None,
) -> tuple[nn.Sequential, nn.Sequential]:
    r"""A random network, and a teacher that differs from it by known ranks.

    Layer :math:`k` of the teacher has the weight :math:`W_k + s\,U_k V_k^\top`, where
    :math:`U_k` (out x rank) and :math:`V_k` (in x rank) have orthonormal columns. All
    singular values of the difference equal `scale`, so its rank is exactly `ranks[k]`.

    Args:
        ranks: planted rank of each layer; 0 leaves a layer as it is.
        widths: input width, hidden widths, output width; one more than `ranks`.
        scale: :math:`s`, the size of every planted singular value.
        generator: draws all numbers; the same state gives the same pair.

    Returns:
        The student's base and the teacher, two separate ReLU networks.

    Raises:
        ValueError: lengths that do not fit, or a rank that its layer cannot hold.
    """
    if len(ranks) != len(widths) - 1:
        raise ValueError(
            f"ranks: need one per layer, {len(widths) - 1} for {len(widths)} widths, "
            f"got {len(ranks)}"
        )
    for layer, (rank, inside, outside) in enumerate(
        zip(ranks, widths[:-1], widths[1:], strict=True)
    ):
        if not 0 <= rank <= min(inside, outside):
            raise ValueError(
                f"ranks: layer {layer} is {outside} x {inside} and cannot hold rank {rank}; "
                f"choose 0 to {min(inside, outside)}"
            )
    base = mlp(widths, generator=generator)
    teacher = copy.deepcopy(base)
    layers = [module for module in teacher if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for layer, rank in zip(layers, ranks, strict=True):
            left, right = (
                torch.linalg.qr(torch.randn(size, rank, generator=generator))[0]
                for size in layer.weight.shape
            )
            layer.weight += scale * left @ right.T
    return base, teacher
