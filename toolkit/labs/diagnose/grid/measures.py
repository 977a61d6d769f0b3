"""What is measured on the retrained copies: errors, connectivity, similarity."""

from __future__ import annotations

from itertools import combinations

import pandas as pd
import torch
from torch import Tensor

from toolkit.core.lanes.nets import LaneNet, Make, States, take
from toolkit.core.seeds import generator
from toolkit.diagnose.three_regime.connectivity import barrier, lmc, path_errors
from toolkit.diagnose.three_regime.evaluation import errors
from toolkit.diagnose.three_regime.similarity import linear_cka

IMAGES = 6464  # 101 batches of 64: what the official code compares


def measure(
    make: Make,
    copies: States,
    frame: pd.DataFrame,
    train_set: tuple[Tensor, Tensor],
    test_set: tuple[Tensor, Tensor],
    images: int = IMAGES,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Errors, connectivity and similarity of every cell.

    Args:
        make: builds a network.
        copies, frame: what ``retrained_copies`` returned.
        train_set: inputs and labels as they were trained on.
        test_set: inputs and labels for the test error.
        images: training inputs, from the first on, whose softmax outputs CKA compares.

    Returns:
        Two tables. Cells, one row per seed, temperature and density: ``test_error``,
        ``train_error`` (shares, means over copies), ``lmc``, ``barrier`` (shares, means over
        pairs), ``cka`` (mean over pairs; NaN where a network gives one answer to everything).
        Paths, one row per pair and point: ``t``, ``train_error``. Cells with a copy that diverged
        have NaN in place of numbers.
    """
    net = LaneNet(make(generator(0, "template")).to(train_set[0].device))
    x, y = train_set
    frame = frame.assign(
        test_error=errors(net, copies, *test_set).cpu().numpy(),
        train_error=errors(net, copies, x, y).cpu().numpy(),
    )
    keys = ["seed", "temperature", "value", "density"]
    cells, pairs = [], []
    for key, members in frame.groupby(keys, sort=False):
        broken = bool(members.diverged.any())
        facts = dict(zip(keys, key, strict=True))
        numbers = members[["test_error", "train_error"]].mean()
        cells.append(
            facts | {"diverged": broken} | (numbers * (float("nan") if broken else 1)).to_dict()
        )
        if not broken:
            pairs += [(len(cells) - 1, i, j) for i, j in combinations(members.index, 2)]
    cells, per_pair, paths = pd.DataFrame(cells), [], []
    size = max(1, 4096 // max(1, len(x) // 256))
    for begin in range(0, len(pairs), size):
        part = pairs[begin : begin + size]
        a, b = take(copies, [p[1] for p in part]), take(copies, [p[2] for p in part])
        along = path_errors(net, a, b, x, y)
        one, other = (torch.softmax(net.predict(s, x[:images]), -1) for s in (a, b))
        numbers = torch.stack(
            [lmc(along), barrier(along), linear_cka(one, other, undefined="nan")], 1
        ).cpu()
        for (cell, i, j), row, line in zip(
            part, numbers.tolist(), along.cpu().tolist(), strict=True
        ):
            per_pair.append(
                {"cell": cell, **dict(zip(("lmc", "barrier", "cka"), row, strict=True))}
            )
            pair = f"{frame.loc[i, 'copy']}-{frame.loc[j, 'copy']}"
            paths += [
                {"cell": cell, "pair": pair, "t": k / (len(line) - 1), "train_error": e}
                for k, e in enumerate(line)
            ]
    means = pd.DataFrame(per_pair).groupby("cell").mean()
    paths = pd.DataFrame(paths).join(cells[keys], on="cell").drop(columns="cell")
    return cells.join(means), paths
