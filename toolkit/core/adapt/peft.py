"""The folder format of Hugging Face ``peft``: write adapters it loads, load adapters it wrote.

The format is read and written here, so ``peft`` itself need not be installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from toolkit.core.adapt import peft_patterns
from toolkit.core.adapt.checkpoint import whole
from toolkit.core.adapt.forwards import has_own_forward
from toolkit.core.adapt.handles import also_called
from toolkit.core.io import write_together

PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
"""Their name of a tensor with one number per output."""
CONFIG_FILE, MODEL_FILE = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class PeftNames:
    """How a method's tensors and hyperparameters are called in ``peft``.

    Args:
        kind: value of ``peft_type``.
        tensors: our tensor name -> suffix of theirs.
        embedding: the same for embedding layers, where the names differ.
        fields: their configuration field -> our hyperparameter.
        extra: fixed configuration fields that their loader needs, or that tell methods of one
            ``peft_type`` apart.
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


def save_peft(adapted: Any, folder: Any) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` for ``peft.PeftModel``.

    Args:
        adapted: a model with a method that ``peft`` knows.
        folder: made if missing; both files are moved into place when both are complete.

    Raises:
        TypeError: ``peft`` does not have the method, or stores a layer kind differently.
    """
    method = peft_patterns.one_method(adapted)
    names = getattr(method, "peft", None)
    if names is None:
        raise TypeError(f"{method.info.title} has no counterpart in Hugging Face peft")
    for placed in adapted.sites.values():
        check_same_meaning(placed, names)
    tensors: dict[str, Tensor] = {}
    for name, placed in adapted.sites.items():
        own = placed.layer.adapter.state_dict()
        for ours, theirs in names.names(placed.site.kind).items():
            tensors[f"{PREFIX}{name}.{theirs}"] = _to_peft(whole(own[ours]), theirs, placed)
    modules = _whole_modules(adapted)
    for name, value in adapted.extra.items():
        tensors[f"{PREFIX}{name}"] = whole(value)
    for name, value in adapted.changed_buffers().items():
        if not any(name.startswith(f"{module}.") for module in modules):
            raise TypeError(
                f"buffer {name!r} changed during training, and peft stores buffers of trained "
                "modules only; name its module in train, or keep it in eval() while training"
            )
        tensors[f"{PREFIX}{name}"] = value

    config = {
        "peft_type": names.kind,
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": getattr(
            getattr(adapted.model, "config", None), "_name_or_path", None
        ),
        "bias": "none",
        "target_modules": _target_modules(adapted),
        "modules_to_save": modules or None,
        "fan_in_fan_out": any(s.site.kind == "hf_conv1d" for s in adapted.sites.values()),
        **names.extra,
        **{theirs: getattr(method, ours) for theirs, ours in names.fields.items()},
        **peft_patterns.patterns(adapted, method),
        **peft_patterns.kept_ranks(adapted, names),
    }
    packed = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    text = json.dumps(config, indent=2, sort_keys=True)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_together(
        folder,
        {
            MODEL_FILE: lambda file: save_file(packed, file, metadata={"format": "pt"}),
            CONFIG_FILE: lambda file: file.write_text(text, encoding="utf-8"),
        },
    )


def _target_modules(adapted: Any) -> list[str] | str:
    """The layers' names; as a regular expression where a name is also the end of another's."""
    names = sorted(adapted.sites)
    ends = tuple(f".{name}" for name in names)
    others = (name for name, _ in adapted.model.named_modules() if name not in adapted.sites)
    if any(other.endswith(ends) for other in others):
        return "|".join(re.escape(name) for name in names)
    return names


def check_same_meaning(placed: Any, names: PeftNames) -> None:
    """Raise TypeError where peft's adapter of a layer is another map than the one here."""
    site, base = placed.site, placed.layer.base
    if site.kind not in names.kinds:
        raise TypeError(
            f"layer {site.name!r}: peft stores {site.kind} layers of this method in another form; "
            "leave it out of targets to export"
        )
    if has_own_forward(base) and not hasattr(base, "embed_scale"):  # which peft knows of
        raise TypeError(
            f"layer {site.name!r} ({type(base).__name__}) has a forward of its own, beside which "
            "peft puts its branch, not within; leave it out of targets to export"
        )
    padding = getattr(base, "padding_mode", "zeros") if site.kind == "conv" else "zeros"
    if padding != "zeros":
        raise TypeError(
            f"layer {site.name!r}: peft's branch pads with zeros, this convolution is "
            f"padding_mode={padding!r}; leave it out of targets to export"
        )
    dilated = site.kind == "conv" and any(d != 1 for d in base.dilation)
    if site.groups > 1 or dilated:
        raise TypeError(
            f"layer {site.name!r}: peft's branch for grouped or dilated convolutions is another "
            "map; leave it out of targets to export"
        )


def _to_peft(value: Tensor, theirs: str, placed: Any) -> Tensor:
    site = placed.site
    dims = len(site.shape) - 2 if site.kind == "conv" else 0
    if theirs == MAGNITUDE:
        return value.view(1, -1, *[1] * dims) if dims else value.view(-1)
    if not dims:
        return value
    right = "_A" in theirs
    return value.view(-1, *site.shape[1:]) if right else value.view(*value.shape, *[1] * dims)


def _whole_modules(adapted: Any) -> list[str]:
    """Modules whose every parameter is trained beside; peft knows only whole modules."""
    modules = sorted({name.rpartition(".")[0] for name in adapted.extra})
    for first, others in also_called(adapted.model).items():
        if first in adapted.extra:
            raise TypeError(
                f"peft trains a copy of a whole module, but {[first, *others]} are one tied "
                "tensor; untie them to export"
            )
    for module in modules:
        own = {f"{module}.{k}" for k, _ in adapted.model.get_submodule(module).named_parameters()}
        if not module or not own <= set(adapted.extra):
            raise TypeError(
                f"peft saves whole modules only, but train covers a part of {module or 'the model'}"
                "; name the module in train"
            )
    return modules
