"""Processor time of a step of every choice on *Which weights, when?*, beside full training.

Time of the processor, not of the clock: what else the machine does then hardly counts.

The page shows what is kept in ``book/results/times/choices.jsonl``. To measure it anew, from the
project's folder: ``python -m benchmarks choices --threads 1 --rows FILE`` with that file.
"""

from __future__ import annotations

import copy
import datetime
import gc
import time
from typing import Any

import torch

from benchmarks.rows import log
from benchmarks.timing import compare, emit
from toolkit.core.runs.provenance import processor
from toolkit.labs.select import which_weights
from toolkit.labs.select.choices import run
from toolkit.labs.select.choices.draws import SIZES, Task, draw

SEED = 900
"""One of the search's, which no report uses."""
RATE = 1e-3


def step(made: Task, task: str, choice: str, steps: int) -> float:
    """Processor seconds per step of one whole training run as on the page; nothing is judged.

    The scores that a choice reads before its first step are left out: they are paid once.
    """
    mine, this = made._replace(model=copy.deepcopy(made.model)), SIZES[task]
    adapted = run.dress(mine, choice, 0, SEED, steps, this.batch)
    gc.disable()
    try:
        start = time.process_time()
        run._train(mine, adapted, RATE, SEED, steps, this, {})
        return (time.process_time() - start) / steps
    finally:
        gc.enable()


def measure(task: str, rounds: int, scale: str = "cpu", **facts: Any) -> None:
    """Emit one row for each choice: ratio = full training / ours. Arms take turns, after a round
    that is not timed."""
    made = draw(task, SEED, scale)
    steps = 2 if scale == "ci" else SIZES[task].steps
    arms = list(which_weights.ARMS[task])
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for i in range(1 + rounds):
        turn = i % len(arms)
        for arm in arms[turn:] + arms[:turn]:
            took = step(made, task, arm, steps)
            if i:
                times[arm].append(took)
    for arm in arms:
        name = f"{task}/{arm}/step-vs-full/cpu"
        emit(compare(name, times[arm], times["full"], "ms", task=task, choice=arm, **facts))


def main(rounds: int = 15, threads: int = 2) -> None:
    """Print one JSON line per choice and task."""
    torch.set_num_threads(threads)
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    facts = {"threads": threads, "day": day, "processor": processor("cpu"),
             "torch": torch.__version__}  # fmt: skip
    for task in which_weights.PAIR:
        with log.attempt(task):
            measure(task, rounds, **facts)


if __name__ == "__main__":
    main()
