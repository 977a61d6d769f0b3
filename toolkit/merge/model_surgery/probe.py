r"""A linear probe on mean hidden states: it tells a behaviour, and its rows are directions.

.. math:: \bar x = \frac{\sum_t m_t h_t}{\sum_t m_t + 10^{-10}}, \qquad
    \mathrm{logits} = W \bar x + b
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core.train.labels import class_numbers

EPSILON = 1e-10


@dataclass(frozen=True, eq=False)
class Probe:
    """A softmax classifier of mean hidden states.

    Attributes:
        weight: W (classes, d); row c points towards class c.
        bias: b (classes,).
    """

    weight: Tensor
    bias: Tensor

    def direction(self, bad: int = 1) -> Tensor:
        """Row of the unwanted class (d,), neither normalised nor a difference of rows."""
        return self.weight[bad].clone()

    def __call__(self, states: Tensor) -> Tensor:
        """Scores (n, classes) of mean states (n, d)."""
        return F.linear(states, self.weight, self.bias)

    def accuracy(self, states: Tensor, labels: Any) -> float:
        """Share of right answers; give texts that it was not fitted on."""
        labels = class_numbers(labels, len(states)).to(states.device)
        return float((self(states).argmax(1) == labels).double().mean())

    @classmethod
    def fit(
        cls,
        states: Tensor,
        labels: Any,
        *,
        rate: float = 1e-4,
        epochs: int = 20,
        batch: int = 32,
        generator: torch.Generator | None = None,
        start: Probe | tuple[Tensor, Tensor] | None = None,
        orders: Tensor | Sequence[Sequence[int]] | None = None,
    ) -> Probe:
        """Fit by cross-entropy with Adam, in batches of an order that is new in each epoch.

        Rate, epochs and batch are the official command's. They move W by at most rate times steps
        from its random start: with few texts a larger rate is needed.

        Args:
            states: mean hidden states (n, d), as from :func:`masked_mean`; half precision is
                computed in single precision.
            labels: class number of each (n,), 0 and 1, or more classes.
            rate: of Adam.
            epochs: passes over the states.
            batch: states per step; the last batch of a pass may be smaller.
            generator: a CPU generator for start and orders.
            start: first W and b; left out, uniform in +-1/sqrt(d), as a linear layer of PyTorch.
            orders: (epochs, n), the order of the states in each pass, instead of random ones.

        Raises:
            ValueError: one class only, shapes that do not fit, states that are not finite, or
                neither a generator nor the draws.
        """
        states, labels = _checked(states, labels)
        classes, width = max(2, int(labels.max()) + 1), states.shape[1]
        if not rate > 0 or epochs < 1 or batch < 1:
            raise ValueError(f"rate={rate}, epochs={epochs}, batch={batch}: all must be positive")
        if generator is None and (start is None or orders is None):
            raise ValueError("generator: give one, or both start and orders, the draws themselves")
        if start is None:
            bound = width**-0.5
            start = tuple(
                torch.empty(shape).uniform_(-bound, bound, generator=generator)
                for shape in ((classes, width), (classes,))
            )
        first = (start.weight, start.bias) if isinstance(start, Probe) else start
        weight, bias = (
            t.detach().to(states, copy=True).requires_grad_() for t in map(torch.as_tensor, first)
        )
        fits = weight.dim() == 2 and weight.shape[1] == width and bias.shape == weight.shape[:1]
        if not fits or len(weight) < classes:
            raise ValueError(
                f"start: W has shape {tuple(weight.shape)} and b {tuple(bias.shape)}, "
                f"give ({classes}, {width}) and ({classes},)"
            )
        if orders is None:
            made = [torch.randperm(len(states), generator=generator) for _ in range(epochs)]
            orders = torch.stack(made)
        passes = torch.as_tensor(orders).long().to(states.device)
        whole = torch.arange(len(states), device=states.device).expand(epochs, -1)
        if passes.shape != whole.shape or not torch.equal(passes.sort(1).values, whole):
            raise ValueError(
                f"orders: shape {tuple(passes.shape)}, give ({epochs}, {len(states)}): each row "
                "holds every number from 0 once"
            )
        optimizer = torch.optim.Adam([weight, bias], lr=rate)
        with torch.enable_grad():
            for order in passes:
                for at in order.split(batch):
                    optimizer.zero_grad()
                    F.cross_entropy(F.linear(states[at], weight, bias), labels[at]).backward()
                    optimizer.step()
        return cls(weight.detach(), bias.detach())


def _checked(states: Tensor, labels: Any) -> tuple[Tensor, Tensor]:
    if states.dim() != 2 or not len(states) or not states.is_floating_point():
        raise ValueError(
            f"states: shape {tuple(states.shape)} of {states.dtype}; give mean hidden states "
            "(n, d), as masked_mean does"
        )
    labels = class_numbers(labels, len(states)).to(states.device)
    kinds = labels.unique()
    if int(kinds[0]) < 0:
        raise ValueError(f"labels hold {int(kinds[0])}: classes are counted from 0")
    if len(kinds) < 2:
        raise ValueError(
            f"labels are all {int(kinds[0])}: a probe tells classes apart; add texts without the "
            "behaviour, or with it"
        )
    if not bool(states.isfinite().all()):
        raise ValueError("states hold NaN or inf: leave those texts out, or use a wider dtype")
    kind = torch.promote_types(states.dtype, torch.float32)
    return states.detach().to(kind), labels


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    r"""Mean of hidden states over the tokens of each text, padding left out.

    Which tokens are padding is told, not guessed: a token with number 0 may be a real one.

    Args:
        hidden: (n, tokens, d).
        mask: (n, tokens), 1 on tokens and 0 on padding.

    Returns:
        (n, d), in float64 if ``hidden`` is, otherwise in float32.

    Raises:
        ValueError: shapes do not fit, or a mask of other numbers than 0 and 1.
    """
    if hidden.dim() != 3 or mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} and hidden {tuple(hidden.shape)}: give one number "
            "per token"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("mask: give the attention mask, 1 on tokens and 0 on padding")
    kind = torch.promote_types(hidden.dtype, torch.float32)
    # what stands on padding may be anything, also not a number
    kept = hidden.to(kind).masked_fill((mask == 0).unsqueeze(-1), 0.0)
    return kept.sum(1) / (mask.to(kind).sum(1, keepdim=True) + EPSILON)


@torch.no_grad()
def mean_states(
    model: nn.Module, batches: Iterable[Any], at: str | None = None, entry: int = -1
) -> Tensor:
    """Mean hidden state of each text (n, d), as :func:`masked_mean` gives it, without gradients.

    Args:
        model: called with input_ids and attention_mask by name; for a network that takes token
            numbers alone, name the module with ``at``.
        batches: each a dict with input_ids and attention_mask, or a tuple that begins with them
            (:class:`toolkit.core.nets.text.Batch`).
        at: name of the module whose output is taken, such as the last norm; left out, the model's
            own list of hidden states.
        entry: of that list; the last one stands after all blocks and the final norm.

    Raises:
        ValueError: a batch has no mask, ``at`` names no module, or the model gives no such list.
    """
    modules = dict(model.named_modules())
    if at is not None and at not in modules:
        raise ValueError(f"at: the model has no module {at!r}")
    caught: list[Any] = []
    handle = None
    if at is not None:
        handle = modules[at].register_forward_hook(lambda *call: caught.append(call[-1]))
    was = {module: module.training for module in model.modules()}
    model.eval()
    found = []
    try:
        for batch in batches:
            ids, mask = _ids_and_mask(batch)
            caught.clear()
            if at is None:
                out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
                listed = getattr(out, "hidden_states", None)
                if listed is None:
                    raise ValueError("at: the model gives no hidden_states, so name a module")
                hidden = listed[entry]
            else:
                _call(model, ids, mask)
                hidden = caught[-1][0] if isinstance(caught[-1], tuple) else caught[-1]
            found.append(masked_mean(hidden, mask))
    finally:
        if handle is not None:
            handle.remove()
        for module, training in was.items():
            module.training = training
    if not found:
        raise ValueError("batches: there is none")
    return torch.cat(found)


def _ids_and_mask(batch: Any) -> tuple[Tensor, Tensor]:
    try:
        if hasattr(batch, "keys"):
            ids, mask = batch["input_ids"], batch["attention_mask"]
        else:
            ids, mask = batch[0], batch[1]
    except (KeyError, IndexError) as error:
        raise ValueError("batches: each needs input_ids and attention_mask") from error
    if mask is None:
        raise ValueError(
            "batches: attention_mask is None; give 1 on tokens and 0 on padding, since a token "
            "with number 0 may be a real one"
        )
    return ids, mask


def _call(model: nn.Module, ids: Tensor, mask: Tensor) -> None:
    import inspect

    names = inspect.signature(model.forward).parameters
    given: Mapping[str, Tensor] = {"attention_mask": mask} if "attention_mask" in names else {}
    if "input_ids" in names:
        model(input_ids=ids, **given)
    else:
        model(ids, **given)
