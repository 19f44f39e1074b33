"""Whether means differ: Welch's test, corrected by Holm for the number of tests."""

import math
import warnings
from collections.abc import Sequence

from scipy import stats

__all__ = ["LEVEL", "holm", "welch"]

LEVEL = 0.05
"""Of the corrected p, below which a difference is told."""


def welch(a: Sequence[float], b: Sequence[float]) -> float:
    """The p of Welch's test that two means are equal, both sides.

    Of a side with one value nothing is known but that value: the other side's deviation then counts for both. NaN where
    each side has one, or neither varies: a few equal values are so by the coarse steps in which accuracies come, and
    say nothing of chance.
    """
    if len(a) == len(b) == 1:
        return math.nan
    if len(set(a)) == len(set(b)) == 1:
        return 1.0 if a[0] == b[0] else math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of values that are nearly the same
        return float(stats.ttest_ind(a, b, equal_var=min(len(a), len(b)) == 1).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's correction: the k-th smallest of n times n - k + 1, never below the one before. NaN stays, uncounted."""
    known = sorted((value, index) for index, value in enumerate(values) if not math.isnan(value))
    corrected, largest = [math.nan] * len(values), 0.0
    for rank, (value, index) in enumerate(known):
        largest = max(largest, min(1.0, value * (len(known) - rank)))
        corrected[index] = largest
    return corrected
