"""Pre-trained modules: all that methods put on a model, without its head, in a file of its own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from toolkit.core.adapt import facts as saved
from toolkit.core.adapt.files import FIRST, FORMAT
from toolkit.core.adapt.load import check
from toolkit.core.adapt.model import Adapted
from toolkit.core.io import write_beside

MODULES = "parameters-in-motion/modules/1"
BEGINNING = frozenset({"dropout"})
"""Fields that the learned numbers do not depend on; a method names others in ``beginning``."""


@dataclass(frozen=True)
class Modules:
    r"""The numbers :math:`\phi` of all modules on a model.

    Attributes:
        tensors: place -> name -> tensor, such as ``tokens`` (p, d), or ``A`` (r, n) and ``B``
            (m, r).
        methods: place -> class name and hyperparameters of the method that built the module.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    methods: Mapping[str, tuple[str, Mapping[str, Any]]]

    @classmethod
    def of(cls, adapted: Adapted) -> Modules:
        """A copy of what an adapted model holds now; the head is left out."""
        adapted.find()
        tensors = {
            place: {key: value.detach().cpu().clone() for key, value in layer.state_dict().items()}
            for place, layer in adapted.adapters.items()
        }
        methods = {
            place: (type(one.method).__name__, dataclasses.asdict(one.method))
            for place, one in adapted.sites.items()
        }
        return cls(tensors, methods)

    def save(self, path: Any) -> None:
        """Write the modules as safetensors; nothing is pickled."""
        flat = {
            f"{place}.{key}": value.contiguous()
            for place, own in self.tensors.items()
            for key, value in own.items()
        }
        facts = {place: [name, dict(given)] for place, (name, given) in self.methods.items()}
        metadata = {"format": MODULES, "methods": json.dumps(facts)}
        write_beside(path, lambda file: save_file(flat, file, metadata=metadata))

    @classmethod
    def read(cls, path: Any) -> Modules:
        """Modules from a file of :meth:`save`, or of ``adapted.save``, whose head is left out.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is neither, or damaged, or a tensor belongs to no place that it names.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no file of modules at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                flat = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is no whole safetensors file ({error})") from error
        if metadata.get("format") in (FORMAT, FIRST):
            facts, every = saved.read(path)
            flat = {k.removeprefix("adapter."): v for k, v in every.items()
                    if k.startswith("adapter.")}  # fmt: skip
            methods = {
                place: (one["class"], one["hyperparameters"])
                for one in facts["methods"]
                for place in one["sites"]
            }
        elif metadata.get("format") == MODULES:
            try:
                known = json.loads(metadata["methods"])
                methods = {
                    place: (str(name), dict(given)) for place, (name, given) in known.items()
                }
            except (KeyError, AttributeError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: its facts cannot be read ({error})") from error
        else:
            raise ValueError(
                f"{path} holds no modules (format {metadata.get('format')!r}); write one with "
                "Modules.of(adapted).save(path), or with adapted.save(path)"
            )
        return cls(_by_place(path, flat, methods), methods)


def _by_place(
    path: Path, flat: Mapping[str, Tensor], methods: Mapping[str, Any]
) -> dict[str, dict[str, Tensor]]:
    tensors: dict[str, dict[str, Tensor]] = {place: {} for place in methods}
    ends = sorted(methods, key=len, reverse=True)  # a place may lie inside another
    for key, value in flat.items():
        place = next((one for one in ends if key.startswith(f"{one}.")), None)
        if place is None:
            raise ValueError(f"{path}: tensor {key!r} belongs to no place that the file names")
        tensors[place][key.removeprefix(f"{place}.")] = value
    return tensors


@torch.no_grad()
def start_from(adapted: Adapted, source: Any, t: float = 1.0) -> Adapted:
    r"""Give the modules of a model the values of pre-trained ones.

    .. math:: \phi_0 = (1 - t)\,\phi + t\,\phi_{pre}

    with :math:`\phi` what they are now, such as their random start. At t = 1 it is an exact copy,
    at t = 0 nothing changes. Call it before ``attach``. Heads and frozen weights are not touched.

    Args:
        adapted: a model with the same methods on the same places.
        source: :class:`Modules`, or a file that :meth:`Modules.read` reads.
        t: from 0, the start as it is, to 1, the pre-trained one.

    Returns:
        The same handle.

    Raises:
        RuntimeError: an optimizer drives the methods already, or the model is merged or unloaded.
        ValueError: t outside [0, 1]; other places, methods, tensors or shapes (both are named); or
            numbers that are not finite. The model is then as it was.
    """
    if not 0 <= t <= 1:
        raise ValueError(f"t={t}: choose a share from 0 to 1")
    if adapted.state != "adapted":
        raise RuntimeError(f"the model is {adapted.state}; start before that, or adapt it again")
    if adapted.controller is not None:
        raise RuntimeError("an optimizer is attached already; call start_from before attach")
    found = source if isinstance(source, Modules) else Modules.read(source)
    own = Modules.of(adapted)
    where = "the modules" if source is found else str(source)
    _refuse_other_places(where, found, own)
    for place, values in own.tensors.items():
        _refuse_other_method(where, place, found, own, adapted.sites[place].method)
        _refuse_other_tensors(where, place, found.tensors[place], values)
    for place, layer in adapted.adapters.items():
        for key, value in layer.state_dict().items():
            value.copy_(_between(value, found.tensors[place][key].to(value.device), t))
    return adapted


def _between(own: Tensor, other: Tensor, t: float) -> Tensor:
    if t in (0, 1) or not own.is_floating_point():
        return other if t else own
    return (1 - t) * own + t * other.to(own.dtype)


def _refuse_other_places(where: str, found: Modules, own: Modules) -> None:
    there, here = list(found.tensors), list(own.tensors)
    if set(there) != set(here):
        lacking = sorted(set(here) - set(there))[:3]
        foreign = sorted(set(there) - set(here))[:3]
        raise ValueError(
            f"{where}: modules on L = {len(there)} places, the model has them on L = {len(here)}"
            + (f"; not in the file: {', '.join(lacking)}" if lacking else "")
            + (f"; not on the model: {', '.join(foreign)}" if foreign else "")
            + ". Adapt the same targets"
        )


def _refuse_other_method(where: str, place: str, found: Modules, own: Modules, method: Any) -> None:
    (name, given), (ours, here) = found.methods[place], own.methods[place]
    shapes = f"{_shapes(found.tensors[place])} there, {_shapes(own.tensors[place])} here"
    if name != ours:
        raise ValueError(f"{where}: {name} at {place!r}, the model has {ours} ({shapes})")
    left = BEGINNING | getattr(method, "beginning", frozenset())
    for key in sorted(given.keys() | here.keys()):
        if key not in left and given.get(key) != here.get(key):
            raise ValueError(
                f"{where}: {name}({key}={given.get(key)!r}) at {place!r}, the model has "
                f"{key}={here.get(key)!r} ({shapes}); adapt with the same hyperparameters"
            )


def _refuse_other_tensors(
    where: str, place: str, there: Mapping[str, Tensor], here: Mapping[str, Tensor]
) -> None:
    if there.keys() != here.keys():
        raise ValueError(
            f"{where}: tensors {sorted(there)} at {place!r}, the model has {sorted(here)}"
        )
    for key, value in there.items():
        if value.shape != here[key].shape:
            raise ValueError(
                f"{where}: {key} of shape {tuple(value.shape)} at {place!r}, the model's has "
                f"{tuple(here[key].shape)}"
            )
        check(value, here[key], f"{where}: {place}.{key}")


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{key} {tuple(value.shape)}" for key, value in tensors.items())
