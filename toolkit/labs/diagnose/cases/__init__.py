r"""Three uses of the regimes: which way to turn the temperature, which model, which SAM radius.

Source: Zhou et al., arXiv 2305.18383, case studies 1 to 3. Their procedures, grids and baselines
are inferred: the paper's body was not at hand.

**No leak.** The rule sees LMC and CKA, which come from training data. Test error only judges the
choice afterwards. The policies that do see test error are the oracles, the best fixed radius in
hindsight, and the choice by dense test error, which is thereby given an advantage.

Regret is the test error of a choice minus the lowest test error that could have been chosen.
"""

from toolkit.labs.diagnose.cases.family import best_of_family
from toolkit.labs.diagnose.cases.radius import radius_per_density
from toolkit.labs.diagnose.cases.regret import summary
from toolkit.labs.diagnose.cases.temperature import up_or_down

__all__ = ["best_of_family", "radius_per_density", "summary", "up_or_down"]
