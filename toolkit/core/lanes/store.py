"""Finished chunks of lanes on disk, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from toolkit.core.io import write_beside
from toolkit.core.lanes.fingerprint import fingerprint
from toolkit.core.lanes.lane import Lane

CHECK = "check"


class Store:
    """One safetensors file per chunk, named by all that decides its content.

    Args:
        folder: where the files are; made if missing.
        template: the network; all of its code and data count but the weights it starts from.
        x, y: training set.
        optimizer: its name.
        snapshots: steps that are kept.

    Raises:
        ValueError: the network holds something whose code or data cannot be told.
    """

    def __init__(
        self,
        folder: str | Path,
        template: nn.Module,
        x: Tensor,
        y: Tensor,
        optimizer: str,
        snapshots: Sequence[int],
    ):
        network = fingerprint(template)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = x.device
        facts = (network, optimizer, sorted(snapshots), torch.__version__, x.device.type)
        self.common = hashlib.blake2b(repr(facts).encode())
        for file in sorted(Path(__file__).parent.glob("*.py")):  # how lanes are trained
            self.common.update(file.read_bytes())
        frozen = [n for n, p in template.named_parameters() if not p.requires_grad]
        if frozen:
            self.common.update(repr(frozen).encode())
        for t in (x, y):
            _add(self.common, "data", t)

    def load(
        self, lanes: Sequence[Lane], states: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """The tensors of a finished chunk, or None; a damaged file counts as none."""
        path = self._path(lanes, states, masks)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt", device=str(self.device)) as file:
                done = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return done if (file.metadata() or {}).get(CHECK) == _check(done) else None
        except (SafetensorError, OSError):
            return None

    def save(
        self,
        lanes: Sequence[Lane],
        states: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        done: Mapping[str, Tensor],
    ) -> None:
        """Keep a finished chunk, whole or not at all.

        Warns:
            RuntimeWarning: a folder lies where the file should; the chunk is then not kept.
        """
        path = self._path(lanes, states, masks)
        if path.is_dir():
            warnings.warn(
                f"{path.name} is a folder: remove it, or these lanes are trained again each time.",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        tensors = {name: t.contiguous().clone() for name, t in done.items()}
        metadata = {CHECK: _check(tensors)}
        write_beside(path, lambda p: save_file(tensors, p, metadata))

    def _path(
        self, lanes: Sequence[Lane], states: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> Path:
        digest = self.common.copy()
        digest.update(repr([astuple(lane) for lane in lanes]).encode())
        for group in (states, masks):
            for name in sorted(group):
                _add(digest, name, group[name])
        return self.folder / f"lanes-{digest.hexdigest()[:24]}.safetensors"


def _check(tensors: Mapping[str, Tensor]) -> str:
    """A checksum over names, kinds, shapes and numbers."""
    digest = hashlib.blake2b()
    for name in sorted(tensors):
        _add(digest, name, tensors[name])
    return digest.hexdigest()[:24]


def _add(digest: hashlib.blake2b, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
