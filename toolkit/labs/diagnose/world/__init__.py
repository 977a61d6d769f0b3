"""A world in which both priors are known: pairs of digits, and models pre-trained on them.

Two glyphs side by side make one input, (left digit, right digit) its class; a class has two
"semantic parts" that can be seen. Every pre-training set and every downstream set is drawn with
counts of our choice, so the prior that a paper can only estimate is known here.
"""

from toolkit.labs.diagnose.world.design import Design
from toolkit.labs.diagnose.world.pairs import DigitPairs, Set, pooled

__all__ = ["Design", "DigitPairs", "Set", "pooled"]
