"""Tables of predictions with class names, brought into the order of the classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor


def arguments(
    frame: Any,
    counts: Any,
    label: Hashable,
    prediction: Hashable | None,
    scores: Sequence[Hashable] | None,
    others: Mapping[str, Any],
) -> dict[str, Any]:
    """The arguments of ``Diagnosis`` from those of ``Diagnosis.from_frame``.

    Raises:
        TypeError: a frame that is no table, or a table in place of counts.
        ValueError: both or neither of ``prediction`` and ``scores``, a missing column, or a name
            without a count.
    """
    if (prediction is None) == (scores is None):
        raise ValueError("give either prediction (a column) or scores (K columns), not both.")
    if isinstance(scores, str):
        raise ValueError(f"scores={scores!r}: give a list of K columns, or use prediction.")
    wanted = [label, *([prediction] if scores is None else scores)]
    frame = table_of(frame, wanted)
    if hasattr(counts, "columns"):
        raise TypeError(
            f"counts is a table ({type(counts).__name__}): give a mapping from class to number, as "
            'in dict(zip(counts["label"], counts["count"])).'
        )
    if not hasattr(counts, "__len__"):
        raise TypeError(f"counts is a {type(counts).__name__}: give a mapping or (K,) numbers.")
    found: dict[str, Any] = dict(others)
    names: Sequence[Hashable] = range(len(counts))
    if isinstance(counts, Mapping | pd.Series):
        names = list(counts.keys())
        counts = in_order(counts, names, "counts")
        found.setdefault("names", names)
    for key in ("prior", "d_groups"):
        if isinstance(found.get(key), Mapping | pd.Series):
            found[key] = in_order(found[key], names, key)
    if scores is None:
        answers = places(frame[prediction], names)
    else:
        answers = scores_of(frame, list(scores), names)
    labels = places(frame[label], names)
    return {"predictions_or_logits": answers, "labels": labels, "counts": counts, **found}


def table_of(frame: Any, wanted: Sequence[Hashable]) -> pd.DataFrame:
    """The wanted columns of a table: pandas, polars, Arrow, or a mapping from name to column.

    Raises:
        TypeError: no table, or one that is not computed yet.
        ValueError: a missing column, or columns of different lengths.
    """
    kind = f"{type(frame).__module__.partition('.')[0]} {type(frame).__name__}"
    if hasattr(frame, "collect") and not hasattr(frame, "to_pandas"):
        raise TypeError(f"frame is a {kind}, not computed yet: give frame.collect().")
    if isinstance(frame, Mapping):
        there = list(frame)
    elif hasattr(frame, "__getitem__") and hasattr(frame, "columns"):
        # of an Arrow table these are the columns themselves
        there = list(getattr(frame, "column_names", frame.columns))
    else:
        raise TypeError(
            f"frame is a {kind}: give a pandas DataFrame (many tables have .to_pandas()), or a "
            "mapping from names to columns."
        )
    missing = [column for column in wanted if column not in there]
    if missing:
        raise ValueError(f"frame lacks the columns {missing}: it has {there}.")
    if twice := [column for column in wanted if there.count(column) > 1]:
        raise ValueError(f"frame has the columns {twice} more than once: rename all but one.")
    if isinstance(frame, pd.DataFrame):
        return frame
    found = {column: column_of(frame[column]) for column in wanted}
    lengths = {column: len(values) for column, values in found.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"frame has columns of different lengths: {lengths}.")
    return pd.DataFrame(found)


def column_of(column: Any) -> np.ndarray:
    """A column of any library as an array of NumPy."""
    if isinstance(column, Tensor):
        column = column.detach().cpu()
    return np.asarray(column)


def in_order(values: Any, names: Sequence[Hashable], what: str) -> np.ndarray:
    """Values of a mapping or Series (class name to number) in the order of ``names``.

    Raises:
        ValueError: a name twice, missing, or without a class.
    """
    keys, known = list(values.keys()), set(names)
    twice = [key for key, times in Counter(keys).items() if times > 1]
    odd = twice + [key for key in keys if key not in known] + sorted(known - set(keys), key=str)
    if odd:
        raise ValueError(f"{what} must name every class of counts once; see {odd[0]!r}.")
    return np.asarray([values[name] for name in names])


def places(column: pd.Series, names: Sequence[Hashable]) -> np.ndarray:
    """A column of class names as class numbers.

    Raises:
        ValueError: a name that ``names`` does not hold.
    """
    place = {name: k for k, name in enumerate(names)}
    try:
        found = np.array([place.get(value, -1) for value in column.tolist()], dtype=np.int64)
    except TypeError as error:
        raise ValueError(
            f"frame[{column.name!r}] holds {type(column.iloc[0]).__name__}, not class names: give "
            "one name or number for each example."
        ) from error
    if (found < 0).any():
        row = int(np.argmax(found < 0))
        raise ValueError(
            f"frame[{column.name!r}] holds {column.iloc[row]!r} (row {row}), and counts do not: "
            "give counts as a mapping from every class name to its training examples (or 0)."
        )
    return found


def scores_of(frame: pd.DataFrame, scores: Sequence[Hashable], names: Sequence[Hashable]) -> Any:
    """Columns of scores as an array (N, K).

    Raises:
        ValueError: another number of columns than classes, columns named like the classes in
            another order, or text in them.
    """
    if len(scores) != len(names) or len(set(scores)) != len(scores):
        raise ValueError(
            f"scores has {len(scores)} columns: give one for each of {len(names)} classes."
        )
    words, wanted = [str(s) for s in scores], [str(n) for n in names]
    if words != wanted and sorted(words) == sorted(wanted):
        raise ValueError(
            f"scores are named like the classes, but in another order (first {words[0]!r}, counts "
            f"{wanted[0]!r}): use the order of counts, scores=list(counts.keys())."
        )
    try:
        return frame[scores].to_numpy(dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"scores: a column is not of numbers ({error}).") from error
