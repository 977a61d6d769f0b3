"""Adapters from disk onto a fresh base model: our files, and folders of Hugging Face ``peft``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from toolkit.core.adapt import handles
from toolkit.core.adapt.files import FIRST, FORMAT
from toolkit.core.adapt.layer import Placed
from toolkit.core.adapt.model import Adapted
from toolkit.core.adapt.peft import PREFIX, PeftNames
from toolkit.core.adapt.put import adapt, is_train, refuse_busy
from toolkit.core.adapt.sites import fits, kind_of
from toolkit.core.declare.catalogue import catalogue, entry, find_class


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
    wanted = _methods(path, facts)
    states: dict[str, dict[str, Tensor]] = {name: {} for name in facts["layers"]}
    ends = sorted(states, key=len, reverse=True)  # a site may lie inside another
    for key, value in tensors.items():
        if key.startswith("adapter."):
            path_in_model = key.removeprefix("adapter.")
            name = next((n for n in ends if path_in_model.startswith(f"{n}.")), None)
            if name is None:
                raise ValueError(f"{path}: tensor {key!r} belongs to no adapted layer of the file")
            states[name][path_in_model.removeprefix(f"{name}.")] = value
    beside = set(facts["train"]) - set(facts["moved"])
    adapted = adapt(model, wanted, train=beside.__contains__)
    try:
        for name, adapter in adapted.adapters.items():
            fill(adapter, states[name], f"{path}: layer {name!r}")
        buffers = dict(handles.buffers(model))
        with torch.no_grad():
            for name, value in adapted.extra.items():
                value.copy_(tensors[f"train.{name}"])
            for key, value in tensors.items():
                if key.startswith("buffer."):
                    buffers[key.removeprefix("buffer.")].copy_(value)
    except Exception:
        adapted.unload()
        raise
    for i, method in enumerate(adapted.methods):
        schedule, start = adapted.schedule(method), f"schedule.{i}."
        if schedule is not None:
            schedule.waiting = {
                k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)
            }
    adapted.calm()
    return adapted


def _methods(path: Path, facts: dict[str, Any]) -> dict[Any, Any]:
    """Which sites of the file each of its methods acts on, as :func:`adapt` takes it."""
    wanted: dict[Any, Any] = {}
    for one in facts["methods"]:
        try:
            cls, sites = entry(one["slug"]).method, frozenset(one["sites"])
            if one["class"] != cls.__name__:
                cls = find_class(one["class"]) or cls
            method = cls(**one["hyperparameters"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} holds a method that this version does not have ({error}); load it with "
                "the version that wrote it"
            ) from error
        if is_train(method):
            wanted[frozenset(facts["moved"]).__contains__] = method
        else:
            wanted[_among(sites)] = method
    return wanted


def _among(names: frozenset[str]) -> Callable[[str, nn.Module], bool]:
    return lambda name, _: name in names


def load_peft(model: nn.Module, folder: Any) -> Adapted:
    """Put an adapter that ``peft`` (or :func:`save_peft`) wrote on a plain base model, in place.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: the file is damaged, the kind of adapter is not in the catalogue, it uses an
            option this toolkit does not have, or it belongs to another architecture. The model is
            then as it was.
    """
    folder = Path(folder)
    config, tensors = _read_peft(folder)
    kind = config.get("peft_type")
    method_class: Any = _method_of(folder, kind)
    names = method_class.peft
    _refuse_options(folder, config)
    method = method_class(
        **{
            ours: type(getattr(method_class, ours))(config[theirs])
            for theirs, ours in names.fields.items()
            if config.get(theirs) is not None
        }
    )
    states, extra = _group(model, folder, tensors, names)
    adapted = adapt(model, method, lambda name, _: name in states, train=extra.__contains__)
    try:
        for name, placed in adapted.sites.items():
            state = {ours: _from_peft(states[name][ours], ours, placed) for ours in states[name]}
            fill(placed.layer.adapter, state, f"{folder}: layer {name!r}")
        with torch.no_grad():
            for name, value in adapted.extra.items():
                value.copy_(extra[name])
    except Exception:
        adapted.unload()
        raise
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
    if metadata.get("format") not in (FORMAT, FIRST):
        raise ValueError(
            f"{path} is no adapter of this toolkit (format {metadata.get('format')!r}, expected "
            f"{FORMAT!r}); folders written by Hugging Face peft load with toolkit.load_peft"
        )
    try:
        facts = json.loads(metadata["facts"])
        if metadata["format"] == FIRST:
            facts, tensors = _of_the_first_format(facts, tensors)
        missing = {"methods", "train", "moved", "layers"} - facts.keys()
    except (KeyError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: its facts cannot be read ({error}); save it again") from error
    if missing:
        raise ValueError(f"{path}: its facts lack {sorted(missing)}; save it again")
    return facts, tensors


def _of_the_first_format(
    facts: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A file of the first format, which held one method, as one of today's."""
    new: dict[str, Any] = {k: facts[k] for k in ("train", "layers") if k in facts}
    new["moved"] = []
    if {"method", "hyperparameters", "layers"} <= facts.keys():
        slug = facts["method"]
        found = next((e.class_name for e in catalogue() if e.slug == slug), slug)
        name, values = _renamed(found, dict(facts["hyperparameters"]))
        sites = list(facts["layers"])
        one = {"slug": slug, "class": name, "hyperparameters": values, "sites": sites}
        new["methods"] = [one]
    start = "schedule."
    return new, {
        f"{start}0.{k.removeprefix(start)}" if k.startswith(start) else k: v
        for k, v in tensors.items()
    }


def _renamed(name: str, values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Class and hyperparameters of the first format under the names they have now."""
    if name == "AdaLoRA" and values.pop("squared", False):
        values["like"] = "paper"
    elif name == "LoRAPro" and values.pop("official_clock", False):
        values["like"] = "code"
    elif name == "IncreLoRA" and "normalise" in values:
        paper = values.pop("normalise") == "mean"
        squared, blocks = values.pop("squared"), values.pop("block_orthogonality")
        if paper != squared or (paper and blocks):
            raise ValueError("its score follows one source and its penalty another")
        values["like"] = "paper" if paper else "library" if blocks else "code"
    elif name == "LoRAGGPO" and values.get("variant", "").startswith("mgpo"):
        kept = ("rank", "alpha", "dropout", "rank_stabilised", "rho", "smoothing", "sign")
        like = "code" if values["variant"] == "mgpo_code" else "paper"
        keep_noise = {"keep_noise": values["keep_noise"]}
        return "LoRAMGPO", {k: values[k] for k in kept} | {"like": like} | keep_noise
    elif name == "LoRAGGPO":
        for gone in ("rho", "smoothing", "sign"):
            values.pop(gone, None)
    return name, values


def _check_fits(
    model: nn.Module, path: Path, facts: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    modules = dict(model.named_modules())
    wrong = []
    for name, layer in facts["layers"].items():
        if name not in modules:
            wrong.append(f"no layer {name!r}")
            continue
        module, kind = modules[name], layer["kind"]
        weight = module._parameters.get(layer["parameter"])
        shape = () if weight is None else tuple(weight.shape)
        if shape != tuple(layer["shape"]):
            wrong.append(f"{name!r} has shape {shape}, the file {tuple(layer['shape'])}")
        elif not fits(module, (kind,)):
            wrong.append(f"{name!r} is of kind {kind_of(module)}, not {kind}")
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


def _method_of(folder: Path, kind: Any) -> type:
    """The first method that writes adapters of that kind; a broken one hides no other."""
    damaged = []
    for e in catalogue():
        try:
            names = getattr(e.method, "peft", None)
        except Exception as error:  # of that method's own module
            damaged.append(f"{e.module} ({type(error).__name__}: {error})")
            continue
        if names is not None and names.kind == kind:
            return e.method
    hint = f"; these cannot be imported: {damaged}" if damaged else ""
    raise ValueError(f"{folder}: adapters of type {kind!r} are not in the catalogue{hint}")


def _from_peft(value: Tensor, ours: str, placed: Placed) -> Tensor:
    return value.flatten(1) if placed.site.kind == "conv" else value


def _read_peft(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config_file, model_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for file in (config_file, model_file):
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing; a peft folder holds adapter_config.json and "
                "adapter_model.safetensors"
            )
    try:
        return json.loads(config_file.read_text()), load_file(model_file)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} is damaged ({error}); copy or save it again") from error


def _refuse_options(folder: Path, config: dict[str, Any]) -> None:
    """An option that changes the map and that we would drop must not be dropped in silence."""
    changing = (
        "use_dora",
        "alpha_pattern",
        "layer_replication",
        "lora_bias",
        "trainable_token_indices",
        "target_parameters",
        "exclude_modules",
        "alora_invocation_tokens",
    )
    used = [option for option in changing if config.get(option)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if config.get("rank_pattern") and config.get("peft_type") == "LORA":
        used.append("rank_pattern")
    if used:
        raise ValueError(f"{folder} uses {used}, which this toolkit lacks; nothing was loaded")


def _group(
    model: nn.Module, folder: Path, tensors: dict[str, Tensor], names: PeftNames
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    states: dict[str, dict[str, Tensor]] = {}
    extra: dict[str, Tensor] = {}
    suffixes = {
        theirs: ours for form in (names.tensors, names.embedding) for ours, theirs in form.items()
    }
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for key, value in tensors.items():
        path = key.removeprefix(PREFIX)
        suffix = next((s for s in suffixes if path.endswith("." + s)), None)
        if suffix is not None and path.removesuffix("." + suffix) in modules:
            states.setdefault(path.removesuffix("." + suffix), {})[suffixes[suffix]] = value
        elif path in parameters and parameters[path].shape == value.shape:
            extra[path] = value
        elif not path.endswith("ranknum"):
            raise ValueError(f"{folder} was saved for another architecture: nothing for {key!r}")
    return states, extra
