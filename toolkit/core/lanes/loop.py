r"""Train hundreds of small networks at once, along a leading lane axis.

A small network leaves most of a machine idle: a step costs more in calls than in arithmetic. M
networks of one architecture are therefore trained as one, with every tensor stacked. Each lane has
its own seed, data order, schedule, weight decay, momentum, batch size, length, label noise, mask,
SAM radius and width, and ends with the weights that a run of its own would have given.

Lanes that need another batch size are grouped; groups are cut into chunks that fit a memory
budget; a chunk that is done is written to disk if a folder is given, and not run again.

>>> lanes = [Lane(seed=s, lr=lr) for s in range(3) for lr in (0.1, 0.3)]
>>> result = train(lambda g: nets.mlp([64, 64, 10], generator=g), lanes, x, y)  # doctest: +SKIP
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import torch
from torch import Tensor

from toolkit.core.lanes import store as lane_store
from toolkit.core.lanes.check import check
from toolkit.core.lanes.lane import Lane
from toolkit.core.lanes.losses import LaneLoss
from toolkit.core.lanes.memory import chunk_size, held_bytes
from toolkit.core.lanes.nets import (
    LaneNet,
    Make,
    States,
    initial,
    join_masks,
    take,
    width_masks,
)
from toolkit.core.lanes.steps import Stepper
from toolkit.core.seeds import generator


@dataclass
class Trained:
    """What :func:`train` returns, lanes in the order given.

    Attributes:
        lanes: how each was trained.
        states: name -> (M, ...), after the last step of each lane.
        snapshots: step -> states of the lanes that reach that step; zeros for the others.
        loss: (M,) mean training loss over the last epoch of each lane, as far as it went.
        diverged: (M,) step at which the loss was first not finite, -1 if it never was.
    """

    lanes: list[Lane]
    states: States
    snapshots: dict[int, States]
    loss: Tensor
    diverged: Tensor


def train(
    make: Make,
    lanes: Sequence[Lane],
    x: Tensor,
    y: Tensor,
    *,
    states: States | None = None,
    masks: Mapping[str, Tensor] | None = None,
    rows: Tensor | None = None,
    loss: LaneLoss | None = None,
    optimizer: str = "sgd",
    snapshots: Sequence[int] = (),
    memory_gib: float = 2.0,
    chunk: int | None = None,
    workers: int | None = None,
    folder: str | Path | None = None,
    progress: bool | None = None,
    compile: bool = False,
) -> Trained:
    """Train all lanes.

    Args:
        make: builds a network from a ``torch.Generator``; lanes start from ``make`` at their seed.
            It returns logits (b, K), or an object or a dict that holds them as ``logits``.
            Parameters that do not require gradients stay as they are, tied ones stay tied.
        lanes: M lanes.
        x: training inputs (N, ...), on the device where training takes place.
        y: labels (N,), whole numbers of any width; of examples with -100 none counts in the loss.
            Arrays of NumPy are taken like tensors. With a ``loss`` of your own, whatever it takes,
            one number per example.
        states: other starting states, name -> (M, ...), for example of pruned networks.
        masks: name of a parameter -> (M, ...) of 0 and 1. Masked entries are 0 from the start and
            stay 0, whatever momentum and weight decay do.
        rows: numbers (M, n) of the examples that each lane trains on; all of ``x`` by default. An
            epoch then has n examples.
        loss: takes logits (M', b, K), labels (M', b) and the numbers (M',) of the lanes at hand, as
            in ``lanes``, and returns the loss of every example (M', b) or every lane (M',); see
            :func:`lane_loss`. Cross-entropy by default.
        optimizer: ``sgd`` (PyTorch's, with momentum) or ``adamw``.
        snapshots: steps after which the states are also kept; 0 is the start.
        memory_gib: what training and its results may take together.
        chunk: lanes trained together at most; by default what suits the device and the budget.
        workers: chunks trained side by side on a CPU, each on one thread, which for tensors this
            small is faster than several threads on one chunk; by default as many as PyTorch has
            threads. 1 leaves PyTorch's threads alone.
        folder: where finished chunks are kept, to go on after an interruption. The network's code
            and data belong to their names.
        progress: a bar with the remaining time; by default where a person looks (a terminal).
        compile: compile the step with ``torch.compile``; on a GPU with CUDA graphs. Compiling takes
            up to a minute per shape. On a CPU it slowed the MLP of the benchmarks down and gave
            the convolutional network a tenth.

    Returns:
        The results. A lane whose loss is no longer finite is marked in ``diverged``; the others
        are not touched by it.

    Raises:
        TypeError: a network that returns no logits.
        ValueError: no lanes, a network that cannot be called for many lanes at once (it draws
            random numbers, or looks at what it computes), labels that name no class, states, masks
            or rows that do not fit, a batch larger than the data, a folder together with a loss
            (files could not tell one loss from another), a budget that not even one lane fits into
            (the message says what would).
    """
    lanes = list(lanes)
    if not lanes:
        raise ValueError("lanes is empty: give at least one Lane.")
    x, y, rows = torch.as_tensor(x), torch.as_tensor(y), _tensor(rows)
    template = make(generator(0, "template")).to(x.device)
    net = LaneNet(template)
    start = initial(make, [lane.seed for lane in lanes]) if states is None else states
    start = {name: torch.as_tensor(t).to(x.device) for name, t in start.items()}
    masks = {name: torch.as_tensor(mask) for name, mask in (masks or {}).items()}
    y = check(net, lanes, x, y, start, masks, optimizer, snapshots, rows, loss)
    if folder is not None and loss is not None:
        raise ValueError(
            "folder and loss: kept files cannot tell one loss from another, so a run with a loss "
            "of its own is not kept; leave folder out, or keep results with toolkit.core.sweep."
        )
    if any(lane.width < 1 for lane in lanes):
        masks = join_masks(masks, width_masks(template, [lane.width for lane in lanes]))
    masks = {name: mask.to(start[name]) for name, mask in masks.items()}
    classes = int(y.max()) + 1
    held = held_bytes(start, len(snapshots))
    if workers is None:
        workers = torch.get_num_threads() if x.device.type == "cpu" and not compile else 1
    groups: dict[tuple[int, bool], list[int]] = {}
    for m, lane in enumerate(lanes):
        groups.setdefault((lane.batch, lane.rho > 0), []).append(m)
    parts: list[list[int]] = []
    for members in groups.values():
        members.sort(key=lambda m: -lanes[m].steps)
        size = chunk_size(
            net, lanes[members[0]], x, start, held, memory_gib, workers, chunk, optimizer
        )
        size = min(size, math.ceil(len(members) / workers))
        parts += [members[i : i + size] for i in range(0, len(members), size)]

    result = Trained(
        lanes,
        {name: t.clone() for name, t in start.items()},
        {s: {name: torch.zeros_like(t) for name, t in start.items()} for s in snapshots},
        start[net.parameters[0]].new_zeros(len(lanes)),
        torch.full((len(lanes),), -1, device=x.device),
    )
    store = lane_store.Store(folder, template, x, y, optimizer, snapshots) if folder else None
    with _bar(sum(lane.steps for lane in lanes), progress) as bar:

        def run(members: list[int]) -> tuple[list[int], dict[str, Tensor]]:
            chosen = [lanes[m] for m in members]
            state, mask = take(start, members), take(masks, members) if masks else {}
            numbers = torch.as_tensor(members, device=x.device)
            own_rows = None if rows is None else rows.to(x.device)[numbers]
            known = {} if own_rows is None else {"rows": own_rows}
            done = store.load(chosen, state, mask | known) if store else None
            if done is None:
                # calling a module with other weights is not safe in two threads at once
                own = LaneNet(template) if workers > 1 else net
                stepper = Stepper(own, chosen, x, y, classes, state, mask, optimizer, compile,
                                  own_rows, loss, numbers)  # fmt: skip
                done = stepper.run(snapshots, bar.update)
                if store:
                    store.save(chosen, state, mask | known, done)
            else:
                bar.update(sum(lane.steps for lane in chosen))
            return members, done

        for members, done in _side_by_side(run, parts, workers):
            _write(result, members, done)
    return result


def _tensor(values: Any) -> Tensor | None:
    return None if values is None else torch.as_tensor(values)


def _side_by_side(run: Callable, parts: list[list[int]], workers: int) -> Iterator:
    """Results as they come; with several workers each has one of PyTorch's threads."""
    if workers == 1 or len(parts) == 1:
        yield from map(run, parts)
        return
    before = torch.get_num_threads()

    def alone(members: list[int]) -> Any:
        torch.set_num_threads(1)
        return run(members)

    pool = joblib.Parallel(workers, prefer="threads", return_as="generator_unordered")
    try:
        yield from pool(joblib.delayed(alone)(members) for members in parts)
    finally:
        torch.set_num_threads(before)


def _write(result: Trained, members: list[int], done: dict[str, Tensor]) -> None:
    index = torch.as_tensor(members, device=result.loss.device)
    for key, value in done.items():
        kind, _, name = key.partition("/")
        if kind == "final":
            result.states[name][index] = value.to(result.states[name])
        elif kind == "facts":
            target = getattr(result, name)
            target[index] = value.to(target)
        else:
            target = result.snapshots[int(kind)][name]
            target[index] = value.to(target)


def _bar(total: int, progress: bool | None):
    from tqdm.auto import tqdm

    off = not (sys.stderr.isatty() if progress is None else progress)
    return tqdm(total=total, unit="step", unit_scale=True, desc="lanes", disable=off)
