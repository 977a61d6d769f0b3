"""What no method can adapt: refused by name, before anything changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WRAPPERS = {
    "OptimizedModule": "._orig_mod",
    "DataParallel": ".module",
    "DistributedDataParallel": ".module",
    "FullyShardedDataParallel": ".module",
}
"""Classes of torch that wrap a module, and where they keep it; some are slow to import."""


def refuse_weight(weight: Tensor, label: str) -> None:
    """Raise ValueError for a weight that is not there yet, or in which no sum can be formed.

    Args:
        weight: the frozen one.
        label: how a message names its layer.
    """
    if is_lazy(weight):
        why = "has no weight yet (lazy); run one batch through the model first"
    elif type(weight).__name__ == "DTensor":
        why = "is sharded over processes (DTensor); adapt and merge the whole model, unsharded"
    elif weight.is_meta:
        why = (
            "holds no numbers (device meta): they are not loaded yet, or offloaded. Load the model "
            "whole, without a device map that offloads, then adapt it"
        )
    elif type(weight) not in (nn.Parameter, Tensor):
        why = (
            f"holds its weight as {type(weight).__name__}, a tensor with an arithmetic of its own "
            "(quantised); adapt the model in full precision, or leave the layer out of targets"
        )
    elif weight.dtype not in DTYPES:
        why = (
            f"holds its weight in {weight.dtype}, to which no real difference can be added; "
            "convert it to float32 or bfloat16 first, or leave the layer out of targets"
        )
    elif weight.is_inference():
        why = (
            "was made inside torch.inference_mode(), so nothing can train through it; make the "
            "model outside, or copy it there with copy.deepcopy"
        )
    else:
        return
    raise ValueError(f"layer {label} {why}")


def refuse_wrapped(model: nn.Module, names: Mapping[str, Any]) -> None:
    """Raise TypeError where a wrapper would not see, or not run, adapters put inside it.

    A module that is compiled on its own calls what it wrapped, and not what stands there later;
    one that lies deeper inside is found.

    Args:
        model: as given by the caller.
        names: those of the layers to adapt.
    """
    if not any(type(module).__name__ in WRAPPERS for module in model.modules()):
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        parts = name.split(".")
        for end in range(len(parts)):
            where, outer = ".".join(parts[:end]), modules[".".join(parts[:end])]
            kind = type(outer).__name__
            if kind not in WRAPPERS or not type(outer).__module__.startswith("torch."):
                continue
            if kind == "OptimizedModule" and 0 < end < len(parts) - 1:
                continue
            raise TypeError(
                f"layer {name!r} lies inside {repr(where) if where else 'a model'} that is "
                f"{'compiled' if kind == 'OptimizedModule' else 'wrapped'} ({kind}); adapt what "
                f"is inside ({WRAPPERS[kind]}) before it is compiled, distributed or sharded"
            )
