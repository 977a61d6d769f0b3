"""Words of a diagnosis: what the numbers say, and what they do not."""

from __future__ import annotations

import math
from collections.abc import Sequence

from toolkit.diagnose.longtail_bias.wording import Diagnosed, classes_of, percent

STILL = 0.5  # share of the training prior from which on it counts as still there
GONE = 0.15  # share up to which it counts as gone; logits of small scale show less than they hold
SMALL = 5  # cells of fewer classes are read with care
LIKE = 0.3  # rank correlations within this are next to nothing


def reading(d: Diagnosed) -> str:
    """One line per topic, each of one or two sentences."""
    lines = [_overall(d), _gap(d, "data")]
    if d.prior is None:
        lines.append(
            "Parameter imbalance: not looked at. Pass prior=, or zero_shot=(logits, labels) of the "
            "untouched foundation model on held-out data."
        )
    else:
        lines += [_gap(d, "parameter"), _worst(d), _related(d)]
    return "\n".join(line for line in [*lines, _left(d), _next(d)] if line)


def _points(share: float) -> str:
    made = f"{100 * share:.1f}"
    return "0.0" if made == "-0.0" else made


def _between(ends: Sequence[float]) -> str:
    return f"[{_points(ends[0])}, {_points(ends[1])}]"


def _overall(d: Diagnosed) -> str:
    each = d.per_class["accuracy"]
    words = f"Accuracy: {percent(d.accuracy)}, the mean over {classes_of(each.count())}; "
    words += f"{percent(d.micro)} of all answers are right."
    missing = int(each.isna().sum())
    if missing:
        words += f" {classes_of(missing)} without test examples left out."
    return f"{words} In brackets: {100 * d.level:g} % intervals over classes."


def _cut(d: Diagnosed, kind: str) -> str:
    if kind == "parameter":
        return "thirds by the foundation model's prior"
    return {
        "thresholds": "more than 100, 20 to 100, and fewer than 20 training examples",
        "thirds": "thirds by training count, as 100 and 20 examples leave a group empty",
        "given": "groups as given",
    }[d.cut]


def _arbitrary(d: Diagnosed, kind: str) -> bool:
    """Whether equal values were cut apart, so that Many and Few differ by nothing."""
    if kind == "data" and d.cut != "thirds":
        return False
    values, groups = (d.counts, d.d_groups) if kind == "data" else (d.prior, d.p_groups)
    return bool(values[groups == 0].min() <= values[groups == 2].max())


def _shown(d: Diagnosed, kind: str) -> int:
    """1 if Few is below Many beyond the interval, -1 if above, 0 if neither is shown."""
    ends = getattr(d, f"{kind}_interval")
    if ends is None or _arbitrary(d, kind):
        return 0
    return int(ends[0] > 0) - int(ends[1] < 0)


def _gap(d: Diagnosed, kind: str) -> str:
    table, gap, ends = (getattr(d, f"{kind}{end}") for end in ("", "_gap", "_interval"))
    scores = ", ".join(f"{g} {percent(a)}" for g, a in table["accuracy"].items())
    words = f"{kind.capitalize()} imbalance: {scores} ({_cut(d, kind)}). "
    if _arbitrary(d, kind):
        what = "training count" if kind == "data" else "prior"
        return f"{words}Classes of one {what} were cut apart, so these groups say nothing about it."
    if math.isnan(gap):
        return f"{words}Without a tested class in Many and in Few there is no gap to speak of."
    if ends is None:
        return (
            f"{words}Many minus Few is {_points(gap)} points, without an interval (it takes two "
            "classes in each, and some spread): not shown by this test set."
        )
    shown = _shown(d, kind)
    if shown == 0:
        return (
            f"{words}Many minus Few is {_points(gap)} points {_between(ends)}, which includes 0: "
            f"a {kind} gap is not shown by this test set."
        )
    way = "Few is below Many" if shown > 0 else "The gap is turned round, Few is above Many"
    span = ends if shown > 0 else (-ends[1], -ends[0])
    return f"{words}{way}, by {_points(abs(gap))} points {_between(span)}."


def _worst(d: Diagnosed) -> str:
    row = d.cells.loc[d.cells["accuracy"].idxmin()]
    words = f"Worst of the nine cells: {row['data']} by data, {row['parameter']} by parameter, "
    words += f"with {percent(row['accuracy'])} in {classes_of(row['classes'])}."
    if row["classes"] < SMALL:
        words += " So few classes are a hint, not a finding."
    return words


def _relation(d: Diagnosed) -> tuple[str, str]:
    """Whether counts and prior rank the classes alike, and the numbers for it."""
    size, r = len(d.counts), d.rank_correlation
    if r is None or size < 5:
        return "unknown", ""
    from scipy.stats import norm

    # Fisher's z; the factor is that of Fieller, Hartley and Pearson (1957) for ranks
    half = norm.ppf(0.5 + d.level / 2) * math.sqrt(1.06 / (size - 3))
    middle = math.atanh(min(max(r, -1 + 1e-12), 1 - 1e-12))
    low, high = math.tanh(middle - half), math.tanh(middle + half)
    numbers = f"rank correlation {r:.2f} [{low:.2f}, {high:.2f}]"
    if low > 0 or high < 0:
        return ("alike" if r > 0 else "opposed"), numbers
    return ("apart" if max(-low, high) <= LIKE else "open"), numbers


def _related(d: Diagnosed) -> str:
    word, numbers = _relation(d)
    return {
        "alike": f"The two imbalances are related: classes rare in one tend to be rare in both "
        f"({numbers}), so their gaps cannot be told apart by groups alone.",
        "opposed": f"The two imbalances are opposed: classes rare in one tend to be frequent in "
        f"the other ({numbers}).",
        "apart": f"The two imbalances are nearly independent ({numbers}).",
        "open": f"The two imbalances are not shown to be related ({numbers}); more classes would "
        "tell.",
        "unknown": "",
    }[word]


def _left(d: Diagnosed) -> str:
    if d.left is None:
        return ""
    if d.counts.max() < 2 * d.counts.min():
        return "The training counts are too even to see whether their prior is in the logits."
    if d.left > STILL:
        words = (
            f"The logits still carry {d.left:.2f} of the training prior (1 is all of it, 0 none): "
            "subtract its logarithm (logit adjustment)."
        )
        if _relation(d)[0] == "alike":
            words += " Part of this may be the model's own prior, which resembles it."
        return words
    if d.left < -STILL:
        return (
            f"The logits carry {d.left:.2f} of the training prior, and a negative share means that "
            "too much was taken out: were they adjusted twice?"
        )
    if d.left > GONE:
        return f"Part of the training prior is left in the logits: {d.left:.2f} (1 is all of it)."
    if d.left < -GONE:
        return (
            f"A little more than the training prior was taken out of the logits: {d.left:.2f} is "
            "left (0 is none)."
        )
    return f"The training prior is out of the logits ({d.left:.2f} of it is left; 1 is all): fine."


def _next(d: Diagnosed) -> str:
    steps = []
    data = _shown(d, "data")
    still = d.left if d.left is not None and d.counts.max() >= 2 * d.counts.min() else None
    if still is not None and still < -STILL:
        steps.append("adjust the logits once only, in training or afterwards")
    elif data > 0 and still is not None and still <= GONE:
        steps.append("more or better examples of the Few classes: the prior is out of the logits")
    elif data > 0 or (data == 0 and (still or 0) > STILL):
        how = "in training (LogitAdjustedLoss) or afterwards (logit_adjust)"
        unless = ", unless it was done already" if still is None else ""
        steps.append(f"logit adjustment, {how}{unless}")
    elif data < 0:
        steps.append("less adjustment, if there was any, as the Few classes are ahead")
    if d.prior is not None and _shown(d, "parameter") > 0:
        steps.append(
            "for the parameter gap, the average of several differently pre-trained models "
            "(backdoor_adjust)"
        )
    if steps:
        return f"Try next: {'; and '.join(steps)}."
    return (
        "Try next: no remedy follows from this test set; more classes and test examples would show "
        "smaller gaps."
    )
