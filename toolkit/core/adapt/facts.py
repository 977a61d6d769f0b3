"""What a file of adapters says of itself: read, brought to today's form and checked by type."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from toolkit.core.adapt.files import FIRST, FORMAT
from toolkit.core.declare.catalogue import catalogue


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no file of this project, or damaged; the message names the entry.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
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
    except (KeyError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its facts cannot be read ({error}); save it again") from error
    if missing:
        raise ValueError(f"{path}: its facts lack {sorted(missing)}; save it again")
    _check_types(path, facts)
    return facts, tensors


def _names(value: Any) -> bool:
    """A list of names, each once."""
    listed = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return listed and len(set(value)) == len(value)


def _layer(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("kind"), str)
        and isinstance(value.get("parameter"), str)
        and isinstance(value.get("shape"), list)
        and all(type(n) is int and n >= 0 for n in value["shape"])
    )


def _method(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("slug"), str)
        and isinstance(value.get("class"), str)
        and isinstance(value.get("hyperparameters"), dict)
    )


FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "train": ("a list of names", _names),
    "moved": ("a list of names", _names),
    "tied": (
        "an object of lists of names",
        lambda v: isinstance(v, dict) and all(map(_names, v.values())),
    ),
    "layers": (
        "an object of layers, each with kind, shape and parameter",
        lambda v: isinstance(v, dict) and all(map(_layer, v.values())),
    ),
    "methods": ("a list of objects", lambda v: isinstance(v, list)),
}
"""Fact -> its form in words, and whether a value has it."""


def _check_types(path: Path, facts: dict[str, Any]) -> None:
    for name, (form, has) in FORMS.items():
        if name in facts and not has(facts[name]):
            raise ValueError(f"{path}: its fact {name!r} is not {form}; save it again")
    for one in facts["methods"]:
        sites = one.get("sites") if isinstance(one, dict) else None
        if not _method(one) or not _names(sites):
            raise ValueError(
                f"{path} holds a method that this version does not have (slug, class, "
                f"hyperparameters and sites are needed, found {str(one)[:80]}); load it with the "
                "version that wrote it"
            )
    acted = [name for one in facts["methods"] for name in one["sites"]]
    if sorted(acted) != sorted(facts["layers"]):
        raise ValueError(
            f"{path}: its facts name the layers {sorted(facts['layers'])[:4]} and methods on "
            f"{sorted(acted)[:4]}; save it again"
        )
    if foreign := set(facts["moved"]) - set(facts["train"]):
        raise ValueError(f"{path}: its fact 'moved' names {sorted(foreign)[:3]}, not in 'train'")


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
