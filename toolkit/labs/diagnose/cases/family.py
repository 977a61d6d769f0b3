"""Case study 2: which of several trained models to prune."""

from __future__ import annotations

import pandas as pd

from toolkit.diagnose.three_regime.rule import TINY, depth
from toolkit.diagnose.three_regime.tables import checked


def best_of_family(models: pd.DataFrame, epsilon: float = 0.05) -> pd.DataFrame:
    """Case study 2: which of several trained models to prune, without knowing their training.

    The rule drops the models in Regime I (LMC < -epsilon) and takes the highest CKA; if all are in
    Regime I it takes the highest LMC. Ties go to the first in the table's order. Baselines take
    the lowest dense test error, dense loss, sharpness (top Hessian eigenvalue) or trace, if there;
    ``random`` is the mean over the family; ``oracle`` has the lowest test error after pruning.

    Args:
        models: One row per seed, model and density, with columns lmc, cka, dense_test_error,
            dense_train_loss, sharpness, test_error, and perhaps trace.
        epsilon: Depth of Regime I, as a share.

    Returns:
        One row per seed, density and policy: model (None for ``random``), test_error, regret, and
        ``all_poor``, whether the whole family was in Regime I.

    Raises:
        ValueError: If the table is malformed or a family has one model.
    """
    baselines = {
        "dense_error": "dense_test_error",
        "dense_loss": "dense_train_loss",
        "sharpness": "sharpness",
        **({"trace": "trace"} if "trace" in getattr(models, "columns", ()) else {}),
        "oracle": "test_error",
    }
    table = checked(models, ["lmc", "cka", *baselines.values()], "model", 2, "models")
    table = table.reset_index(drop=True)
    limit, rows = -depth(table, epsilon) - TINY, []
    for (seed, density), family in table.groupby(["seed", "density"]):
        good = family[family["lmc"] >= limit]
        picks = {"rule": family["lmc"].idxmax() if good.empty else good["cka"].idxmax()}
        picks |= {policy: family[column].idxmin() for policy, column in baselines.items()}
        chosen = {p: (family["model"][at], family["test_error"][at]) for p, at in picks.items()}
        chosen["random"] = (None, family["test_error"].mean())
        for policy, (model, error) in chosen.items():
            regret = error - family["test_error"].min()
            rows.append((seed, density, policy, model, error, regret, good.empty))
    names = ["seed", "density", "policy", "model", "test_error", "regret", "all_poor"]
    return pd.DataFrame(rows, columns=names)
