"""The small pretrained networks that lie in ``data/bases``: found, checked and read.

Each is one safetensors file of half-precision weights under 2 MB with an entry in
``data/bases/manifest.toml``: its SHA-256, what it learned from, its licence, the command that made
it, and what it reached after rounding. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from toolkit.core.data.manifest import ChecksumError
from toolkit.core.io import write_bytes, write_text

LIMIT = 2_000_000
"""Bytes that a base may take."""


def folder() -> Path:
    """Beside this module when installed, else the repository's ``data/bases``."""
    here = Path(__file__).resolve()
    installed = here.with_name("bases")
    return installed if installed.is_dir() else here.parents[3] / "data" / "bases"


def entries(where: Path | None = None) -> dict[str, dict[str, Any]]:
    """What the manifest says about each base, by name."""
    path = (where or folder()) / "manifest.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def tensors(name: str, where: Path | None = None) -> dict[str, Tensor]:
    """The checked weights of a base, in single precision.

    Args:
        name: an entry of the manifest.
        where: folder of bases; left out, the project's own.

    Raises:
        ValueError: no such entry.
        ChecksumError: the file is missing or not the one that the manifest promises.
    """
    known, where = entries(where), where or folder()
    if name not in known:
        raise ValueError(f"name: no base {name!r}; the manifest lists {', '.join(known)}")
    path = where / f"{name}.safetensors"
    remedy = (
        f"Take it from the repository (data/bases), or make it again: "
        f"`python -m toolkit.labs.beds.pretrain {name}`."
    )
    if not path.is_file():
        raise ChecksumError(f"base {name!r}: {path} is missing. {remedy}")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != known[name]["sha256"]:
        raise ChecksumError(
            f"base {name!r}: {path} has sha256 {found}, not {known[name]['sha256']}. {remedy}"
        )
    return {k: v.float() if v.is_floating_point() else v for k, v in load(data).items()}


def fill(model: nn.Module, name: str, where: Path | None = None) -> Any:
    """A network with the weights of a base, in evaluation mode.

    Raises:
        ValueError, ChecksumError: see :func:`tensors`.
    """
    model.load_state_dict(tensors(name, where))
    return model.eval()


def rounded(model: nn.Module) -> dict[str, Tensor]:
    """The state of a network as it is stored: floating-point numbers in half precision."""
    return {
        k: v.detach().cpu().half().contiguous() if v.is_floating_point() else v.detach().cpu()
        for k, v in model.state_dict().items()
    }


def store(name: str, model: nn.Module, facts: dict[str, Any], where: Path | None = None) -> Path:
    """Write a base and its entry, each beside its place and moved there.

    Args:
        name: of the file and the entry.
        model: the trained network.
        facts: strings and numbers for the entry; ``sha256`` and ``bytes`` are added.
        where: folder of bases; left out, the project's own.

    Raises:
        ValueError: the file would take more than :data:`LIMIT` bytes, or a fact is no string or
            number.
    """
    where = where or folder()
    data = save(rounded(model))
    if len(data) > LIMIT:
        raise ValueError(f"model: {len(data):,} bytes stored, more than {LIMIT:,}; make it smaller")
    known = entries(where)
    known[name] = {**facts, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    lines = [
        "# Bases of the test beds, written by `python -m toolkit.labs.beds.pretrain`.",
    ]
    for entry in sorted(known):
        lines.append(f"\n[{entry}]")
        for key, value in known[entry].items():
            if not isinstance(value, str | int | float):
                raise ValueError(f"facts: {key} must be a string or a number, got {value!r}")
            text = value.replace("\\", "\\\\").replace('"', '\\"') if isinstance(value, str) else ""
            lines.append(f'{key} = "{text}"' if isinstance(value, str) else f"{key} = {value!r}")
    where.mkdir(parents=True, exist_ok=True)
    path = where / f"{name}.safetensors"
    write_bytes(path, data)
    write_text(where / "manifest.toml", "\n".join(lines) + "\n")
    return path


def restored(model: nn.Module) -> Any:
    """The network as a reader of its file gets it: rounded to half precision and back."""
    model.load_state_dict({k: v.to(model.state_dict()[k].dtype) for k, v in rounded(model).items()})
    return model.eval()


def seeded(seed: int = 0) -> torch.Generator:
    """The draws of a base's pretraining, apart from every stream of a run."""
    from toolkit.core.seeds import generator

    return generator(seed, "pretraining")
