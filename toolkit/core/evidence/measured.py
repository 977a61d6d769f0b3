"""What was measured for one condition, and what is wrong with it.

Runs that crashed, are missing or gave no finite number are counted and shown, never averaged.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Runs = Mapping[int, float]
"""One number per seed; ``None`` or a number that is not finite is a run that failed."""


@dataclass(frozen=True)
class Measured:
    """The runs of one condition.

    Args:
        ours: Result by seed of the arm that the claim is about.
        theirs: Result by seed of the arm it is compared with. A mapping from fixed value to such
            runs is a grid: the best fixed value is taken, see :func:`best_fixed`. ``None`` if the
            quantity is no comparison.
        control: Result by seed of a positive control, an arm that is known to work here.
        nothing: Result by seed of doing nothing. Goes with ``control``, and only with it.
        exact: Whether the effect is declared not to be random, so that no spread is needed.
        blocks: Seeds in two blocks or more that were run apart; together all seeds of ``ours``.
            ``None`` for one block.
        tuning_seeds: Seeds that anything was chosen on; they may not be reported.

    Raises:
        ValueError: If seeds are shared between tuning and reporting, blocks overlap or leave out
            seeds, an arm is empty, or only one of ``control`` and ``nothing`` is given.
        TypeError: If an arm is not keyed by seed, or a result is neither a number nor ``None``.
    """

    ours: Runs
    theirs: Runs | Mapping[Any, Runs] | None = None
    control: Runs | None = None
    nothing: Runs | None = None
    exact: bool = False
    blocks: Sequence[Collection[int]] | None = None
    tuning_seeds: Collection[int] = field(default=())

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("ours", _runs(self.ours, "ours"))
        if self.theirs is not None:
            values = getattr(self.theirs, "values", None)
            inner = list(self.theirs.values()) if callable(values) else []
            if inner and all(hasattr(arm, "keys") for arm in inner):
                arms = {k: _runs(arm, f"theirs[{k!r}]") for k, arm in self.theirs.items()}
                put("theirs", arms)
            else:
                put("theirs", _runs(self.theirs, "theirs"))
        if (self.control is None) != (self.nothing is None):
            raise ValueError("control and nothing go together: give both arms, or neither.")
        if self.control is not None:
            put("control", _runs(self.control, "control"))
            put("nothing", _runs(self.nothing, "nothing"))
        controls = {*(self.control or ()), *(self.nothing or ())}
        shared = sorted(set(self.tuning_seeds) & (self.seeds | controls))
        if shared:
            raise ValueError(
                f"seeds {shared} were tuned on and are reported: whatever was chosen fits them. "
                "Tune on seeds of their own."
            )
        if self.blocks is not None:
            put("blocks", tuple(tuple(block) for block in self.blocks))
            flat = [seed for block in self.blocks for seed in block]
            if len(set(flat)) != len(flat):
                raise ValueError("blocks share seeds: two blocks are two sets of runs.")
            if set(flat) != self.seeds:
                odd = sorted(set(flat) ^ self.seeds)
                raise ValueError(
                    f"blocks and reported seeds differ by {odd}: put every seed into one block."
                )
            if len(self.blocks) < 2 or min(map(len, self.blocks)) < 2:
                raise ValueError("blocks: give two or more, of two seeds or more each.")

    @property
    def grid(self) -> bool:
        """Whether ``theirs`` is a grid of fixed values."""
        return self.theirs is not None and any(isinstance(v, dict) for v in self.theirs.values())

    @property
    def seeds(self) -> set[int]:
        """All seeds that are reported, whether their runs ended well or not."""
        arms: list[Any] = [self.ours]
        if self.grid:
            arms += list(self.theirs.values())
        elif self.theirs is not None:
            arms.append(self.theirs)
        return set().union(*arms)


def _runs(arm: Any, name: str) -> dict[int, float | None]:
    if not hasattr(arm, "keys"):
        raise TypeError(f"{name} is a {type(arm).__name__}: give a mapping from seed to result.")
    found = {}
    for seed in arm.keys():  # noqa: SIM118  (a pandas Series iterates over its values)
        value = arm[seed]
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(
                    f"{name}[{seed!r}] is a {type(value).__name__}: give one number per seed, or "
                    "None for a run that failed."
                )
            value = float(value)
        found[seed] = value
    if not found:
        raise ValueError(f"{name} holds no runs: measure them, or leave the condition out.")
    return found


def ended(arm: Mapping[int, float | None], seed: int) -> bool:
    """Whether an arm's run of a seed gave a finite number."""
    value = arm.get(seed)
    return value is not None and math.isfinite(value)


def pairs(
    ours: Mapping[int, float | None], theirs: Mapping[int, float | None] | None
) -> tuple[dict[int, tuple[float, float | None]], dict[str, int]]:
    """Return the pairs in which both runs ended well, and how many did not.

    Args:
        ours: Result by seed.
        theirs: Result by seed; ``None`` pairs each result of ours with ``None``.

    Returns:
        Both results by seed, in the order of the seeds, and ``{"ours", "theirs", "of"}``: failed or
        missing runs of either arm, and how many seeds there are.
    """
    seeds = sorted(set(ours) | set(theirs or {}))
    failed = {
        "ours": sum(not ended(ours, seed) for seed in seeds),
        "theirs": 0 if theirs is None else sum(not ended(theirs, seed) for seed in seeds),
        "of": len(seeds),
    }
    found = {
        seed: (ours[seed], None if theirs is None else theirs[seed])
        for seed in seeds
        if ended(ours, seed) and (theirs is None or ended(theirs, seed))
    }
    return found, failed


@dataclass(frozen=True)
class Fixed:
    """The best fixed value of a grid.

    Args:
        value: The value.
        runs: Its result by seed.
        means: Mean result of every value; ``None`` where a run failed.
        on_edge: Whether it is the first or last of the grid, so that a better one may lie outside.
    """

    value: Any
    runs: dict[int, float | None]
    means: dict[Any, float | None]
    on_edge: bool


def best_fixed(
    grid: Mapping[Any, Runs], better: str = "more", seeds: Collection[int] | None = None
) -> Fixed:
    """Return the best fixed value of a grid: what a rule must beat that claims to beat fixed ones.

    All values must have been run on the same seeds as the rule, so that numbers of runs are equal.
    The best is chosen on the very runs that are reported, which favours the fixed value: a claim
    that holds nevertheless holds against any choice from the grid.

    Args:
        grid: Runs by fixed value, in the order of the values; three values or more, as the best may
            lie between two ends.
        better: ``"more"`` or ``"less"``.
        seeds: Seeds of the rule that the value is compared with; ``None`` leaves that check out.

    Returns:
        The value whose runs all ended and have the best mean.

    Raises:
        ValueError: If there are fewer than three values, seeds differ between them or from
            ``seeds``, or every value has a run that failed.
    """
    if better not in ("more", "less"):
        raise ValueError(f'better = {better!r}: choose "more" or "less".')
    arms = {value: _runs(runs, f"grid[{value!r}]") for value, runs in grid.items()}
    if len(arms) < 3:
        raise ValueError(
            f"grid holds {len(arms)} values: give three or more. Its two ends are no grid, as a "
            "value between them may do better."
        )
    wanted = set(next(iter(arms.values()))) if seeds is None else set(seeds)
    for value, runs in arms.items():
        if set(runs) != wanted:
            odd = sorted(set(runs) ^ wanted)
            raise ValueError(
                f"grid[{value!r}] was not run on the same seeds (only in one: {odd}): run every "
                "fixed value as often as what it is compared with."
            )
    means = {
        value: sum(runs.values()) / len(runs) if all(ended(runs, s) for s in runs) else None
        for value, runs in arms.items()
    }
    sound = [value for value, mean in means.items() if mean is not None]
    if not sound:
        raise ValueError("every fixed value of the grid has a run that failed: widen the grid.")
    best = (max if better == "more" else min)(sound, key=means.__getitem__)
    order = list(arms)
    return Fixed(best, arms[best], means, best in (order[0], order[-1]))
