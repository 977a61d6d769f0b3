"""Evidence: from numbers to verdicts. Intervals, claims declared before measuring, their tables.

>>> from toolkit.core import evidence
>>> gain = evidence.interval([1.2, 1.4, 1.1, 1.3, 1.2, 1.5, 1.3, 1.2])
>>> evidence.verdict(gain.low, gain.high, margin=1.0, n=gain.n)
'holds'

Intervals are told in :mod:`toolkit.core.evidence.intervals`, the rule in
:mod:`toolkit.core.evidence.verdicts`, declaring in :mod:`toolkit.core.evidence.claims` and
:mod:`toolkit.core.evidence.declaration`, judging in :mod:`toolkit.core.evidence.judging`.
"""

from toolkit.core.evidence.claims import MOST_CLAIMS, Claim, Condition, Fact
from toolkit.core.evidence.declaration import (
    Declaration,
    First,
    committed,
    declare,
    first_declaration,
    register,
)
from toolkit.core.evidence.intervals import Interval, exact, interval, paired, single
from toolkit.core.evidence.judging import Judged, judge, judge_all
from toolkit.core.evidence.ledger import Counts, count
from toolkit.core.evidence.measured import Fixed, Measured, best_fixed
from toolkit.core.evidence.results import load_results
from toolkit.core.evidence.table import ClaimsTable, found_text, verdict_html
from toolkit.core.evidence.verdicts import (
    CLAIM_VERDICTS,
    VERDICTS,
    combine,
    needed,
    verdict,
)
from toolkit.core.runs.tuning import Tuned, tune
from toolkit.core.seeds import generator, seeds

__all__ = [
    "CLAIM_VERDICTS",
    "MOST_CLAIMS",
    "VERDICTS",
    "Claim",
    "ClaimsTable",
    "Condition",
    "Counts",
    "Declaration",
    "Fact",
    "First",
    "Fixed",
    "Interval",
    "Judged",
    "Measured",
    "Tuned",
    "best_fixed",
    "combine",
    "committed",
    "count",
    "declare",
    "exact",
    "first_declaration",
    "found_text",
    "generator",
    "interval",
    "judge",
    "judge_all",
    "load_results",
    "needed",
    "paired",
    "register",
    "seeds",
    "single",
    "tune",
    "verdict",
    "verdict_html",
]
