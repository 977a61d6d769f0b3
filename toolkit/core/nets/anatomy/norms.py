"""The norms of a block: which they are, in which order they act, and whether they act first."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from toolkit.core.nets.anatomy.attentions import Attention
from toolkit.core.nets.anatomy.form import common, inside, is_norm, parent, role

Modules = Mapping[str, nn.Module]
# attributes by which networks say whether the norms come first
FLAGS = ("norm_first", "pre_norm", "normalize_before", "do_layer_norm_before")


def norms_in(modules: Modules, place: str, width: int) -> list[str]:
    """Names of the norms of a width in a place, in order of registration."""
    return [
        name
        for name, module in modules.items()
        if name and inside(name, place) and is_norm(module, width)
        # norms of queries and keys stand beside their layers and bear their names
        if not any(map(role, name[len(place) :].split(".")))
    ]


def crosses(name: str, place: str) -> bool:
    """Whether a name inside a block speaks of cross-attention or of an encoder."""
    return re.search(r"cross|(?<![a-z])enc", name[len(place) :].lower()) is not None


class Norms:
    """The norms of one block.

    Args:
        modules: of the model, by name.
        place: name of the block.
        width: of the stream.
        held: its attentions.
        feed: its feed-forward.
    """

    def __init__(
        self,
        modules: Modules,
        place: str,
        width: int,
        held: list[Attention],
        feed: Mapping[str, str],
    ) -> None:
        self.modules, self.place, self.width = modules, place, width
        self.held, self.feed = held, feed
        self.number = {name: number for number, name in enumerate(modules)}
        registered = norms_in(modules, place, width)
        ends = [found.layers["output"] for found in held if "output" in found.layers]
        ends += [feed["down"]] if feed else []
        self.closing = [norm for norm in registered if any(self._closes(norm, e) for e in ends)]
        self.names = self._in_order(registered)

    def _closes(self, norm: str, end: str) -> bool:
        """Whether a norm follows a last layer inside a part of the block, as in BERT."""
        beside = parent(norm) == parent(end) != self.place
        return beside and self.number[norm] > self.number[end]

    def _in_order(self, registered: list[str]) -> list[str]:
        roots = [found.root for found in self.held if found.root != self.place]
        # ALBERT registers the norm of the feed-forward before the attention with its norm
        inner = [n for n in self.closing if any(inside(n, root) for root in roots)]
        others = [n for n in registered if n not in inner]
        # GPT-2 registers the norm of its cross-attention last
        late = [n for n in others if crosses(n, self.place)]
        others = [n for n in others if n not in late]
        return inner + others[:1] + late + others[1:]

    def _ended(self) -> bool:
        """Whether a last norm follows the stack, as the sums of pre-norm blocks need one."""
        return any(
            inside(self.place, parent(norm))
            and not inside(norm, self.place)
            and self.number[norm] > self.number[self.place]
            for norm in norms_in(self.modules, "", self.width)
        )

    def first(self) -> bool | None:
        """True for pre-norm, False for post-norm, None when the form does not tell."""
        for flag in FLAGS:
            value = getattr(self.modules[self.place], flag, None)
            if isinstance(value, bool):
                return value
        if self.closing:
            return False
        if not self.names or len(self.names) > len(self.held) + bool(self.feed):
            return None  # norms on both sides (Gemma 2)
        first = self.names[0]
        last = first.rpartition(".")[2].lower()
        starts = [common(found.layers.values()) for found in self.held]
        if not starts:
            # without attention beside it, only a norm before the whole feed-forward is certain
            starts = [common(self.feed.values())]
            if any(inside(norm, starts[0]) for norm in self.names):
                return None
        if self.number[first] < min(self.number[start] for start in starts):
            return True
        if any(word in last for word in ("before", "input", "pre")):
            return True
        if last.endswith("1") and self._ended():
            return True  # CLIP; the first GPT is like it but for the end, and post-norm
        if last.startswith(("sa_", "output_")):
            return False  # DistilBERT
        # no network puts RMS norms after the sum; OLMo 2 has them before it, and says post
        bare = "bias" not in self.modules[first]._parameters
        return True if bare and "post" not in last else None
