"""Folders that Hugging Face ``peft`` wrote, loaded here: the same outputs, or a refusal by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from toolkit.core.adapt import handles
from toolkit.core.adapt.load import among, check, fill, put
from toolkit.core.adapt.model import Adapted
from toolkit.core.adapt.peft import (
    CONFIG_FILE,
    MAGNITUDE,
    MODEL_FILE,
    PREFIX,
    PeftNames,
    check_same_meaning,
)
from toolkit.core.adapt.peft_config import check_complete, methods, refuse_options
from toolkit.core.adapt.put import refuse_busy
from toolkit.core.adapt.sites import Site
from toolkit.core.declare.catalogue import catalogue


def load_peft(model: nn.Module, folder: Any) -> Adapted:
    """Put an adapter that ``peft`` (or :func:`save_peft`) wrote on a plain base model, in place.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: the file is damaged or incomplete, the kind of adapter is not in the catalogue,
            it uses an option or a start this toolkit does not have, it means another map there, it
            belongs to another architecture, or it splits a tied weight. The model is then as it
            was.
        RuntimeError: the model carries a method already.
    """
    folder = Path(folder)
    config, tensors = _read(folder)
    method_class: Any = _method_of(folder, config)
    names = method_class.peft
    refuse_options(folder, config, names)
    refuse_busy(model)
    handles.refuse_spread(model)
    handles.refuse_meta(model)
    states, beside = _group(model, folder, tensors, names)
    check_complete(model, folder, config, states, beside)
    extra, buffers = _beside(model, folder, config, beside)
    each = methods(folder, config, method_class, states)
    wanted = {among(frozenset(layers)): method for method, layers in each.items()}
    adapted = put(model, wanted, set(extra), str(folder))
    try:
        for name, placed in adapted.sites.items():
            try:
                check_same_meaning(placed, names)
            except TypeError as error:
                raise ValueError(f"{folder}: {error}") from error
            state = {
                ours: _from_peft(
                    value,
                    names.names(placed.site.kind).get(ours, ""),
                    placed.site,
                    f"{folder}: layer {name!r}: {ours}",
                )
                for ours, value in states[name].items()
            }
            fill(placed.layer.adapter, state, f"{folder}: layer {name!r}")
    except Exception:
        adapted.unload()
        raise
    with torch.no_grad():
        for name, value in adapted.extra.items():
            value.copy_(extra[name])
        handles.put_buffers(model, buffers)
    return adapted


def _method_of(folder: Path, config: dict[str, Any]) -> type:
    """The method that writes adapters of that kind; a broken one hides no other."""
    damaged: list[str] = []
    found: list[Any] = []
    for e in catalogue():
        try:
            names = getattr(e.method, "peft", None)
        except Exception as error:  # of that method's own module
            damaged.append(f"{e.module} ({type(error).__name__}: {error})")
            continue
        if names is not None and names.kind == config.get("peft_type"):
            found.append(e.method)
    if not found:
        hint = f"; these cannot be imported: {damaged}" if damaged else ""
        kind = config.get("peft_type")
        raise ValueError(f"{folder}: adapters of type {kind!r} are not in the catalogue{hint}")
    plain = min(found, key=lambda m: len(m.peft.extra))
    said = [m for m in found if all(config.get(k) == v for k, v in m.peft.extra.items())]
    return max(said, key=lambda m: len(m.peft.extra), default=plain)


def _from_peft(value: Tensor, theirs: str, site: Site, where: str) -> Tensor:
    conv = site.kind == "conv"
    ones = (1,) * (len(site.shape) - 2) if conv else ()
    if theirs == MAGNITUDE:
        right = (1, site.rows, *ones) if conv else (site.rows,)
        if tuple(value.shape) != right:
            raise ValueError(f"{where} has shape {tuple(value.shape)}, the layer needs {right}")
        return value.reshape(-1, 1)
    if not conv:
        return value
    kernel = tuple(site.shape[1:]) if "_A" in theirs else ones
    tail = value.shape[1:] if "_A" in theirs else value.shape[2:]
    if value.dim() != len(site.shape) or tuple(tail) != kernel:
        raise ValueError(f"{where} has shape {tuple(value.shape)}, the convolution {site.shape}")
    return value.flatten(1)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config_file, model_file = folder / CONFIG_FILE, folder / MODEL_FILE
    for file in (config_file, model_file):
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing; a peft folder holds adapter_config.json and "
                "adapter_model.safetensors"
            )
    try:
        config, tensors = json.loads(config_file.read_text()), load_file(model_file)
    except (SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{folder} is damaged ({error}); copy or save it again") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{folder} is damaged (adapter_config.json holds no object); save it again"
        )
    return config, tensors


def _group(
    model: nn.Module, folder: Path, tensors: dict[str, Tensor], names: PeftNames
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors of the layers' adapters, and what of the base is stored beside them."""
    states: dict[str, dict[str, Tensor]] = {}
    beside: dict[str, Tensor] = {}
    suffixes = {
        theirs: ours for form in (names.tensors, names.embedding) for ours, theirs in form.items()
    }
    modules = dict(model.named_modules())
    own = dict(handles.parameters(model, twice=True)) | dict(handles.buffers(model))
    for key, value in tensors.items():
        path = key.removeprefix(PREFIX)
        path = path if path in own else path.replace(".base_layer.", ".")  # a bias that trained
        suffix = next((s for s in suffixes if path.endswith("." + s)), None)
        if suffix is not None and path.removesuffix("." + suffix) in modules:
            states.setdefault(path.removesuffix("." + suffix), {})[suffixes[suffix]] = value
        elif path in own and own[path].shape == value.shape:
            check(value, own[path], f"{folder}: {key}", finite=isinstance(own[path], nn.Parameter))
            beside[path] = value
        elif not path.endswith("ranknum"):
            raise ValueError(f"{folder} was saved for another architecture: nothing for {key!r}")
    if not states:
        raise ValueError(f"{folder} is incomplete: it holds no adapter's tensors")
    return states, beside


def _beside(
    model: nn.Module, folder: Path, config: dict[str, Any], beside: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What trains beside the adapters, and buffers; a tied weight must be one thing there too."""
    own = dict(handles.parameters(model))
    extra = {name: value for name, value in beside.items() if name in own}
    buffers = {n: v for n, v in beside.items() if n not in dict(handles.parameters(model, True))}
    saved = config.get("modules_to_save") or []
    biases = config.get("bias", "none") != "none"
    for first, others in handles.also_called(model).items():
        tied = [name for name in (first, *others) if name in beside]
        trained = [n for n in tied if any(f".{n}".find(f".{m}.") >= 0 for m in saved)]
        same = all(torch.equal(beside[name], beside[tied[0]]) for name in tied)
        if tied and (not same or (trained and len(tied) <= len(others))):
            raise ValueError(
                f"{folder} holds {(trained or tied)[0]!r} as a tensor of its own, but here "
                f"{[first, *others]} are one tied tensor; untie them before load_peft"
            )
        if tied:
            extra[first] = beside[tied[0]]
    for name in [n for n, v in extra.items() if torch.equal(v.to(own[n]), own[n])]:
        kept = biases and "bias" in name
        if not kept and not any(f".{name}".find(f".{module}.") >= 0 for module in saved):
            del extra[name]  # stored with the adapters, but not trained
    return extra, buffers
