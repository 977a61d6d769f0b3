r"""Competition inside a layer: of a matrix only the entries of largest magnitude are kept.

With :math:`w_s` the s-quantile of :math:`|\Delta W|`, which is held constant:

====== ==================================================================== ===================
like   :math:`\Delta W^s`                                                   derivative, if kept
====== ==================================================================== ===================
code   :math:`\Delta W\,\mathrm{sg}(|\Delta W|)\,1[|\Delta W| > w_s]`       :math:`|\Delta W|`
paper  :math:`\Delta W\,\max(|\Delta W| - w_s, 0)`                          :math:`2|\Delta W|-w_s`
hard   :math:`\Delta W\,1[|\Delta W| > w_s]`                                1
====== ==================================================================== ===================
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor


def quantile(values: Tensor, share: float) -> Tensor:
    """The quantile of a tensor's entries, interpolated as ``torch.quantile`` does, () shaped.

    It selects instead of sorting, and takes tensors of any size, where ``torch.quantile`` refuses
    more than 16 million entries.
    """
    values, last = values.reshape(-1), values.numel() - 1
    position = share * last
    if values.dtype == torch.float32 and last < 2**24:  # torch's own rounding of the position
        position = _single(_single(share) * last)
    below = math.floor(position)
    low = values.kthvalue(below + 1).values
    if position == below:
        return low
    return torch.lerp(low, values.kthvalue(below + 2).values, position - below)


def _single(number: float) -> float:
    """Rounded to single precision."""
    return struct.unpack("f", struct.pack("f", number))[0]


def sparsify(change: Tensor, sparsity: float, like: str = "code") -> Tensor:
    r"""Keep the entries of largest magnitude.

    Args:
        change: :math:`\Delta W`, any shape.
        sparsity: the share s that is set to zero, in [0, 1]; 0 drops the smallest entry alone.
        like: "code", "paper" or "hard": see above.
    """
    size = change.detach().abs()
    limit = quantile(size, sparsity)
    if like == "paper":
        return change * (change.abs() - limit).clamp_min(0)
    if like == "code":
        return change * torch.where(size > limit, size, 0.0)
    return torch.where(size > limit, change, 0.0)
