"""Adapters on disk: one safetensors file that says what it is, and never a pickle."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from toolkit.core.adapted import Adapted, adapt, refuse_busy
from toolkit.core.catalogue import entry
from toolkit.core.layers import kind_of

if TYPE_CHECKING:
    from collections.abc import Callable

FORMAT = "parameters-in-motion/1"


def write_beside(path: Path, write: Callable[[str], None]) -> None:
    """Let ``write`` fill a temporary file in the same folder, then move it into place.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder {path.parent} does not exist; create it, then save again")
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(beside)
        # mkstemp makes private files; a saved adapter gets the usual permissions
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(beside, 0o666 & ~mask)
        os.replace(beside, path)
    finally:
        Path(beside).unlink(missing_ok=True)


def save(adapted: Adapted, path: Any, resume: bool = False) -> None:
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
            tensors[f"adapter.{name}.{key}"] = value
    for name, value in adapted.extra.items():
        tensors[f"train.{name}"] = value.detach()
    if resume:
        if adapted.controller is None:
            raise RuntimeError("resume=True needs a schedule: call attach(optimizer, ...) first")
        for key, value in adapted.controller.state().items():
            tensors[f"schedule.{key}"] = value
    facts = {
        "method": adapted.method.info.slug,
        "hyperparameters": dataclasses.asdict(adapted.method),
        "train": list(adapted.extra),
        "layers": {
            name: {"kind": s.spec.kind, "shape": list(s.spec.shape), "parameter": s.spec.parameter}
            for name, s in adapted.sites.items()
        },
    }
    metadata = {"format": FORMAT, "facts": json.dumps(facts)}
    packed = {key: value.contiguous() for key, value in tensors.items()}
    write_beside(path, lambda file: save_file(packed, file, metadata=metadata))


def load(model: nn.Module, path: Any) -> Adapted:
    """Put saved adapters on a fresh base model, in place.

    Args:
        model: the base the adapters were trained on, plain.
        path: a file written by :meth:`toolkit.Adapted.save`.

    Returns:
        The adapted model. A schedule saved with ``resume=True`` goes on at the next ``attach``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no adapter of this project, is damaged, or belongs to another
            architecture. The model is then as it was.
        RuntimeError: the model carries a method already.
    """
    path = Path(path)
    facts, tensors = _read(path)
    refuse_busy(model)
    _check_fits(model, path, facts, tensors)
    try:
        method = entry(facts["method"]).method(**facts["hyperparameters"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds a method that this version does not have ({error}); load it with the "
            "version that wrote it"
        ) from error
    names = list(facts["layers"])
    states: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for key, value in tensors.items():
        if key.startswith("adapter."):
            name, _, leaf = key.removeprefix("adapter.").rpartition(".")
            if name not in states:
                raise ValueError(f"{path}: tensor {key!r} belongs to no adapted layer of the file")
            states[name][leaf] = value

    beside = set(facts["train"])
    adapted = adapt(model, method, lambda name, _: name in states, train=beside.__contains__)
    try:
        for name, adapter in adapted.adapters.items():
            fill(adapter, states[name], f"{path}: layer {name!r}")
        with torch.no_grad():
            for name, value in adapted.extra.items():
                value.copy_(tensors[f"train.{name}"])
    except Exception:
        adapted.unload()
        raise
    adapted.resume = {
        key.removeprefix("schedule."): value
        for key, value in tensors.items()
        if key.startswith("schedule.")
    }
    return adapted


@torch.no_grad()
def fill(adapter: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Copy tensors into an adapter, or raise ValueError naming the first that does not fit."""
    accept = getattr(adapter, "resize", None)
    if accept is not None:
        accept(state)
    own = adapter.state_dict()
    if own.keys() != state.keys():
        raise ValueError(
            f"{where}: holds tensors {sorted(state)}, the method needs {sorted(own)}; "
            "was the file written by another method or version?"
        )
    for key, value in state.items():
        if own[key].shape != value.shape:
            raise ValueError(
                f"{where}: {key} has shape {tuple(value.shape)}, the layer needs "
                f"{tuple(own[key].shape)}"
            )
    for key, value in state.items():
        own[key].copy_(value)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); copy or save it again"
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is no adapter of this toolkit (format {metadata.get('format')!r}, expected "
            f"{FORMAT!r}); folders written by Hugging Face peft load with toolkit.load_peft"
        )
    try:
        facts = json.loads(metadata["facts"])
        missing = {"method", "hyperparameters", "train", "layers"} - facts.keys()
    except (KeyError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: its facts cannot be read ({error}); save it again") from error
    if missing:
        raise ValueError(f"{path}: its facts lack {sorted(missing)}; save it again")
    return facts, tensors


def _check_fits(
    model: nn.Module, path: Path, facts: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    modules = dict(model.named_modules())
    wrong = []
    for name, layer in facts["layers"].items():
        if name not in modules:
            wrong.append(f"no layer {name!r}")
            continue
        weight = getattr(modules[name], layer["parameter"], None)
        shape = None if weight is None else tuple(weight.shape)
        if shape != tuple(layer["shape"]):
            wrong.append(f"{name!r} has shape {shape}, the file {tuple(layer['shape'])}")
        elif kind_of(modules[name]) != layer["kind"]:
            wrong.append(f"{name!r} is of kind {kind_of(modules[name])}, not {layer['kind']}")
    own = dict(model.named_parameters())
    for name in facts["train"]:
        saved = tensors.get(f"train.{name}")
        if name not in own:
            wrong.append(f"no parameter {name!r}")
        elif saved is None or saved.shape != own[name].shape:
            shape = None if saved is None else tuple(saved.shape)
            wrong.append(f"{name!r} has shape {tuple(own[name].shape)}, the file {shape}")
    if wrong:
        raise ValueError(
            f"{path} was saved for another architecture: {'; '.join(wrong[:3])}"
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}"
        )
