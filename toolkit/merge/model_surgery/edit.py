"""An edit of some rows of a model: applied, undone, and filed by the hash of its base."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from toolkit.core.io import write_beside
from toolkit.core.states import filed
from toolkit.core.states.deltas import SparseDelta, fingerprint
from toolkit.merge.model_surgery.gates import rows_of

FORMAT = "parameters-in-motion/rows-1"


@dataclass(frozen=True, eq=False)
class Edit:
    r"""Rows that move along one direction: :math:`w_j \leftarrow w_j + \alpha v`.

    The rows are stored, not how they were chosen: computed anew on the edited model they would be
    others.

    Attributes:
        rows: name of the tensor -> numbers of its rows (n,), ascending.
        direction: v (d,).
        alpha: its multiple.
        bases: name -> hash of the tensor before, see :func:`toolkit.core.states.deltas
            .fingerprint`. A tensor without one is edited whatever it holds, so
            ``dataclasses.replace(edit, bases={})`` fits any model of these shapes.
    """

    rows: Mapping[str, Tensor]
    direction: Tensor
    alpha: float
    bases: Mapping[str, str]

    def __len__(self) -> int:
        """Rows that move."""
        return sum(len(at) for at in self.rows.values())

    def __neg__(self) -> Edit:
        """The same rows the other way, for an edited model; exact but for rounding."""
        return Edit(self.rows, self.direction, -self.alpha, {})

    def apply(self, model: nn.Module) -> Applied:
        """Edit a model in place: for good, or as ``with edit.apply(model):`` for a block of code.

        Returns:
            What takes the edit back to the bit; it keeps the rows as they were.

        Raises:
            ValueError: a tensor is missing, has another shape, or is not the one that the edit was
                made for (the message has both hashes), or a row would overflow. Nothing is changed
                then.
            TypeError: it is no module.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is a {type(model).__name__}: apply edits a module in place; "
                "of a state dict, applied() gives the edited tensors"
            )
        views = {}
        for name in self.rows:
            place, _, leaf = name.rpartition(".")
            try:
                layer = model.get_submodule(place)
            except AttributeError:
                layer = None
            weight = None if layer is None else layer._parameters.get(leaf)
            if layer is None or weight is None:
                raise ValueError(f"the model has no plain tensor {name!r}, which this edit changes")
            self._check(name, weight, rows_of(layer, weight))
            views[name] = rows_of(layer, weight)
        return Applied(self, views)

    def applied(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that change, edited; the state dict and its tensors stay.

        ``{**state, **edit.applied(state)}`` is the whole edited state dict.

        Raises:
            ValueError: as for :meth:`apply`.
        """
        for name in self.rows:
            if name not in state:
                raise ValueError(f"the state dict has no tensor {name!r}, which this edit changes")
            self._check(name, state[name], state[name])
        new = {}
        for name, at in self.rows.items():
            new[name] = state[name].detach().clone()
            new[name][at.to(new[name].device)] = self._moved(name, new[name])
        return new

    def delta(self, state: Mapping[str, Tensor]) -> SparseDelta:
        """The edit as a difference entry by entry, to be scaled and added to others.

        Raises:
            ValueError: as for :meth:`apply`.
        """
        return SparseDelta.between(state, self.applied(state))

    def _moved(self, name: str, rows: Tensor) -> Tensor:
        """The chosen rows (n, d) after the edit, in the dtype of the tensor."""
        old = rows[self.rows[name].to(rows.device)]
        new = (old + self.alpha * self.direction.to(rows.device)).to(rows.dtype)
        if not bool(new.isfinite().all()):
            raise ValueError(
                f"rows of {name!r} would not be finite in {rows.dtype} at alpha = {self.alpha:g}: "
                "take a smaller alpha, and see that the base holds no NaN"
            )
        return new

    def _check(self, name: str, tensor: Tensor, rows: Tensor) -> None:
        at, width = self.rows[name], len(self.direction)
        if rows.dim() != 2 or rows.shape[1] != width or (len(at) and int(at.max()) >= len(rows)):
            most = int(at.max()) if len(at) else 0
            raise ValueError(
                f"{name!r} has shape {tuple(tensor.shape)}: the edit moves rows up to {most} of "
                f"{width} numbers; it is from another architecture"
            )
        if not rows.is_floating_point():
            raise ValueError(f"{name!r} holds {rows.dtype}: load the model unquantised")
        wanted = self.bases.get(name)
        if wanted is not None and (found := fingerprint(tensor)) != wanted:
            raise ValueError(
                f"{name!r} is not the base of this edit: its hash is {found}, the edit is for "
                f"{wanted}; load the weights it was made for, or drop the hashes with "
                "dataclasses.replace(edit, bases={})"
            )

    def save(self, path: Any) -> None:
        """Write rows, direction and alpha as safetensors, whole or not at all."""
        tensors = {f"{name}.rows": at.to(torch.int32).cpu() for name, at in self.rows.items()}
        tensors["direction"] = self.direction.detach().cpu().contiguous()
        facts = {
            "format": FORMAT,
            "alpha": repr(float(self.alpha)),
            "rows": json.dumps(list(self.rows)),
            "bases": json.dumps(dict(self.bases)),
        }
        write_beside(Path(path), lambda file: save_file(tensors, file, metadata=facts))

    @classmethod
    def load(cls, path: Any) -> Edit:
        """Read an edit.

        Raises:
            FileNotFoundError: no such file. ValueError: it is no whole file of this form.
        """

        def made(facts: Mapping[str, str], tensors: dict[str, Tensor]) -> Edit:
            names, bases = json.loads(facts["rows"]), filed.words(facts, "bases")
            rows = {name: filed.places(tensors, name, ".rows") for name in names}
            direction, alpha = filed.floats(tensors, "direction"), float(facts["alpha"])
            if not math.isfinite(alpha):
                raise ValueError("its alpha is damaged")
            return cls(rows, direction, alpha, bases)

        return filed.read(path, "edit of rows", FORMAT, made)


class Applied:
    """An edit in force; :meth:`undo`, or the end of a ``with`` block, takes it back to the bit."""

    @torch.no_grad()
    def __init__(self, edit: Edit, views: Mapping[str, Tensor]) -> None:
        self.edit, self._views = edit, dict(views)
        self._at = {name: at.to(views[name].device) for name, at in edit.rows.items()}
        self._before = {name: views[name][at] for name, at in self._at.items()}
        self._after = {name: edit._moved(name, rows) for name, rows in self._views.items()}
        for name, at in self._at.items():
            self._views[name][at] = self._after[name]

    @torch.no_grad()
    def undo(self) -> None:
        """Put the rows back as they were.

        Raises:
            RuntimeError: it was undone already, or rows have changed since. Nothing is changed.
        """
        if not self._before:
            raise RuntimeError("the edit was undone already")
        for name, at in self._at.items():
            if not torch.equal(self._views[name][at], self._after[name]):
                raise RuntimeError(
                    f"rows of {name!r} have changed since the edit: undo later edits first, or "
                    "take it back from what is there with (-edit).apply(model)"
                )
        for name, at in self._at.items():
            self._views[name][at] = self._before[name]
        self._before = {}

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()
