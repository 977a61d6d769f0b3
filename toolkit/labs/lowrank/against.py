"""A method beside do-nothing, the head alone, LoRA and full training on a shared bed.

Every lab of this part compares in this way. Its LoRA, head and full training are the very runs of
LoRA's lab (:mod:`toolkit.labs.lowrank.lora`): same function, same arguments, same code, so they are
taken over and not run again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolkit.core.evidence import Measured
from toolkit.core.runs.measure import Runs
from toolkit.core.runs.tuning import Tuned
from toolkit.core.scale import Scale
from toolkit.labs.lab import Found, search_seeds, two_blocks


def compare(
    runs: Runs,
    scale: Scale,
    name: str,
    functions: Mapping[str, Any],
    arms: Mapping[str, Mapping[str, Any]],
    starts: Mapping[str, float],
    n: int,
) -> dict[str, Tuned]:
    """Search a rate for every arm on validation data, then run all arms on two blocks of seeds.

    Args:
        runs: The lab's.
        scale: Of the run; the bed is called with its name.
        name: The experiment, such as "abstracts".
        functions: Arm -> job function of ``arm, rate, seed, scale, part`` and the arm's arguments;
            "nothing" among them.
        arms: Arm -> further arguments, for every arm that trains.
        starts: Arm -> middle of the first rates.
        n: Seeds reported, in two blocks.

    Returns:
        Arm -> what its search found.
    """
    blocks, where = two_blocks(n), {"scale": scale.name}
    seeds = [seed for block in blocks for seed in block]
    found = runs.tune(
        name, functions,
        {arm: {**more, **where, "part": "validation"} for arm, more in arms.items()},
        {arm: starts[arm] for arm in arms},
        seeds=search_seeds(), reported=seeds, judged="validation", better="min", factor=2.0,
        width=scale.pick(ci=1, cpu=3, gpu=3),
    )  # fmt: skip
    runs.blocks(name, blocks)
    where["part"] = "test"
    nothing = [{"arm": "nothing", "rate": 1.0, "seed": seed, **where} for seed in seeds]
    runs.table(name, functions, nothing + [
        {"arm": arm, **more, "rate": found[arm].rate, "seed": seed, **where}
        for arm, more in arms.items() for seed in seeds
    ])  # fmt: skip
    return found


def paired(
    found: Found, name: str, column: str, ours: str, theirs: str, control: str = "full"
) -> Measured:
    """Two arms of one experiment, seed by seed; full training must beat doing nothing.

    Args:
        found: What the lab measured.
        name: The experiment, made by :func:`compare`.
        column: The entry of the records that is judged.
        ours, theirs: Arms.
        control: The positive control.
    """
    names = dict.fromkeys((ours, theirs, "nothing", control))
    values = {arm: found.values(name, column, arm=arm) for arm in names}
    return Measured(
        values[ours], values[theirs], control=values[control], nothing=values["nothing"],
        blocks=found.blocks(name), tuning_seeds=search_seeds(),
    )  # fmt: skip
