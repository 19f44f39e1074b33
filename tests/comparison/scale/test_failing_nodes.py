"""What failures leave of the time: Daly's published optima, a simulation of failures, and the best of all intervals."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from unlocked.comparison.scale.failures import daly_interval, effective_share, young_interval

MINUTE, HOUR = 60.0, 3600.0


@pytest.mark.parametrize(("hours", "minutes"), [(24, 117), (6, 57), (0.25, 9.1)])
def test_the_best_interval_is_that_of_dalys_paper(hours: float, minutes: float) -> None:
    """Its figures 3 to 5: saves of 5 minutes."""
    assert daly_interval(5 * MINUTE, hours * HOUR) / MINUTE == pytest.approx(minutes, rel=0.006)


def test_young_is_the_limit_of_rare_failures() -> None:
    assert young_interval(2.0, 1e9) == pytest.approx(np.sqrt(4e9))
    assert daly_interval(2.0, 1e9) == pytest.approx(young_interval(2.0, 1e9), rel=1e-4)


@pytest.mark.parametrize(("stall", "mtbf"), [(2.0, 100.0), (2.0, 1e4), (300.0, 900.0), (0.02, 1e5)])
def test_no_interval_is_better(stall: float, mtbf: float) -> None:
    def lost(interval: float) -> float:
        return 1 - effective_share(stall, mtbf, 10.0, interval)

    best = minimize_scalar(lost, bounds=(stall / 10, 20 * daly_interval(stall, mtbf)), method="bounded").fun
    assert lost(daly_interval(stall, mtbf)) <= best * 1.002


def simulated(stall: float, mtbf: float, restart: float, interval: float, saves: int) -> float:
    """The share of lasting work in a run of so many saves, with failures drawn one after the other."""
    chance = np.random.default_rng(17)
    clock = 0.0
    for _ in range(saves):
        while (until := chance.exponential(mtbf)) < interval + stall:
            clock += until
            while (until := chance.exponential(mtbf)) < restart:
                clock += until
            clock += restart
        clock += interval + stall
    return saves * interval / clock


@pytest.mark.parametrize(
    ("stall", "mtbf", "restart", "interval"),
    [(2.0, 100.0, 20.0, 15.0), (2.0, 1350.0, 120.0, 72.0), (0.0, 50.0, 0.0, 30.0), (30.0, 60.0, 10.0, 40.0)],
)
def test_the_share_is_that_of_a_run_with_failures(stall: float, mtbf: float, restart: float, interval: float) -> None:
    found = simulated(stall, mtbf, restart, interval, 20_000)
    assert effective_share(stall, mtbf, restart, interval) == pytest.approx(found, rel=0.03)


def test_hopeless_cases_are_0_and_not_an_error() -> None:
    assert effective_share(1.0, 0.001, 1.0, 1.0) == 0.0
    assert daly_interval(5.0, 1.0) == 1.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: young_interval(0.0, 1.0),
        lambda: daly_interval(1.0, float("inf")),
        lambda: effective_share(1.0, 1.0, -1.0, 1.0),
        lambda: effective_share(1.0, 1.0, 1.0, 0.0),
        lambda: effective_share(float("nan"), 1.0, 1.0, 1.0),
    ],
)
def test_what_is_no_time_is_refused(call: Callable[[], float]) -> None:
    with pytest.raises(ValueError, match=r"is .* seconds; valid: a finite number"):
        call()
