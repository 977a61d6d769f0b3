"""Evidence: repeats, intervals, rules and claims, under one name.

>>> from toolkit.core import evidence
>>> gain = evidence.paired([0.81, 0.83, 0.84], [0.78, 0.79, 0.81])
>>> claims = evidence.Claims("lora", "ci", seeds=evidence.seeds(3))
>>> claims.judge("gain", "A beats B.", None, gain, evidence.above(0)).verdict
'holds'

How a verdict is reached is written in :mod:`toolkit.core.rules`; why intervals of few repeats are
t-intervals in :mod:`toolkit.core.intervals`; the results file in :mod:`toolkit.core.results`.
"""

from toolkit.core.claims import Claim, Claims
from toolkit.core.claims_table import ClaimsTable, verdict_html
from toolkit.core.intervals import Interval, bootstrap, exact, interval, paired, single
from toolkit.core.results import load_results
from toolkit.core.rules import VERDICTS, Rule, above, below, combine, equal, within
from toolkit.core.runs.tuning import Tuned, tune
from toolkit.core.seeds import generator, seeds

__all__ = [
    "VERDICTS",
    "Claim",
    "Claims",
    "ClaimsTable",
    "Interval",
    "Rule",
    "Tuned",
    "above",
    "below",
    "bootstrap",
    "combine",
    "equal",
    "exact",
    "generator",
    "interval",
    "load_results",
    "paired",
    "seeds",
    "single",
    "tune",
    "verdict_html",
    "within",
]
