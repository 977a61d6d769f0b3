"""Arms that make a black box read hazy digits: prompts, controls, and what needs no prompt."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.core.seeds import generator
from toolkit.insert.blackvip import (
    BlackBox,
    BlackVIP,
    Coordinator,
    Flat,
    Frame,
    Tuner,
    expected_cosine,
    gains,
    segmented_uniform,
    two_sided,
)
from toolkit.labs.insert.hazy import world

BATCH, DIRECTIONS, BETA, WIDTH = 10, 2, 0.9, 0.02
"""Images and directions of a step, the momentum, and c. ALPHA and GAMMA are the code's."""
EDGE = 3
"""Width of the frame: as many numbers as the Coordinator's 300."""
ROUNDS = ("gc", "spsa", "constant", "frame", "bar", "white")
"""Arms that go in steps; "probe" and "nothing" do not."""
TITLES = {
    "gc": "BlackVIP (SPSA-GC)",
    "spsa": "the same, plain SPSA",
    "constant": "the same, encoder constant",
    "frame": "frame, SPSA-GC",
    "bar": "frame, one-sided (BAR)",
    "white": "BlackVIP, true gradient",
    "probe": "linear probe on answers",
    "nothing": "do nothing",
}
SHAPES = {"one": (8,) * 2, "two": (16,) * 2, "three": (24, 16)}
"""Three Coordinators, ever wider."""
DIRECTIONS_SEEN = (1, 4, 16, 64)


def prompter(arm: str, seed: int, widths: tuple[int, ...] = (8, 8)) -> Flat:
    """What writes the prompt, started so that it writes none: its last layer is zero."""
    if arm in ("frame", "bar"):
        return Frame(world.SIDE, EDGE, 1)
    made = Coordinator(
        100, world.SIDE, src_dim=128, start=4, widths=widths, channels=1,
        generator=generator(seed, "coordinator"),
    )  # fmt: skip
    with torch.no_grad():
        made.body[-1].get_parameter("weight").zero_()
    return made


def method(arm: str, rate: float, directions: int = DIRECTIONS, c: float = WIDTH) -> BlackVIP:
    """The settings of an arm; ``rate`` is the effective step a / (1 - beta)."""
    beta = 0.0 if arm in ("spsa", "bar") else BETA
    one = arm == "bar"
    return BlackVIP(
        a=rate * (1 - beta), beta=beta, c=c, directions=2 * directions - 1 if one else directions,
        estimator="one-sided" if one else "spsa",
    )  # fmt: skip


def features(x: Tensor, arm: str, scale: str) -> Tensor:
    """What the encoder says; in the control it says nothing."""
    z = world.encode(x, scale)
    return torch.zeros_like(z) if arm == "constant" else z


def accuracy(said: Tensor, y: Tensor) -> float:
    """Right answers in per cent."""
    return 100 * float((said.argmax(1) == y).double().mean())


def judged(tuner: Tuner, this: world.Task, z: Tensor, scale: str) -> tuple[float, float]:
    """Accuracy in per cent and log-loss in nats of the prompted images."""
    said = BlackBox(world.answers(scale))(tuner.prompted(this.x_judged, z))
    return accuracy(said, this.y_judged), float(F.nll_loss(said, this.y_judged))


def true_gradient(net: Flat, phi: Tensor, this: world.Task, rows: Tensor, z: Tensor,
                  scale: str, own: Tensor | None = None) -> Tensor:  # fmt: skip
    """The gradient (P,) that only the owner of the box can compute."""
    phi = phi.clone().requires_grad_()
    net.train()
    h = net.prompts(phi[None], z[rows], own)[0]
    said = world.network(scale)((this.x[rows] + h).clamp(0, 1).flatten(1))
    return torch.autograd.grad(F.cross_entropy(said, this.y[rows]), phi)[0]


def white_step(tuner: Tuner, this: world.Task, rows: Tensor, z: Tensor, scale: str) -> None:
    """The same step with the true gradient in place of the estimate."""
    one = tuner.optimiser
    g = true_gradient(tuner.prompter, one.phi, this, rows, z, scale, own=one.phi)
    a, _ = gains(one.taken + 1, **one.options)
    one.m = one.beta * one.m + g
    one.phi, one.taken = one.phi - a * (g + one.beta * one.m), one.taken + 1


def learned(arm: str, rate: float, seed: int, kind: str, part: str, scale: str) -> dict[str, Any]:
    """An arm from zero-shot to its last step.

    Returns:
        ``accuracy`` and ``loss`` at the end, ``course`` (accuracy at no step and at the marks of
        the scale), ``queries`` (images sent up to each), ``trained`` numbers, ``start`` accuracy.
    """
    size, this = world.size(scale), world.task(seed, kind, part, scale)
    z, z_judged = (features(x, arm, scale) for x in (this.x, this.x_judged))
    net = prompter(arm, seed)
    tuner = method(arm, rate).start(net, lambda x: features(x, arm, scale),
                                    generator=generator(seed, "directions"))  # fmt: skip
    box, draws = BlackBox(world.answers(scale)), generator(seed, "batches")
    start = BlackBox(world.answers(scale))(this.x_judged)
    course, queries, end = [accuracy(start, this.y_judged)], [0], (0.0, 0.0)
    for step in range(1, size.steps + 1):
        rows = torch.randint(len(this.y), (BATCH,), generator=draws)
        if arm == "white":
            white_step(tuner, this, rows, z, scale)
        else:
            tuner.step(box, this.x[rows], this.y[rows], z=z[rows])
        if step in size.marks:
            end = judged(tuner, this, z_judged, scale)
            course.append(end[0])
            queries.append(step * BATCH if arm == "white" else box.images)
    return {"accuracy": end[0], "loss": end[1], "course": course, "queries": queries,
            "trained": net.count, "start": course[0]}  # fmt: skip


def probed(rate: float, seed: int, kind: str, part: str, scale: str) -> dict[str, Any]:
    """A linear map of the box's log-probabilities, learned from one answer to each image.

    Args:
        rate: weight of the penalty on its squared entries.
        seed, kind, part, scale: as of :func:`world.task`.
    """
    this, box = world.task(seed, kind, part, scale), BlackBox(world.answers(scale))
    said = box(this.x).clamp_min(-20).double()
    mean, spread = said.mean(0), said.std(0) + 1e-6
    weight = torch.zeros(11, world.CLASSES, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def scores(answers: Tensor) -> Tensor:
        return ((answers - mean) / spread) @ weight[:-1] + weight[-1]

    def loss() -> Tensor:
        optimiser.zero_grad()
        found = F.cross_entropy(scores(said), this.y) + rate * weight[:-1].square().sum()
        found.backward()
        return found

    optimiser.step(loss)
    with torch.no_grad():
        new = BlackBox(world.answers(scale))(this.x_judged)
        found = scores(new.clamp_min(-20).double())
    return {"accuracy": accuracy(found, this.y_judged), "start": accuracy(new, this.y_judged),
            "loss": float(F.cross_entropy(found, this.y_judged)),
            "queries": [len(this.y)], "trained": weight.numel()}  # fmt: skip


def aimed(size: str, seed: int, scale: str) -> dict[str, Any]:
    """Cosine of the estimate and the true gradient, for a Coordinator of a width.

    Returns:
        ``numbers`` P; ``cosine`` and ``formula``, lists over :data:`DIRECTIONS_SEEN`.
    """
    this = world.task(seed, "own", "validation", scale)
    net = prompter("gc", seed, SHAPES[size])
    net.reset(generator(seed, "plain start"))  # with a zero layer most slopes are zero
    z = world.encode(this.x, scale)
    rows, phi = torch.arange(BATCH), net.vector()
    g = true_gradient(net, phi, this, rows, z, scale).double()
    box, most = BlackBox(world.answers(scale)), max(DIRECTIONS_SEEN)
    tuner = BlackVIP(c=1e-3).start(net, lambda x: x, generator=generator(seed, "aim"))
    delta = segmented_uniform(most, len(phi), generator(seed, "aim"))
    slopes = []
    for one in delta:
        found = tuner.losses(box, torch.stack([phi + 1e-3 * one, phi - 1e-3 * one]),
                              this.x[rows], this.y[rows], z[rows], None)  # fmt: skip
        slopes.append(found)
    plus, minus = torch.stack(slopes).double().T
    cosine = [
        float(
            F.cosine_similarity(two_sided(plus[:k], minus[:k], delta[:k].double(), 1e-3), g, dim=0)
        )
        for k in DIRECTIONS_SEEN
    ]
    return {"numbers": len(phi), "cosine": cosine,
            "formula": [expected_cosine(len(phi), k) for k in DIRECTIONS_SEEN]}  # fmt: skip
