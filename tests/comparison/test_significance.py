"""Welch's test and Holm's correction at their edges; between them they are compared with SciPy in the leaderboard's."""

import math

import pytest
from scipy import stats

from unlocked.comparison.significance import holm, welch


def test_nothing_is_told_of_chance_where_nothing_varies() -> None:
    assert math.isnan(welch([90.0], [91.0]))
    assert math.isnan(welch([90.0], [91.0, 91.0]))
    assert math.isnan(welch([90.0, 90.0, 90.0], [91.0, 91.0]))
    assert welch([90.0, 90.0], [90.0, 90.0, 90.0]) == 1.0


def test_one_side_may_be_a_single_value_or_constant() -> None:
    several = [90.0, 91.0, 92.5]
    assert welch([95.0], several) == pytest.approx(stats.ttest_ind([95.0], several).pvalue)
    constant = welch([95.0, 95.0, 95.0], several)
    assert constant == pytest.approx(stats.ttest_ind([95.0] * 3, several, equal_var=False).pvalue)


def test_what_is_not_known_does_not_count() -> None:
    corrected = holm([0.01, math.nan, 0.04, 0.03])
    assert corrected[0] == pytest.approx(0.03)
    assert math.isnan(corrected[1])
    assert corrected[2:] == pytest.approx([0.06, 0.06])
