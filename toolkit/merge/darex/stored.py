"""A pruned model as a seed and the values that are kept: no places are stored.

The mask is drawn again from the seed. The values are the fine-tuned model's own, in its dtype, so
that q can be chosen anew after loading.

>>> import torch
>>> from toolkit.merge.darex import DAREx, prune
>>> from toolkit.merge.darex.stored import Pruned
>>> base, tuned = {"w": torch.zeros(4, 4)}, {"w": torch.ones(4, 4)}
>>> small = Pruned.between(base, tuned, DAREx(drop=0.75), seed=3)
>>> whole = prune(base, tuned, DAREx(drop=0.75), seed=3)
>>> torch.equal(small.applied(base)["w"], whole["w"])
True
"""

from __future__ import annotations

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
from toolkit.core.states.deltas import fingerprint
from toolkit.core.states.merging import Source
from toolkit.core.states.plan import MERGED, planned
from toolkit.core.states.rules import Piece
from toolkit.core.states.stored import stored
from toolkit.core.states.streams import Stream
from toolkit.merge.darex import DAREx

FORMAT = "parameters-in-motion/pruned-1"


@dataclass(frozen=True)
class Pruned:
    """What is left of a fine-tuned model.

    Attributes:
        rule: how it is pruned; another q gives another model.
        seed: of the masks.
        kept: name -> the fine-tuned values (k,) that the mask keeps.
        whole: name -> tensors that are not pruned.
        bases: name -> hash of the base's tensor, for all in ``kept``.
        order: all names, and what each is tied to, or itself.
    """

    rule: DAREx
    seed: int
    kept: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]
    bases: Mapping[str, str]
    order: Mapping[str, str]

    @classmethod
    def between(cls, base: Source, tuned: Source, rule: DAREx, *, seed: int = 0) -> Pruned:
        """Prune a model as :func:`toolkit.merge.darex.prune` does, and keep what that needs.

        Raises:
            ValueError: masks that were given by hand; otherwise see ``prune``.
        """
        if rule.given:
            raise ValueError("masks were given by hand: only masks drawn from a seed are stored")
        first, model = stored(base, "the base"), stored(tuned, "the model")
        plan = planned(first, [model], heads=1, buffers=1)
        kept, whole, bases = {}, {}, {}
        for name, how in plan.how.items():
            if name in plan.tied:
                continue
            fact = plan.facts[name]
            if how != MERGED or rule.whole(name, fact.shape):
                whole[name] = model.read(name).detach().cpu().contiguous().clone()
                continue
            stream = Stream(first, [model], [name], (1.0,), seed)
            parts = [piece.models[0][rule.masks(piece)[0]] for piece in stream]
            kept[name] = torch.cat(parts).to(fact.dtype)
            bases[name] = fingerprint(first.read(name).reshape(fact.shape))
        order = {name: plan.tied.get(name, name) for name in plan.how}
        return cls(rule, seed, kept, whole, bases, order)

    @property
    def bytes(self) -> int:
        """Of all numbers that are stored."""
        return sum(t.nbytes for part in (self.kept, self.whole) for t in part.values())

    def applied(self, base: Source) -> dict[str, Tensor]:
        """The pruned model, bit for bit; the base stays.

        Raises:
            ValueError: another base; the message has both hashes. Or a mask that is not as long
                as the values, which another random generator would draw.
        """
        first = stored(base, "the base")
        for name, wanted in self.bases.items():
            if name not in first.facts:
                raise ValueError(f"the base has no tensor {name!r}, which was pruned")
            found = fingerprint(first.read(name).reshape(first.facts[name].shape))
            if found != wanted:
                raise ValueError(
                    f"{name!r} is not the base of this model: its hash is {found}, it was pruned "
                    f"against {wanted}; load the weights it was fine-tuned from"
                )
        result: dict[str, Tensor] = {}
        for name, source in self.order.items():
            if source != name:
                result[name] = result[source]
            elif name in self.whole:
                result[name] = self.whole[name].clone()
            else:
                fact = first.facts[name]
                stream = Stream(first, [first], [name], (1.0,), self.seed)
                found = torch.empty(fact.count, dtype=fact.dtype)
                start = 0
                for piece in stream:
                    start = self._fill(piece, start, found)
                if start != len(self.kept[name]):
                    raise self._other(name, start)
                result[name] = found.view(fact.shape)
        return result

    def _fill(self, piece: Piece, start: int, result: Tensor) -> int:
        """Write the merged numbers of a piece; returns how many values were used up to its end."""
        masks = self.rule.masks(piece)
        end = start + int(masks[0].sum())
        values = self.kept[piece.name][start:end]
        if len(values) != end - start:
            raise self._other(piece.name, end)
        assert piece.base is not None
        piece.models[0] = piece.base.masked_scatter(masks[0], values.to(piece.base))
        merged = self.rule.rescaled(piece, masks)
        result[piece.start : piece.start + len(piece)] = merged
        return end

    def _other(self, name: str, count: int) -> ValueError:
        return ValueError(
            f"{name!r}: seed {self.seed} keeps {count} numbers, {len(self.kept[name])} are stored; "
            "the file is damaged, or this random generator is not the one it was made with"
        )

    def save(self, path: Any) -> None:
        """Write it as safetensors."""
        tensors = {f"{name}.kept": value.contiguous() for name, value in self.kept.items()}
        tensors |= {f"{name}.whole": value for name, value in self.whole.items()}
        facts = {
            "format": FORMAT, "rule": json.dumps(self.rule.settings()), "seed": str(self.seed),
            "bases": json.dumps(dict(self.bases)), "order": json.dumps(dict(self.order)),
        }  # fmt: skip
        write_beside(Path(path), lambda file: save_file(tensors, file, metadata=facts))

    @classmethod
    def load(cls, path: Any) -> Pruned:
        """Read it.

        Raises:
            FileNotFoundError: no such file. ValueError: it is no whole file of this form.
        """

        def made(facts: Mapping[str, str], tensors: dict[str, Tensor]) -> Pruned:
            bases, order = filed.words(facts, "bases"), filed.words(facts, "order")
            own = [name for name, source in order.items() if name == source]
            if not set(order.values()) <= set(own):
                raise ValueError("a name is tied to one that is not stored")
            kept = {name: filed.floats(tensors, name, ".kept") for name in own if name in bases}
            whole = {name: tensors.pop(f"{name}.whole") for name in own if name not in bases}
            rule, seed = DAREx.restored(json.loads(facts["rule"])), int(facts["seed"])
            return cls(rule, seed, kept, whole, bases, order)

        return filed.read(path, "pruned model", FORMAT, made)
