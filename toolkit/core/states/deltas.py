r"""Sparse differences of a model from its base: added, scaled, subtracted, applied, and filed.

.. math:: P = P_0 + \sum_t \alpha_t\,\Delta P_t

>>> import torch
>>> from toolkit.core.states.deltas import SparseDelta
>>> old, new = {"w": torch.zeros(2, 2)}, {"w": torch.tensor([[0.0, 1.0], [0.0, 0.0]])}
>>> delta = SparseDelta.between(old, new)
>>> (0.5 * delta + delta).applied(old)["w"].tolist()
[[0.0, 1.5], [0.0, 0.0]]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from toolkit.core.io import write_beside
from toolkit.core.states import filed

FORMAT = "parameters-in-motion/delta-1"


@dataclass(frozen=True)
class SparseDelta:
    """What changed in some tensors of a base, entry by entry.

    Attributes:
        entries: name -> (places (k,) int64 ascending, differences (k,)). Differences of a float32
            tensor are kept in float64, so that a whole difference gives the new weight to the bit.
        bases: name -> hash of the base's tensor, see :func:`fingerprint`.
    """

    entries: Mapping[str, tuple[Tensor, Tensor]]
    bases: Mapping[str, str]

    @classmethod
    def between(cls, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> SparseDelta:
        """The difference of two sets of tensors; those that are equal are left out.

        Raises:
            ValueError: a name of ``new`` is missing in ``old``, or shape or dtype differ.
        """
        entries, bases = {}, {}
        for name, after in new.items():
            before = old.get(name)
            if before is None or before.shape != after.shape or before.dtype != after.dtype:
                raise ValueError(f"{name!r} is no tensor of the base, or of another shape or dtype")
            a, b = before.detach().reshape(-1), after.detach().reshape(-1)
            places = (a != b).nonzero()[:, 0]
            if len(places):
                wide = _wide(a.dtype)
                entries[name] = places, b[places].to(wide) - a[places].to(wide)
                bases[name] = fingerprint(before)
        return cls(entries, bases)

    def __len__(self) -> int:
        """Entries that change."""
        return sum(len(places) for places, _ in self.entries.values())

    def __mul__(self, scale: float) -> SparseDelta:
        entries = {name: (at, scale * value) for name, (at, value) in self.entries.items()}
        return SparseDelta(entries, self.bases)

    __rmul__ = __mul__

    def __neg__(self) -> SparseDelta:
        return -1.0 * self

    def __sub__(self, other: SparseDelta) -> SparseDelta:
        return self + (-other)

    def __add__(self, other: SparseDelta) -> SparseDelta:
        """The sum of two differences from one base.

        Raises:
            ValueError: they are differences from two bases; the message has both hashes.
        """
        entries = dict(self.entries)
        for name, (at, value) in other.entries.items():
            if name not in entries:
                entries[name] = at, value
                continue
            if self.bases[name] != other.bases[name]:
                raise ValueError(
                    f"{name!r}: one difference is from base {self.bases[name]}, the other from "
                    f"{other.bases[name]}; only differences from one base add up"
                )
            mine, worth = entries[name]
            places, row = torch.cat([mine, at]).unique(return_inverse=True)
            total = torch.zeros(len(places), dtype=worth.dtype, device=worth.device)
            entries[name] = places, total.index_add(0, row, torch.cat([worth, value]))
        return SparseDelta(entries, {**self.bases, **other.bases})

    def applied(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the base that change, with the difference added; the base stays.

        ``model.load_state_dict(delta.applied(model.state_dict()), strict=False)`` puts them in.

        Raises:
            ValueError: a tensor is missing, or is not the one the difference is from; the message
                has both hashes.
        """
        new = {}
        for name, (at, value) in self.entries.items():
            old = base.get(name)
            if old is None:
                raise ValueError(f"the base has no tensor {name!r}, which this difference changes")
            found = fingerprint(old)
            if found != self.bases[name]:
                raise ValueError(
                    f"{name!r} is not the base of this difference: its hash is {found}, the "
                    f"difference is from {self.bases[name]}; load the weights it was made from"
                )
            if len(at) and int(at[-1]) >= old.numel():
                raise ValueError(f"an entry lies outside {name!r}; save the difference again")
            flat, at = old.detach().reshape(-1), at.to(old.device)
            summed = flat[at].to(value.dtype) + value.to(old.device)
            new[name] = flat.scatter(0, at, summed.to(old.dtype)).view(old.shape)
        return new

    def save(self, path: Any) -> None:
        """Write the difference as safetensors: places in 32 bits where that is enough."""
        tensors = {}
        for name, (at, value) in self.entries.items():
            small = not len(at) or int(at[-1]) < 2**31
            tensors[f"{name}.index"] = at.to(torch.int32 if small else torch.int64).contiguous()
            tensors[f"{name}.value"] = value.contiguous()
        facts = {"format": FORMAT, "bases": json.dumps(dict(self.bases))}
        write_beside(Path(path), lambda file: save_file(tensors, file, metadata=facts))

    @classmethod
    def load(cls, path: Any) -> SparseDelta:
        """Read a difference.

        Raises:
            FileNotFoundError: no such file. ValueError: it is no whole file of this form.
        """

        def made(facts: Mapping[str, str], tensors: dict[str, Tensor]) -> SparseDelta:
            bases, entries = filed.words(facts, "bases"), {}
            for name in bases:
                at = filed.places(tensors, name, ".index")
                value = filed.floats(tensors, name, ".value")
                if at.shape != value.shape:
                    raise ValueError(f"the entries of {name!r} are damaged")
                entries[name] = at, value
            return cls(entries, bases)

        return filed.read(path, "sparse difference", FORMAT, made)


def fingerprint(tensor: Tensor) -> str:
    """Hash of a tensor's dtype, shape and bits: 16 hexadecimal digits."""
    plain = tensor.detach().cpu().contiguous()
    words = f"{plain.dtype} {tuple(plain.shape)} ".encode()
    bits = plain.reshape(-1).view(torch.uint8) if plain.numel() else torch.empty(0)
    return hashlib.blake2b(words + bits.numpy().tobytes(), digest_size=8).hexdigest()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """A dtype in which the difference of two numbers is exact, unless their sizes lie far apart."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
