"""What matched, and what it costs."""

from __future__ import annotations

from typing import Any

import pandas as pd


def report(adapted: Any) -> pd.DataFrame:
    """One row per adapted layer, then one per module that a pattern named and no method acts on.

    Columns: layer, kind, rows, cols, weight (numbers in the frozen weight), trained (numbers
    trained there), share (trained / weight), and whatever the method adds through ``facts()`` of
    its adapter; ``left out`` (the reason) where there is any such module.
    """
    rows = []
    for name, placed in adapted.sites.items():
        site = placed.site
        trained = sum(p.numel() for p in placed.layer.adapter.parameters())
        row = {
            "layer": name,
            "kind": site.kind,
            "rows": site.rows,
            "cols": site.cols,
            "weight": site.rows * site.cols,
            "trained": trained,
            "share": trained / max(1, site.rows * site.cols),
        }
        facts = getattr(placed.layer.adapter, "facts", None)
        rows.append(row | (facts() if facts is not None else {}))
    rows += [{"layer": n, "trained": 0, "left out": why} for n, why in adapted.left_out.items()]
    return pd.DataFrame(rows)


def costs(adapted: Any) -> dict[str, int]:
    """Four numbers, because no one of them tells what a method costs.

    Returns:
        ``trained``: numbers that receive gradients.
        ``changed``: numbers of the model that differ from the base once merged: those that train
        now or ever did.
        ``stored_bytes``: bytes that one task adds on disk.
        ``training_bytes``: bytes of gradients, of AdamW's two moments (float32 each, or the
        tensor's own dtype) and of the method's own state. Activations are not in it: they
        depend on the batch.
    """
    parameters = adapted.parameters()
    trained = sum(p.numel() for p in parameters)
    changed = sum(_changed(placed) for placed in adapted.sites.values())
    changed += sum(p.numel() for p in adapted.extra.values())
    kept = [t for a in adapted.adapters.values() for t in a.state_dict().values()]
    kept += list(adapted.extra.values())
    training = 3 * sum(p.nbytes for p in parameters)
    if adapted.controller is not None:
        # a history is kept for plots, on the CPU, and training does not need it
        state = adapted.controller.state().items()
        training += sum(t.nbytes for key, t in state if "history." not in key)
    return {
        "trained": trained,
        "changed": changed,
        "stored_bytes": sum(t.nbytes for t in kept),
        "training_bytes": training,
    }


def _changed(placed: Any) -> int:
    """Numbers of a site that differ from the base once merged."""
    adapter = placed.layer.adapter
    if hasattr(adapter, "changed"):
        return adapter.changed
    # a layer that lost its whole rank (AdaLoRA after compact()) stays as it was
    trains = any(t.numel() for t in adapter.parameters())
    return placed.site.rows * placed.site.cols if trains else 0
