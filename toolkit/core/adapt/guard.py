"""Whether what is attached still moves the model's own tensors, in the shapes adapters need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from toolkit.core.adapt.forwards import refuse_offloaded


def check_shapes(sites: Mapping[str, Any]) -> None:
    """Raise RuntimeError for a weight that is no longer of the shape its adapter was made for.

    Likewise for an adapter that was offloaded.
    """
    for name, placed in sites.items():
        refuse_offloaded(placed.layer.adapter)
        weight = placed.layer.base._parameters.get(placed.site.parameter)
        if weight is not None and tuple(weight.shape) != placed.site.shape:
            raise RuntimeError(
                f"layer {name!r} was adapted with a weight of shape {placed.site.shape}, which is "
                f"{tuple(weight.shape)} now (resized, perhaps through a tied embedding); resize "
                "before adapting"
            )


def refuse_compiled(sites: Mapping[str, Any]) -> None:
    """Raise RuntimeError for a layer that was compiled on its own after it was adapted.

    Its wrapper goes on calling what it wrapped, whatever is put inside it.
    """
    for name, placed in sites.items():
        for parent, attribute in placed.places:
            if type(parent).__name__ == "OptimizedModule" and attribute == "_orig_mod":
                raise RuntimeError(
                    f"layer {name!r} was compiled on its own after it was adapted, and would go "
                    "on calling the adapter; put what is inside (._orig_mod) in its place first, "
                    "and compile afterwards"
                )


class Guard:
    """Looks whether an attached optimizer still moves the model's own tensors.

    Args:
        adapted: what is attached.
        optimizer: to what; it is looked at before each of its steps.
    """

    def __init__(self, adapted: Any, optimizer: torch.optim.Optimizer):
        self.adapted, self.optimizer = adapted, optimizer
        held = self._held()
        self.beside = {n: id(p) for n, p in adapted.extra.items() if id(p) in held}
        for placed in adapted.sites.values():
            placed.layer.replaced = False
        self.remove = optimizer.register_step_pre_hook(self._before).remove

    def _held(self) -> set[int]:
        return {id(p) for group in self.optimizer.param_groups for p in group["params"]}

    def _before(self, *_: Any) -> None:
        self.adapted.find()
        self.check()

    def check(self) -> None:
        """Raise RuntimeError if the optimizer moves tensors that the model no longer has."""
        extra = self.adapted.extra
        stale = [n for n, known in self.beside.items() if id(extra[n]) != known]
        if any(placed.layer.replaced for placed in self.adapted.sites.values()):
            held = self._held()
            stale += [n for n, p in self.adapted.named_parameters() if id(p) not in held]
        if stale:
            raise RuntimeError(
                f"{stale[:3]} were replaced in the model after attach (by a new module, or by "
                "load_state_dict(assign=True)), so the optimizer moves tensors that the model no "
                "longer has; load without assign, or replace first and attach then"
            )


def refuse_sharded(adapted: Any, what: str) -> None:
    """Raise TypeError for trained tensors that ``fully_shard`` has spread over processes."""
    for name, value in adapted.named_parameters():
        if hasattr(value, "full_tensor"):
            raise TypeError(
                f"{what} needs {name!r} whole, but it is sharded (fully_shard); use DDP, or save, "
                "load onto a plain base and go on there"
            )
