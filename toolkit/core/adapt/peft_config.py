"""What ``adapter_config.json`` of a peft folder says: read strictly, held against the tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from toolkit.core.adapt import handles
from toolkit.core.adapt.sites import kind_of
from toolkit.core.declare.fields import hyperparameters as declared

HARMLESS = frozenset(
    (
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
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Starts that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ, MiCA)
subtract something from the base or quantise it, which the folder does not hold."""


def refuse_options(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that changes the map and that would be dropped."""
    own = {"orth_reg_weight", "tinit", "tfinal", "deltaT", "beta1", "beta2"}
    used = [name for name, value in config.items() if value and name not in HARMLESS | own]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if config.get("rank_pattern") and config.get("peft_type") == "LORA":
        used.append("rank_pattern")
    if used:
        raise ValueError(f"{folder} uses {used}, which this toolkit lacks; nothing was loaded")
    start = config.get("init_lora_weights")
    known = start.lower() if isinstance(start, str) else start
    if not (known is None or isinstance(known, bool | str)) or known not in STARTS:
        raise ValueError(
            f"{folder}: init_lora_weights={start!r} changed the base when training began, and the "
            "folder does not hold by what; save it in peft as plain LoRA "
            "(path_initial_model_for_weight_conversion), or merge it there"
        )


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
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return
    if not isinstance(targets, str) and not _strings(targets):
        raise ValueError(f"{folder}: target_modules={targets!r} is no list of names")
    for name, module in model.named_modules():
        try:
            named = _named(name, targets)
        except re.error as error:
            raise ValueError(f"{folder}: target_modules={targets!r}: {error}") from error
        if name in states and not named:
            raise ValueError(
                f"{folder} holds an adapter of layer {name!r}, which target_modules does not name, "
                "so peft would leave it out; correct adapter_config.json"
            )
        narrowed = any(config.get(k) for k in ("layers_to_transform", "exclude_modules"))
        kept = any(_ends(name, m) for m in saved)
        if named and name not in states and kind_of(module) and not narrowed and not kept:
            raise ValueError(
                f"{folder} is incomplete: target_modules names layer {name!r}, and it holds no "
                "tensors for it"
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
