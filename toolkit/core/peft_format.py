"""The folder format of Hugging Face ``peft``: write adapters it loads, load adapters it wrote.

The format is read and written here, so ``peft`` itself need not be installed.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from toolkit.core.adapted import Adapted, Site

PREFIX = "base_model.model."


@dataclass(frozen=True)
class PeftNames:
    """How a method's tensors and hyperparameters are called in ``peft``.

    Args:
        kind: value of ``peft_type``.
        tensors: our tensor name -> suffix of theirs.
        embedding: the same for embedding layers, where the names differ.
        fields: their configuration field -> our hyperparameter.
        extra: fixed configuration fields that their loader needs.
        kinds: layer kinds whose stored form means the same there.
        ranks: our tensor with one row per kept rank, where layers may have fewer than the method's
            ``rank``; they are then declared in ``rank_pattern``.
    """

    kind: str
    tensors: Mapping[str, str]
    fields: Mapping[str, str]
    kinds: tuple[str, ...]
    embedding: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    ranks: str = ""

    def names(self, kind: str) -> Mapping[str, str]:
        return self.embedding if kind == "embedding" else self.tensors


def save_peft(adapted: Adapted, folder: Any) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` for ``peft.PeftModel``.

    Args:
        adapted: a model with a method that ``peft`` knows.
        folder: made if missing; each file is moved into place when complete.

    Raises:
        TypeError: ``peft`` does not have the method, or stores a layer kind differently.
    """
    names = getattr(adapted.method, "peft", None)
    if names is None:
        raise TypeError(f"{adapted.method.info.title} has no counterpart in Hugging Face peft")
    for site in adapted.sites.values():
        _check_same_meaning(site, names)
    tensors: dict[str, Tensor] = {}
    for name, site in adapted.sites.items():
        own = site.layer.adapter.state_dict()
        for ours, theirs in names.names(site.spec.kind).items():
            tensors[f"{PREFIX}{name}.{theirs}"] = _to_peft(own[ours], ours, site)
    whole = _whole_modules(adapted)
    for name, value in adapted.extra.items():
        tensors[f"{PREFIX}{name}"] = value.detach()

    method = adapted.method
    config = {
        "peft_type": names.kind,
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": getattr(
            getattr(adapted.model, "config", None), "_name_or_path", None
        ),
        "bias": "none",
        "target_modules": _target_modules(adapted),
        "modules_to_save": whole or None,
        "fan_in_fan_out": any(s.spec.kind == "hf_conv1d" for s in adapted.sites.values()),
        **names.extra,
        **{theirs: getattr(method, ours) for theirs, ours in names.fields.items()},
        **_rank_pattern(adapted, names),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        model_file = Path(beside) / "adapter_model.safetensors"
        packed = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
        save_file(packed, model_file, metadata={"format": "pt"})
        config_file = Path(beside) / "adapter_config.json"
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True))
        for file in (model_file, config_file):
            os.replace(file, folder / file.name)


def _method_of(folder: Path, kind: Any) -> type:
    """The first method that writes adapters of that kind; a broken one hides no other."""
    from toolkit.core.catalogue import catalogue

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


def load_peft(model: nn.Module, folder: Any) -> Adapted:
    """Put an adapter that ``peft`` (or :func:`save_peft`) wrote on a plain base model, in place.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: the file is damaged, the kind of adapter is not in the catalogue, it uses an
            option this toolkit does not have, or it belongs to another architecture. The model is
            then as it was.
    """
    from toolkit.core.adapted import adapt
    from toolkit.core.files import fill

    folder = Path(folder)
    config, tensors = _read(folder)
    kind = config.get("peft_type")
    method_class = _method_of(folder, kind)
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
        for name, site in adapted.sites.items():
            state = {ours: _from_peft(states[name][ours], ours, site) for ours in states[name]}
            fill(site.layer.adapter, state, f"{folder}: layer {name!r}")
        with torch.no_grad():
            for name, value in adapted.extra.items():
                value.copy_(extra[name])
    except Exception:
        adapted.unload()
        raise
    return adapted


def _target_modules(adapted: Adapted) -> list[str] | str:
    """The layers' names; as a regular expression where a name is also the end of another's."""
    names = sorted(adapted.sites)
    ends = tuple(f".{name}" for name in names)
    others = (name for name, _ in adapted.model.named_modules() if name not in adapted.sites)
    if any(other.endswith(ends) for other in others):
        return "|".join(re.escape(name) for name in names)
    return names


def _rank_pattern(adapted: Adapted, names: PeftNames) -> dict[str, Any]:
    """Which of the initial ranks each layer kept, for layers that were made smaller."""
    if not names.ranks:
        return {}
    pattern = {}
    for name, site in adapted.sites.items():
        kept = getattr(site.layer.adapter, names.ranks).shape[0]
        if kept < adapted.method.rank:
            stored = names.names(site.spec.kind)[names.ranks]
            pattern[f"{name}.{stored}"] = [i < kept for i in range(adapted.method.rank)]
    return {"rank_pattern": pattern or None}


def _check_same_meaning(site: Site, names: PeftNames) -> None:
    spec, base = site.spec, site.layer.base
    if spec.kind not in names.kinds:
        raise TypeError(
            f"layer {spec.name!r}: peft stores {spec.kind} layers of this method in another form; "
            "leave it out of targets to export"
        )
    dilated = spec.kind == "conv" and any(d != 1 for d in base.dilation)
    if spec.groups > 1 or dilated:
        raise TypeError(
            f"layer {spec.name!r}: peft's branch for grouped or dilated convolutions is another "
            "map; leave it out of targets to export"
        )


def _to_peft(value: Tensor, ours: str, site: Site) -> Tensor:
    spec = site.spec
    if spec.kind != "conv":
        return value
    ones = [1] * (len(spec.shape) - 2)
    return value.view(-1, *spec.shape[1:]) if ours == "A" else value.view(*value.shape, *ones)


def _from_peft(value: Tensor, ours: str, site: Site) -> Tensor:
    return value.flatten(1) if site.spec.kind == "conv" else value


def _whole_modules(adapted: Adapted) -> list[str]:
    """Modules whose every parameter is trained beside; peft knows only whole modules."""
    modules = sorted({name.rpartition(".")[0] for name in adapted.extra})
    for module in modules:
        own = {f"{module}.{k}" for k, _ in adapted.model.get_submodule(module).named_parameters()}
        if not module or not own <= set(adapted.extra):
            raise TypeError(
                f"peft saves whole modules only, but train covers a part of {module or 'the model'}"
                "; name the module in train"
            )
    return modules


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
