"""What an adapted model changed in its base, as a sparse difference."""

from __future__ import annotations

from typing import Any

import torch

from toolkit.core.states.deltas import SparseDelta


@torch.no_grad()
def delta(adapted: Any) -> SparseDelta:
    """The difference of the adapted layers' weights from the base.

    Names are those of the plain base's ``state_dict``. Parameters that train beside the methods
    (``adapted.extra``) are not in it.

    Args:
        adapted: a model with methods on it, not merged.

    Raises:
        RuntimeError: it is merged or unloaded already. TypeError: a method is no plain weight.
    """
    if adapted.state != "adapted":
        raise RuntimeError(f"the model is already {adapted.state}; take the difference before that")
    old, new = {}, {}
    for name, placed in adapted.sites.items():
        if not placed.method.info.mergeable:
            raise TypeError(f"{placed.method.info.title} at {name!r} is no change of a weight")
        for key, value in placed.merged().items():
            old[f"{name}.{key}"] = placed.layer.base._parameters[key]
            new[f"{name}.{key}"] = value
    return SparseDelta.between(old, new)
