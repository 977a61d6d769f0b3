"""What is measured about the three regimes: which dense training prunes best, and who can tell.

Two beds. Pairs: two of scikit-learn's digits side by side, 100 classes. MNIST: its images shrunk to
14 x 14 pixels. A network of four hidden layers with batch normalisation trains at several batch
sizes for equally many steps, is pruned, and retrained in copies that differ in the order of the
data alone. Data, weights and orders are drawn anew for every seed; one job trains all networks of a
seed at once, as lanes.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.core import data, nets
from toolkit.core.evidence import Claim, Condition, Fact, Measured
from toolkit.core.lanes import Lane, LaneNet, take
from toolkit.core.runs.jobs import grid
from toolkit.core.runs.measure import Runs
from toolkit.core.scale import Scale
from toolkit.core.seeds import generator
from toolkit.diagnose import three_regime
from toolkit.labs.diagnose import cases
from toolkit.labs.diagnose.cases.temperature import walk
from toolkit.labs.diagnose.grid import dense_networks, retrained_copies
from toolkit.labs.lab import Found, Lab, search_seeds, two_blocks

BEDS = {"pairs": "pairs of digits", "mnist": "MNIST"}
BATCHES = (256, 64, 32, 16, 8)
"""From cold to hot."""
DENSITIES = {"pairs": (0.06, 0.15, 0.6), "mnist": (0.04, 0.12, 0.6)}
WIDTH, RETRAINED_AT, EPSILON = 32, 32, 0.05
COPIES = 4
"""Of every cell: the rule sees two, a fixed batch size may keep the best of all."""
LENGTHS = (1.0, 0.6, 0.4)
"""Shares of the dense run that other axes of temperature train for, from cold to hot."""
PARTS = ("test", "validation")


def normed(*widths: int) -> Any:
    """Builds a perceptron with batch normalisation after each hidden layer."""

    def make(draw: torch.Generator) -> nn.Module:
        parts: list[nn.Module] = []
        for a, b in itertools.pairwise(widths[:-1]):
            parts += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU()]
        return nets.initialise(nn.Sequential(*parts, nn.Linear(*widths[-2:])), draw)

    return make


@functools.lru_cache(maxsize=1)
def mnist(small: bool) -> tuple[tuple[Tensor, Tensor], ...]:
    """Images (n, 196) of 14 x 14 pixels: to draw from, held out, and the 10,000 of the test set.

    The small form has scikit-learn's digits of 8 x 8 pixels in their place.
    """
    images = data.digits(seed=0) if small else data.load("mnist")
    parts = []
    for x, y in ((images.x_train, images.y_train), (images.x_test, images.y_test)):
        pixels = torch.as_tensor(x).float()[:, None]
        shrunk = F.interpolate(pixels, 14) if small else F.avg_pool2d(pixels, 2) / 255
        parts.append((shrunk.flatten(1), torch.as_tensor(y).long()))
    (x, y), last = parts
    held = len(y) // 6
    return (x[:-held], y[:-held]), (x[-held:], y[-held:]), last


def task(bed: str, seed: int, count: int, small: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and labels of one seed: ``count`` to train, 2,000 held out at most, and to test."""
    draw = np.random.default_rng([seed, 7])
    if bed == "mnist":
        train, held, test = mnist(small)
        rows, others = (draw.permutation(len(part[1])) for part in (train, held))
        rows, others = rows[:count], others[: min(count, 2000)]
        return {
            "train": (train[0][rows], train[1][rows]),
            "validation": (held[0][others], held[1][others]),
            "test": test,
        }
    images, found = data.digits(seed=seed), {}
    x, y = images.x_train.reshape(len(images.y_train), -1), images.y_train
    last = images.x_test.reshape(len(images.y_test), -1), images.y_test
    apart = {"train": (x[:-360], y[:-360]), "validation": (x[-360:], y[-360:]), "test": last}
    for name, (pixels, labels) in apart.items():
        left, right = draw.integers(len(labels), size=(2, count))
        both = np.concatenate([pixels[left], pixels[right]], 1)
        found[name] = (
            torch.as_tensor(both, dtype=torch.float32),
            torch.as_tensor(10 * labels[left] + labels[right]).long(),
        )
    return found


def grid_run(
    bed: str,
    axis: str,
    values: list[float],
    densities: list[float],
    copies: int,
    seeds: list[int],
    steps: int,
    count: int,
    batch: int,
    small: bool,
) -> dict[str, Any]:
    """All networks of some seeds: dense along one axis of temperature, pruned, retrained in copies.

    Every entry of the record lists one result a seed, which is a list over temperatures (from cold
    to hot), then densities, then copies. ``lmc``, ``cka`` and ``path`` compare the first two copies
    of a cell, ``across`` a copy of the coldest with one of the hottest network.

    Args:
        bed: of :data:`BEDS`.
        axis: of temperature: batch, checkpoint, schedule or rho.
        values: on that axis, from cold to hot.
        densities: shares of weights kept.
        copies: retrained copies of each cell.
        seeds: of data, weights and orders.
        steps: of the dense runs and of the retraining.
        count: training examples of a seed.
        batch: of the dense runs, where it is not the axis.
        small: quick data.

    Raises:
        FloatingPointError: a network diverged.
    """
    torch.set_num_threads(1)
    sets = [task(bed, seed, count, small) for seed in seeds]
    x, y = (torch.cat([own["train"][k] for own in sets]) for k in (0, 1))
    rows = torch.arange(len(x)).view(len(seeds), -1)
    make = normed(x.shape[1], *[WIDTH] * 4, 100 if bed == "pairs" else 10)
    lanes = seeds if axis == "checkpoint" else [s for s in seeds for _ in values]
    dense, table = dense_networks(
        make, x, y, axis, values, seeds, Lane(steps=steps, batch=batch),
        rows=rows[[seeds.index(seed) for seed in lanes]], workers=1,
    )  # fmt: skip
    each = len(values) * len(densities) * copies
    again = Lane(steps=steps, batch=RETRAINED_AT, order=1000)
    kept, frame = retrained_copies(
        make, dense, table, x, y, densities, copies, again,
        rows=rows.repeat_interleave(each, 0), workers=1,
    )  # fmt: skip
    if table.diverged.any() or frame.diverged.any():
        raise FloatingPointError(f"{axis} {values}, seeds {seeds}: a network diverged")
    found: dict[str, Any] = {}
    for place, own in enumerate(sets):
        first, many = place * len(values), len(values)
        record = _measured(
            make, own, take(dense, range(first, first + many)),
            take(kept, range(place * each, (place + 1) * each)), densities, copies,
        )  # fmt: skip
        for name, value in record.items():
            found.setdefault(name, []).append(value)
    return found


def _measured(
    make: Any, sets: Any, dense: Any, kept: Any, densities: list[float], copies: int
) -> dict[str, Any]:
    """What is measured of one seed's networks."""
    net = LaneNet(make(generator(0, "template")))
    x, y = sets["train"]
    shape = len(dense["0.weight"]), len(densities)

    def error(states: Any, part: str, *form: int) -> Any:
        return _plain(three_regime.errors(net, states, *sets[part]).view(*form))

    first = torch.arange(shape[0] * shape[1]) * copies
    one, two = take(kept, first), take(kept, first + 1)
    along = three_regime.path_errors(net, one, two, x, y)
    mine, other = (torch.softmax(net.predict(states, x), -1) for states in (one, two))
    similar = three_regime.linear_cka(mine, other, undefined="nan")
    ends = take(one, [0]), take(one, [(shape[0] - 1) * shape[1]])
    across = three_regime.path_errors(net, *ends, x, y)
    cut = take(dense, torch.arange(shape[0]).repeat_interleave(shape[1]))
    names = three_regime.prunable(net.template)
    for name, mask in three_regime.magnitude_masks(cut, [*densities] * shape[0], names).items():
        cut[name] = cut[name] * mask
    sharp = three_regime.hessian_top(net, dense, x[:300], y[:300], generator(0, "sharp"), 12)
    return {
        **{part: error(kept, part, *shape, copies) for part in (*PARTS, "train")},
        "lmc": _plain(three_regime.lmc(along).view(shape)),
        "path": _plain(along.view(*shape, -1)),
        "cka": _plain(similar.view(shape)),
        "across": _plain(three_regime.lmc(across)[0]),
        "cut": error(cut, "test", *shape),
        **{f"dense_{part}": error(dense, part, -1) for part in (*PARTS, "train")},
        "dense_loss": _plain(three_regime.losses(net, dense, x, y)),
        "sharpness": _plain(sharp),
    }


def _plain(values: Tensor) -> Any:
    """A number or lists of numbers, with six decimals."""
    return values.double().round(decimals=6).tolist()


def measure(runs: Runs, scale: Scale) -> None:
    """The grid of both beds, and on pairs two ways to train for fewer steps."""
    blocks = two_blocks(scale.pick(ci=4, cpu=20, gpu=20))
    size = {
        "copies": scale.pick(ci=2, cpu=COPIES, gpu=COPIES),
        "steps": scale.pick(ci=8, cpu=600, gpu=600),
        "count": scale.pick(ci=256, cpu=2000, gpu=2000),
        "batch": RETRAINED_AT,
        "small": scale.pick(ci=True, cpu=False, gpu=False),
    }
    jobs = []
    for bed, densities in DENSITIES.items():
        runs.blocks(bed, blocks)
        some = list(densities[:: scale.pick(ci=2, cpu=1, gpu=1)])
        cell = {"bed": bed, "axis": "batch", "values": list(BATCHES), "densities": some}
        jobs += grid(**{name: [value] for name, value in cell.items()}, seeds=_jobs(blocks), **size)
    runs.table("grid", grid_run, jobs)
    blocks = two_blocks(scale.pick(ci=2, cpu=8, gpu=20))
    seeds = [seed for block in blocks for seed in block]
    size |= {"copies": 2}
    runs.table("length", grid_run, grid(
        bed="pairs", axis=["checkpoint", "schedule"],
        values=[[round(share * size["steps"]) for share in LENGTHS]],
        densities=[[DENSITIES["pairs"][0], DENSITIES["pairs"][-1]]], seeds=_jobs([seeds]), **size,
    ))  # fmt: skip


def _jobs(blocks: list[list[int]]) -> list[list[int]]:
    """At most five seeds a job: their dense networks train side by side."""
    return [block[k : k + 5] for block in blocks for k in range(0, len(block), 5)]


def cells(found: Found, bed: str, experiment: str = "grid", axis: str = "batch") -> Any:
    """One row for every seed, temperature and density; errors, LMC and so on as shares.

    ``test_error`` is the mean over copies; ``copies`` lists (held-out error, test error) of each.
    """
    import pandas as pd

    runs, rows = found[experiment], []
    for run in runs[(runs.bed == bed) & (runs.axis == axis)].to_dict("records"):
        for s, seed in enumerate(run["seeds"]):
            for t, value in enumerate(run["values"]):
                dense = {f"dense_{k}": run[f"dense_{k}"][s][t] for k in (*PARTS, "train", "loss")}
                for d, density in enumerate(run["densities"]):
                    own = {name: run[name][s][t][d] for name in (*PARTS, "train")}
                    rows.append({
                        "seed": seed, "temperature": t, "value": value, "density": density,
                        "test_error": float(np.mean(own["test"])),
                        "train_error": float(np.mean(own["train"])),
                        "copies": list(zip(own["validation"], own["test"], strict=True)),
                        **{name: run[name][s][t][d] for name in ("lmc", "cka", "cut", "path")},
                        **dense, "sharpness": run["sharpness"][s][t], "across": run["across"][s],
                    })  # fmt: skip
    return pd.DataFrame(rows)


def best_of(copies: list[tuple[float, float]], count: int | None = None) -> float:
    """Test error of the copy with the lowest held-out error, of the first ``count``."""
    return min(copies[:count])[1]


def policies(table: Any) -> Any:
    """What each way to choose the batch size ends with: one row per seed, density and policy.

    The rule starts from the batch of the retraining, in the middle of the grid. ``error`` is a test
    error in points, ``retrained`` counts the copies that were needed, ``batch`` was chosen.
    """
    import pandas as pd

    rows = []
    for (seed, density), column in table.sort_values("temperature").groupby(["seed", "density"]):
        copies, batches = column["copies"].tolist(), column["value"].tolist()
        start, every = batches.index(RETRAINED_AT), len(copies[0])
        connected = (column["lmc"] >= -EPSILON).to_numpy()
        end, visited = walk(connected, start, -1 if connected[start] else 1)
        kept = [best_of(own) for own in copies]
        looked = min(range(len(batches)), key=lambda at: copies[at][0][0])
        made = {
            "rule": (end, best_of(copies[end], 2), 2 * visited),
            "held-out": (looked, copies[looked][0][1], len(batches)),
            "oracle": (int(np.argmin(kept)), min(kept), every * len(batches)),
            "random": (None, float(np.mean([best_of(own, 1) for own in copies])), 1),
        } | {f"batch {b}": (k, kept[k], every) for k, b in enumerate(batches)}
        for policy, (at, error, retrained) in made.items():
            rows.append({
                "seed": seed, "density": density, "policy": policy, "error": 100 * error,
                "retrained": retrained, "batch": None if at is None else batches[at],
            })  # fmt: skip
    return pd.DataFrame(rows)


def family(table: Any) -> Any:
    """Case study 2 on the networks of all batch sizes; held-out error in place of test error."""
    models = table.rename(columns={"value": "model", "dense_loss": "dense_train_loss"})
    models["dense_test_error"] = models.pop("dense_validation")
    return cases.best_of_family(models, EPSILON)


def _flip(text: str, which: str, **parts: Any) -> Claim:
    return Claim(
        text=text, whose="paper", unit="points", margin=1.0, better="less",
        reason="one point is little beside the noise of choosing a batch size by hand",
        conditions=(
            Condition("MNIST", n=20, spread=1.5, support=(-100.0, 100.0), decides=True),
            Condition("pairs of digits", n=20, spread=2.0, support=(-100.0, 100.0)),
        ),
        **parts,
        id=which,
    )  # fmt: skip


def _choice(**parts: Any) -> Claim:
    fixed = BATCHES if parts["id"] == "rule" else ()
    return Claim(
        unit="points", margin=0.5, better="less",
        reason="half a point of error is hardly worth further retraining",
        conditions=(
            Condition("MNIST", n=20, spread=0.8, support=(-100.0, 100.0), decides=True, grid=fixed),
            Condition("pairs of digits", n=20, spread=1.0, support=(-100.0, 100.0), grid=fixed),
        ),
        **parts,
    )  # fmt: skip


CLAIMS = (
    _flip(
        "With few weights kept, hot dense training prunes better than cold.",
        "sparse",
        quantity="test error at the lowest density, batches 16 and 8 below batches 256 and 64",
    ),
    _flip(
        "With many weights kept, cold dense training prunes better than hot.",
        "full",
        quantity="test error at the highest density, batches 256 and 64 below batches 16 and 8",
    ),
    Claim(
        "barrier",
        "With few weights kept, copies of a cold network are parted by a deeper barrier than those "
        "of a hot one.",
        whose="paper", unit="points of training error", margin=5.0, better="less",
        quantity="LMC at the lowest density, from batch 256 below from batch 8",
        reason="five points are the depth from which the rule speaks of Regime I",
        conditions=(
            Condition("MNIST", n=20, spread=6.0, support=(-100.0, 100.0), decides=True),
            Condition("pairs of digits", n=20, spread=8.0, support=(-100.0, 100.0)),
        ),
    ),
    _choice(
        id="rule", whose="paper",
        text="Turning the temperature by connectivity beats every fixed batch size.",
        quantity="test error, mean over densities: the rule's end, better of two copies, below the "
        "best fixed batch size, best of four copies",
    ),
    _choice(
        id="family", whose="paper",
        text="LMC and CKA choose a better network to prune than dense accuracy does.",
        quantity="test error after pruning, mean over densities: chosen by LMC and CKA below "
        "chosen by held-out error of the dense network",
    ),
    _choice(
        id="look", whose="ours",
        text="With about as many retrainings, held-out error chooses better than connectivity.",
        quantity="test error, mean over densities: lowest held-out error of one copy for each "
        "batch size below the rule's end",
    ),
)  # fmt: skip


def judge(found: Found) -> dict[str, dict[str, Measured]]:
    """What was measured for each claim, by condition."""
    measured: dict[str, dict[str, Measured]] = {claim.id: {} for claim in CLAIMS}
    for bed, name in (("mnist", "MNIST"), ("pairs", "pairs of digits")):
        for claim, part in _of_bed(cells(found, bed), found.blocks(bed)).items():
            measured[claim][name] = part
    return measured


def _of_bed(table: Any, blocks: list[list[int]]) -> dict[str, Measured]:
    apart: dict[str, Any] = {"blocks": blocks, "tuning_seeds": search_seeds()}
    ends = {"sparse": table.density.min(), "full": table.density.max()}
    made = {}
    for claim, density in ends.items():
        column = table[table.density == density]
        sides = {
            side: (100 * column[column.value.isin(batches)].groupby("seed").test_error.mean())
            for side, batches in {"cold": BATCHES[:2], "hot": BATCHES[-2:]}.items()
        }
        ours, theirs = ("hot", "cold") if claim == "sparse" else ("cold", "hot")
        made[claim] = Measured(
            sides[ours].to_dict(), sides[theirs].to_dict(),
            # retraining is known to mend what pruning broke
            control=(100 * column.groupby("seed").test_error.mean()).to_dict(),
            nothing=(100 * column.groupby("seed").cut.mean()).to_dict(), **apart,
        )  # fmt: skip
    column = table[table.density == ends["sparse"]].set_index("seed")
    lmc = {b: (100 * column[column.value == b].lmc).to_dict() for b in (BATCHES[0], BATCHES[-1])}
    made["barrier"] = Measured(
        lmc[BATCHES[0]], lmc[BATCHES[-1]],
        # copies of different dense networks are known not to be connected
        control=(100 * column[column.value == BATCHES[0]].across).to_dict(),
        nothing=dict.fromkeys(lmc[BATCHES[0]], 0.0), **apart,
    )  # fmt: skip
    ends_with = policies(table).groupby(["policy", "seed"]).error.mean()
    picks = 100 * family(table).groupby(["policy", "seed"]).test_error.mean()
    bed: dict[str, Any] = {
        "control": ends_with["oracle"].to_dict(),
        "nothing": ends_with["random"].to_dict(),
    }
    rule = ends_with["rule"].to_dict()
    fixed = {b: ends_with[f"batch {b}"].to_dict() for b in BATCHES}
    made["rule"] = Measured(rule, fixed, **bed, **apart)
    made["look"] = Measured(ends_with["held-out"].to_dict(), rule, **bed, **apart)
    made["family"] = Measured(
        picks["rule"].to_dict(), picks["dense_error"].to_dict(), control=picks["oracle"].to_dict(),
        nothing=picks["random"].to_dict(), **apart,
    )  # fmt: skip
    return made


def facts(found: Found) -> list[Fact]:
    """Counts and identities, checked by computing them."""
    make = normed(128, *[WIDTH] * 4, 100)
    network = make(generator(0, "template"))
    names = three_regime.prunable(network)
    sizes = [network.get_parameter(name).numel() for name in names]
    density = DENSITIES["pairs"][0]
    masks = three_regime.magnitude_masks(network, density, names)
    kept = [int(masks[name].sum()) for name in names]
    wanted = [max(1, n - round((1 - density) * n)) for n in sizes]
    slope = torch.linspace(0.125, 0.25, 11)
    turned = (three_regime.lmc(slope) + three_regime.lmc(slope.flip(0))).item()
    return [
        Fact("count", f"Pruning to {100 * density:g} % removes round((1 - d) n) weights of every "
             "hidden layer, none of the classifier.", kept == wanted, sum(kept), "weights"),
        Fact("order", "On a straight slope LMC changes its sign with the order of the pair.",
             abs(turned) < 1e-6, three_regime.lmc(slope).item(), "share, of a slope of 0.125"),
    ]  # fmt: skip


LAB = Lab(
    slug="three_regime",
    part="diagnose",
    measure=measure,
    judge=judge,
    claims=CLAIMS,
    facts=facts,
    data=("digits", "mnist"),
)
