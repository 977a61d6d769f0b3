"""What ``adapter_config.json`` of a peft folder says: read strictly, held against the tensors."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from toolkit.core.adapt import handles
from toolkit.core.adapt.peft import PeftNames
from toolkit.core.adapt.peft_patterns import by_pattern
from toolkit.core.adapt.sites import kind_of
from toolkit.core.declare.fields import hyperparameters as declared

HARMLESS = frozenset(
    (
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "init_r",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_r",
        "task_type",
        "total_step",
        "use_rslora",
    )
)
"""Options that are read elsewhere, or that change no output of a loaded adapter. Any other one that
is set changes the map, or is not known, and is refused."""
SWITCHES = ("fan_in_fan_out", "inference_mode", "use_rslora")
BIASES = ("none", "all", "lora_only")
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Starts that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ, MiCA)
subtract something from the base or quantise it, which the folder does not hold."""


def refuse_options(folder: Path, config: Mapping[str, Any], names: PeftNames) -> None:
    """Raise ValueError for an option that changes the map and that would be dropped."""
    own = {"orth_reg_weight", "tinit", "tfinal", "deltaT", "beta1", "beta2", *names.extra}
    used = [name for name, value in config.items() if value and name not in HARMLESS | own]
    if config.get("alpha_pattern") and names.kind != "LORA":
        used.append("alpha_pattern")
    if used:
        raise ValueError(f"{folder} uses {used}, which this toolkit lacks; nothing was loaded")
    for name in SWITCHES:  # where any text, also "false", would pass for true
        if name not in names.fields and not isinstance(config.get(name), bool | None):
            raise ValueError(f"{folder}: {name}={config[name]!r} is neither true nor false")
    if config.get("bias", "none") not in BIASES:
        raise ValueError(f"{folder}: bias={config['bias']!r} is none of {', '.join(BIASES)}")
    start = config.get("init_lora_weights")
    known = start.lower() if isinstance(start, str) else start
    if not (known is None or isinstance(known, bool | str)) or known not in STARTS:
        raise ValueError(
            f"{folder}: init_lora_weights={start!r} changed the base when training began, and the "
            "folder does not hold by what; save it in peft as plain LoRA "
            "(path_initial_model_for_weight_conversion), or merge it there"
        )


def methods(
    folder: Path, config: Mapping[str, Any], method_class: Any, layers: Iterable[str]
) -> dict[Any, list[str]]:
    """Each method that the configuration asks for -> the layers that it is for.

    Raises:
        ValueError: a pattern is none, or see :func:`hyperparameters`.
    """
    found: dict[Any, list[str]] = {}
    for name in layers:
        found.setdefault(_method_of_layer(folder, config, method_class, name), []).append(name)
    if config.get("lora_dropout") and "lora_dropout" not in method_class.peft.fields:
        warnings.warn(
            f"{folder}: {method_class.info.title} has no dropout here, so training would go on "
            f"without lora_dropout={config['lora_dropout']}; outputs in eval() are the same",
            stacklevel=4,
        )
    return found


def _method_of_layer(folder: Path, config: Mapping[str, Any], method_class: Any, name: str) -> Any:
    given = dict(config)
    if method_class.peft.kind == "LORA":
        for field, theirs in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            value = by_pattern(f"{folder}: {field}", config.get(field) or {}, name)
            if value is not None:
                given[theirs] = value
    method = hyperparameters(folder, given, method_class)
    if config.get("use_rslora") is True and "use_rslora" not in method_class.peft.fields:
        method = dataclasses.replace(method, alpha=method.alpha * math.sqrt(method.rank))
    return method


def hyperparameters(folder: Path, config: Mapping[str, Any], method_class: Any) -> Any:
    """The method with the values of a configuration, whose types must be right as they stand.

    Raises:
        ValueError: one that decides the map is missing, or of a wrong type or range.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(method_class)}
    types = {h.name: h.type for h in declared(method_class)}
    given: dict[str, Any] = {}
    for theirs, ours in method_class.peft.fields.items():
        value = config.get(theirs)
        if value is not None:
            whole = type(value) is int and types[ours] is float
            given[ours] = float(value) if whole and abs(value) < 2**53 else value
        elif defaults[ours]:
            raise ValueError(
                f"{folder}: adapter_config.json lacks {theirs!r}, and peft's default is not the "
                "one here; write the value that was trained with"
            )
    try:
        return method_class(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: adapter_config.json does not fit: {error}") from error


def check_complete(
    model: nn.Module,
    folder: Path,
    config: Mapping[str, Any],
    states: Collection[str],
    beside: Collection[str],
) -> None:
    """Raise ValueError where the configuration names other layers than there are tensors for."""
    saved = config.get("modules_to_save") or []
    if not _strings(saved):
        raise ValueError(f"{folder}: modules_to_save={saved!r} is no list of names")
    for name, _ in handles.parameters(model, twice=True):
        if any(_ends(name.rpartition(".")[0], m) for m in saved) and name not in beside:
            raise ValueError(
                f"{folder} is incomplete: modules_to_save={saved} names {name!r}, and it holds no "
                "such tensor"
            )
    _check_biases(model, folder, config, states, beside)
    excluded = config.get("exclude_modules") or []
    if not isinstance(excluded, str) and not _strings(excluded):
        raise ValueError(f"{folder}: exclude_modules={excluded!r} is no list of names")
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return
    if not isinstance(targets, str) and not _strings(targets):
        raise ValueError(f"{folder}: target_modules={targets!r} is no list of names")
    for name, module in model.named_modules():
        try:
            named = _named(name, targets)
            out = _named(name, excluded)
        except re.error as error:
            raise ValueError(
                f"{folder}: target_modules={targets!r}, exclude_modules={excluded!r}: {error}"
            ) from error
        if name in states and (out or not named):
            why = "exclude_modules names" if out else "target_modules does not name"
            raise ValueError(
                f"{folder} holds an adapter of layer {name!r}, which {why}, so peft would leave it "
                "out; correct adapter_config.json"
            )
        narrowed = any(config.get(k) for k in ("layers_to_transform", "exclude_modules"))
        kept = any(_ends(name, m) for m in saved)
        if named and name not in states and kind_of(module) and not narrowed and not kept:
            raise ValueError(
                f"{folder} is incomplete: target_modules names layer {name!r}, and it holds no "
                "tensors for it"
            )


def _check_biases(
    model: nn.Module,
    folder: Path,
    config: Mapping[str, Any],
    states: Collection[str],
    beside: Collection[str],
) -> None:
    """Raise ValueError where biases are said to be trained that the folder does not hold."""
    kind = config.get("bias", "none")
    for name, _ in handles.parameters(model):
        layer, _, leaf = name.rpartition(".")
        trained = "bias" in name if kind == "all" else leaf == "bias" and layer in states
        if kind != "none" and trained and name not in beside:
            raise ValueError(
                f"{folder} is incomplete: bias={kind!r} trains {name!r}, and it holds no such "
                "tensor"
            )


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _ends(name: str, module: str) -> bool:
    """Whether a name is that module's, or of a part of it, as peft matches."""
    return f".{name}.".find(f".{module}.") >= 0


def _named(name: str, targets: str | list[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == t or name.endswith(f".{t}") for t in targets)
