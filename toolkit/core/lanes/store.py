"""Finished chunks of lanes on disk, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from toolkit.core.io import write_beside
from toolkit.core.lanes.lane import Lane


class Store:
    """One safetensors file per chunk, named by all that decides its content.

    Args:
        folder: where the files are; made if missing.
        template: the architecture.
        x, y: training set.
        optimizer: its name.
        snapshots: steps that are kept.
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
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = x.device
        facts = (repr(template), optimizer, sorted(snapshots), torch.__version__, x.device.type)
        self.common = hashlib.blake2b(repr(facts).encode())
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
            return load_file(path, device=str(self.device))
        except (SafetensorError, OSError):
            return None

    def save(
        self,
        lanes: Sequence[Lane],
        states: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        done: Mapping[str, Tensor],
    ) -> None:
        """Keep a finished chunk, whole or not at all."""
        tensors = {name: t.contiguous().clone() for name, t in done.items()}
        write_beside(self._path(lanes, states, masks), lambda p: save_file(tensors, p))

    def _path(
        self, lanes: Sequence[Lane], states: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> Path:
        digest = self.common.copy()
        digest.update(repr([astuple(lane) for lane in lanes]).encode())
        for group in (states, masks):
            for name in sorted(group):
                _add(digest, name, group[name])
        return self.folder / f"lanes-{digest.hexdigest()[:24]}.safetensors"


def _add(digest: hashlib.blake2b, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
