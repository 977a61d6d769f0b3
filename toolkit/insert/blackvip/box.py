"""A model of which nothing is seen but its answers: counted, limited, checked, tried again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Retry: TypeAlias = Callable[..., Any]
SUM_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}


class BudgetSpent(RuntimeError):
    """The next call would pass the budget; it was not made."""


class CallFailed(RuntimeError):
    """The black box raised, and the retry policy gave up. What it raised is the cause."""


class BadAnswer(ValueError):
    """What came back is not one finite row of scores, or of probabilities, for each image."""


class BlackBox:
    """A function of images, behind a counter.

    Every attempt counts when it is made, failed ones as well, since a service may bill them. The
    budget is kept exactly: what would pass it is refused before the call.

    Args:
        function: takes images (N, C, H, W), gives (N, classes): a tensor, an array or nested
            lists. It is called without gradients; nothing else of it is touched.
        budget: most images that may ever be sent; None for no limit.
        retry: a policy that calls a function and tries again as it likes, such as
            ``tenacity.Retrying(...)``; called as ``retry(attempt)``, or as ``retry(attempt,
            images)`` where it wants both.
        returns: what the function gives. Of ``logits`` the softmax is taken.
        batch: most images in one call; more are sent in several.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Any],
        budget: int | None = None,
        retry: Retry | None = None,
        returns: Literal["probabilities", "logits"] = "probabilities",
        batch: int | None = None,
    ) -> None:
        if not callable(function):
            raise TypeError("function: give a function of images")
        if retry is not None and not callable(retry):
            raise TypeError("retry: give a callable, such as tenacity.Retrying(...), or None")
        if returns not in ("probabilities", "logits"):
            raise ValueError(f"returns: choose probabilities or logits, got {returns!r}")
        for name, value in (("budget", budget), ("batch", batch)):
            if value is not None and (isinstance(value, bool) or value < (name == "batch")):
                raise ValueError(f"{name}: a whole number of images, or None, got {value!r}")
        self.function, self.budget, self.retry = function, budget, retry
        self.returns, self.batch = returns, batch
        self.images = self.calls = 0
        self.classes: int | None = None

    @property
    def left(self) -> float:
        """Images that may still be sent; infinite without a budget."""
        return float("inf") if self.budget is None else self.budget - self.images

    def afford(self, images: int) -> None:
        """Refuse now what would be refused half way.

        Raises:
            BudgetSpent: fewer images are left; nothing was sent.
        """
        if images > self.left:
            raise BudgetSpent(
                f"budget: {images} images are asked for and {self.left:g} of {self.budget} are "
                "left; nothing was sent. Raise box.budget to go on from here"
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Log-probabilities (N, classes) of images (N, C, H, W), in float32 or finer.

        Raises:
            BudgetSpent: they are more than the budget leaves; none was sent.
            CallFailed: the function raised, and so did the retry policy.
            BadAnswer: an answer of the wrong shape, not finite, or no probabilities.
        """
        if not len(images):
            raise ValueError("images: there is none")
        self.afford(len(images))
        size = self.batch or len(images)
        return torch.cat([self._checked(part, self._ask(part)) for part in images.split(size)])

    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities (N, classes); raises as a call does."""
        return self(images).exp()

    def _ask(self, images: Tensor) -> Any:
        refused: list[BudgetSpent] = []

        def attempt(*_: Any) -> Any:
            try:
                self.afford(len(images))
            except BudgetSpent as error:  # not raised in here, or the policy would try it again
                refused.append(error)
                return None
            self.images += len(images)
            self.calls += 1
            return self.function(images)

        try:
            if self.retry is None:
                answer = attempt()
            elif _takes_one(self.retry):
                answer = self.retry(attempt)
            else:
                answer = self.retry(attempt, images)
        except Exception as error:
            raise refused[0] if refused else self._failed(error) from error
        if refused:
            raise refused[0]
        return answer

    def _failed(self, error: Exception) -> CallFailed:
        return CallFailed(
            f"the black box raised {type(error).__name__} ({error}) in call {self.calls}; "
            "nothing was updated, the same step can be taken again"
        )

    def _checked(self, images: Tensor, answer: Any) -> Tensor:
        if callable(answer) and not isinstance(answer, Tensor):
            raise TypeError(
                "retry: it returned a function; give a policy that calls, such as "
                "tenacity.Retrying(...), not the decorator tenacity.retry(...)"
            )
        try:
            found = torch.as_tensor(answer).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise BadAnswer(f"answer: {type(answer).__name__} is no table of numbers") from error
        known = "classes" if self.classes is None else self.classes
        wanted = f"({len(images)}, {known})"
        if found.dim() != 2 or len(found) != len(images) or found.shape[1] < 2:
            raise BadAnswer(f"answer: shape {tuple(found.shape)}, wanted {wanted}")
        if self.classes not in (None, found.shape[1]):
            raise BadAnswer(
                f"answer: {found.shape[1]} classes, before there were {self.classes}; "
                "one box answers with the same classes always"
            )
        if not found.is_floating_point():
            raise BadAnswer(f"answer: {found.dtype}, wanted scores of floating point")
        tolerance = SUM_TOLERANCE.get(found.dtype, 1e-3)
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        if not bool(found.isfinite().all()):
            raise BadAnswer("answer: it holds numbers that are not finite")
        if self.returns == "logits":
            found = found.log_softmax(1)
        else:
            off = float((found.sum(1) - 1).abs().max())
            if off > tolerance or float(found.min()) < -tolerance:
                raise BadAnswer(
                    f"answer: rows are no probabilities (sums are off 1 by {off:.3g}, the least "
                    f'entry is {float(found.min()):.3g}); for scores say returns="logits"'
                )
            found = found.clamp_min(torch.finfo(torch.float32).tiny).log()
        self.classes = found.shape[1]
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """What was counted, as tensors."""
        return {"images": torch.tensor(self.images), "calls": torch.tensor(self.calls)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from :meth:`state_dict`."""
        self.images, self.calls = int(state["images"]), int(state["calls"])


def _takes_one(policy: Retry) -> bool:
    """Whether a policy can be called with the attempt alone."""
    try:
        inspect.signature(policy).bind(None)
    except TypeError:
        return False
    except ValueError:  # no signature to read
        return True
    return True
