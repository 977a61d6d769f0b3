"""What simple arms reach on a bed, and the smallest differences that 8 and 20 seeds settle."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from toolkit.core.runs import results
from toolkit.core.scale import scale as named_scale
from toolkit.labs import trials
from toolkit.labs.beds import arms, characters, images, new_classes, speech, texts
from toolkit.labs.beds.rates import RATES
from toolkit.labs.lab import clear, open_runs, write_times

BEDS: dict[str, tuple[ModuleType, dict[str, Any]]] = {
    "characters": (characters, {}),
    "images_vit_rotated": (images, {"net": "vit", "shift": "rotated"}),
    "images_vit_inverted": (images, {"net": "vit", "shift": "inverted"}),
    "images_cnn_rotated": (images, {"net": "cnn", "shift": "rotated"}),
    "images_vit_new": (new_classes, {}),
    "speech": (speech, {}),
    "texts": (texts, {}),
}
"""Bed -> its module and what its jobs are called with."""
TUNED = RATES | {"images_vit_new": new_classes.RATES}
"""Bed -> arm -> rate, for scales ``cpu`` and ``gpu``."""
TUNING_SEEDS = (1000, 1001, 1002)
PAIRS = (
    ("head", "nothing"), ("lora", "head"), ("full", "lora"), ("full_twice", "full"),
)  # fmt: skip
"""Arms whose paired differences the table shows."""


def bed(name: str) -> tuple[ModuleType, dict[str, Any]]:
    """A bed by name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in BEDS:
        raise ValueError(f"bed: choose one of {', '.join(BEDS)}, got {name!r}")
    return BEDS[name]


def start(name: str) -> dict[str, float]:
    """Middle of the first rates tried for each arm."""
    module, options = bed(name)
    return module.START[options["net"]] if "net" in options else module.START


def rates(name: str, scale: str) -> dict[str, float]:
    """The tuned rates; at ``ci``, and where none were tuned yet, the starts of the search."""
    return dict(start(name) if scale == "ci" else TUNED.get(name, start(name)))


def jobs(name: str, scale: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Arguments of the bed's ``adapt`` for every reference arm, seed by seed, split by split."""
    module, options = bed(name)
    chosen = rates(name, scale) | {"nothing": 1.0}
    return [
        {
            "arm": arm,
            "rate": chosen[arm],
            "seed": seed,
            "split": split,
            "scale": scale,
            "parts": ["test"],
            **options,
        }
        for seed in seeds
        for split in module.SPLITS
        for arm in arms.NAMES
    ]


def validate(name: str, arm: str, rate: float, seed: int, scale: str) -> dict[str, Any]:
    """One run of the search for a rate: validation only, the splits taking turns with the seeds."""
    module, options = bed(name)
    split = module.SPLITS[seed % len(module.SPLITS)]
    return module.adapt(arm, rate, seed, scale=scale, split=split, parts=("validation",), **options)


def tune(name: str, scale: str = "cpu", seeds: Sequence[int] = TUNING_SEEDS) -> dict[str, Any]:
    """The same search for every arm; see :mod:`toolkit.labs.beds.rates`.

    Returns:
        Arm -> ``rate``, ``scores`` (rate -> mean validation log-loss), ``seeds``, ``better``,
        ``judged`` and ``edge`` (the best rate lies at the end of what was tried).
    """
    found, _ = trials.tune_all(
        functools.partial(validate, name, scale=scale),
        {arm: {"arm": arm} for arm in arms.NAMES[1:]},
        start(name), list(seeds), factor=2.0, width=3, extensions=4,
    )  # fmt: skip
    return {
        arm: {
            "rate": tuned.rate,
            "scores": {f"{rate:g}": score for rate, score in tuned.scores.items()},
            "seeds": list(seeds), "better": "min", "judged": "validation", "edge": tuned.on_edge,
        }
        for arm, tuned in found.items()
    }  # fmt: skip


def measure(
    name: str,
    scale: str = "cpu",
    seeds: Sequence[int] = range(8),
    folder: Path | None = None,
    n_jobs: int | None = None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Run what is missing of every reference arm, and keep it as a lab keeps its runs.

    Args:
        name: of the bed.
        scale: "ci", "cpu" or "gpu".
        seeds: none of them a tuning seed.
        folder: of results; the bed's lie below it in ``beds``. None keeps nothing.
        n_jobs: at once, one thread each; left out, 1 at ``ci``, else one per core.

    Returns:
        The results as they are stored, and the mean seconds of a run by arm, of the jobs that ran.

    Raises:
        ValueError: an unknown bed, or a seed that rates were tuned with.
        toolkit.core.runs.measure.JobsFailed: jobs failed; the others are kept.
    """
    module, _ = bed(name)
    if shared := sorted(set(seeds) & set(TUNING_SEEDS)):
        raise ValueError(f"seeds: {shared} are tuning seeds")
    size, slug = named_scale(scale), f"beds/{name}"
    if n_jobs is None:
        n_jobs = 1 if size.name == "ci" else size.threads
    work = folder and folder.resolve() / "running" / f"{name}.{scale}"
    with open_runs(slug, size, folder, folder=work, n_jobs=n_jobs) as runs:
        runs.table(name, module.adapt, jobs(name, scale, seeds))
        found = runs.document() | {"judged": module.JUDGED, "seeds": {name: list(seeds)}}
        spent: dict[str, list[float]] = {}
        for job in found["experiments"][name]["jobs"]:
            if job["check"] in runs.seconds:
                spent.setdefault(job["args"]["arm"], []).append(runs.seconds[job["check"]])
        if folder is not None:
            write_times(folder, slug, scale, runs)
            results.write(folder, found)
            clear(work)
    return found, {arm: float(np.mean(taken)) for arm, taken in spent.items()}


def per_seed(found: Mapping[str, Any], key: str) -> dict[str, np.ndarray]:
    """Arm -> one number a seed (n,), the mean over splits, in the order of the seeds."""
    (experiment,) = found["experiments"].values()
    values: dict[str, dict[int, list[float]]] = {}
    for job in experiment["jobs"]:
        args = job["args"]
        values.setdefault(args["arm"], {}).setdefault(args["seed"], []).append(job["record"][key])
    return {
        arm: np.array([np.mean(v) for _, v in sorted(by.items())]) for arm, by in values.items()
    }


@functools.cache
def factor(n: int, power: float = 0.8, level: float = 0.05) -> float:
    """The difference, in standard deviations of paired differences, that a two-sided t test of
    ``level`` finds with this power from n pairs."""
    from scipy import optimize, stats

    edge = stats.t.ppf(1 - level / 2, n - 1)

    def missing(size: float) -> float:
        shift = size * n**0.5
        return stats.nct.sf(edge, n - 1, shift) + stats.nct.cdf(-edge, n - 1, shift) - power

    high = 0.5  # far above the answer the distribution function is not a number any more
    while missing(high) < 0:
        high *= 1.5
    return float(optimize.brentq(missing, 1e-3, high))


def measures(found: Mapping[str, Any]) -> dict[str, str]:
    """Keys of the records that are judged on the test part, with their titles and units."""
    (experiment,) = found["experiments"].values()
    record = experiment["jobs"][0]["record"]
    loss = "nats per character" if "test_accuracy" not in record else "log-loss (nats)"
    both = {"test": loss, "test_accuracy": "accuracy (%)"}
    return {key: title for key, title in both.items() if key in record}


def table(found: Mapping[str, Any], seconds: Mapping[str, float] | None = None) -> Any:
    """One row per arm: numbers trained, mean and standard deviation over seeds of each measure."""
    import pandas as pd

    (experiment,) = found["experiments"].values()
    trained = {job["args"]["arm"]: job["record"]["trained"] for job in experiment["jobs"]}
    rate = {job["args"]["arm"]: job["args"]["rate"] for job in experiment["jobs"]}
    rows = []
    for arm in arms.NAMES:
        row: dict[str, Any] = {
            "arm": arms.TITLES[arm],
            "numbers trained": f"{trained[arm]:,}",
            "rate": "" if arm == "nothing" else f"{rate[arm]:.3g}",
        }
        for key, title in measures(found).items():
            digits = 2 if "%" in title else 4
            values = per_seed(found, key)[arm]
            spread = values.std(ddof=1) if len(values) > 1 else float("nan")
            row[title] = f"{values.mean():.{digits}f}"
            row[f"deviation over seeds: {title}"] = f"{spread:.{digits}f}"
        if seconds and arm in seconds:
            row["seconds a run"] = f"{seconds[arm]:.1f}"
        rows.append(row)
    return pd.DataFrame(rows)


def differences(found: Mapping[str, Any]) -> Any:
    """One row per pair of arms: mean paired difference, its deviation, what n seeds settle."""
    import pandas as pd

    rows = []
    for key, title in measures(found).items():
        values, digits = per_seed(found, key), 2 if "%" in title else 4
        for one, other in PAIRS:
            gap = values[one] - values[other]
            spread = gap.std(ddof=1) if len(gap) > 1 else float("nan")
            rows.append({
                "measure": title,
                "difference": f"{arms.TITLES[one]} minus {arms.TITLES[other]}",
                "mean": f"{gap.mean():+.{digits}f}",
                "deviation": f"{spread:.{digits}f}",
                "8 seeds settle": f"{factor(8) * spread:.{digits}f}",
                "20 seeds settle": f"{factor(20) * spread:.{digits}f}",
            })  # fmt: skip
    return pd.DataFrame(rows)
