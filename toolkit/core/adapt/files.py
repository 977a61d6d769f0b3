"""Adapters on disk: one safetensors file that says what it is, and never a pickle."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from toolkit.core.adapt.checkpoint import whole
from toolkit.core.adapt.handles import also_called
from toolkit.core.adapt.layer import AdaptedLayer
from toolkit.core.io import write_beside

FORMAT = "parameters-in-motion/2"
FIRST = "parameters-in-motion/1"
"""The format that holds one method; it is still read."""


def save(adapted: Any, path: Any, resume: bool = False) -> None:
    """Write what one task adds to its base: adapter tensors, ``train`` parameters and facts.

    Args:
        adapted: a model with a method on it, not merged.
        path: file to write.
        resume: also keep the state of the schedule, to go on training later.

    Raises:
        RuntimeError: ``resume`` was asked for but nothing is attached.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    for name, adapter in adapted.adapters.items():
        for key, value in adapter.state_dict().items():
            tensors[f"adapter.{name}.{key}"] = whole(value)
    for name, value in adapted.extra.items():
        tensors[f"train.{name}"] = whole(value)
    if resume:
        if adapted.controller is None:
            raise RuntimeError("resume=True needs a schedule: call attach(optimizer, ...) first")
        for i, method in enumerate(adapted.methods):
            schedule = adapted.schedule(method)
            for key, value in (schedule.controller.state() if schedule else {}).items():
                tensors[f"schedule.{i}.{key}"] = value
    for name, value in adapted.changed_buffers().items():
        tensors[f"buffer.{name}"] = value
    facts = {
        "methods": [
            {
                "slug": method.info.slug,
                "class": type(method).__name__,
                "hyperparameters": dataclasses.asdict(method),
                "sites": list(adapted.share(method).sites),
            }
            for method in adapted.methods
        ],
        "train": list(adapted.extra),
        "moved": adapted.moved(),
        "tied": {n: list(o) for n, o in also_called(adapted.model).items() if n in adapted.extra},
        "layers": {
            name: {"kind": s.site.kind, "shape": list(s.site.shape), "parameter": s.site.parameter}
            | origin(s.layer)
            for name, s in adapted.sites.items()
        },
    }
    metadata = {"format": FORMAT, "facts": json.dumps(facts)}
    packed = _apart({key: value.contiguous() for key, value in tensors.items()})
    write_beside(path, lambda file: save_file(packed, file, metadata=metadata))


def origin(layer: AdaptedLayer) -> dict[str, str]:
    """What tells the base of a layer whose entries a file replaces: their dtype and hash."""
    find = getattr(layer.adapter, "origin", None)
    weight = None if find is None else layer.base._parameters.get(layer.adapter.site.parameter)
    # offloaded, sharded and parametrised weights hold no plain numbers to compare
    plain = weight is not None and not weight.is_meta and not hasattr(weight, "full_tensor")
    found = find(layer.base) if find is not None and plain else ""
    if not found or weight is None:
        return {}
    return {"dtype": str(weight.dtype).removeprefix("torch."), "base": found}


def refuse_other(layer: AdaptedLayer, facts: Mapping[str, Any], where: str) -> None:
    """Raise ValueError where the entries of a file are not those of this base.

    Older files do not name their base, and one in another precision cannot be compared.
    """
    found = origin(layer)
    if not found or found["dtype"] != facts.get("dtype", ""):
        return
    if found["base"] != facts.get("base"):
        raise ValueError(
            f"{where} was trained on another base: the hash of the entries that it moves is "
            f"{found['base']} here and was {facts.get('base')} there; load it onto the weights "
            "that it was trained on"
        )


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without shared memory, which the format does not hold."""
    seen: set[int] = set()
    found = {}
    for key, value in tensors.items():
        memory = value.untyped_storage().data_ptr()
        found[key] = value.clone() if memory in seen else value
        seen.add(memory)
    return found
