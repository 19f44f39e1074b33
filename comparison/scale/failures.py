"""What failures leave of a run's time: the formulas of Young and Daly, for all processes that go back together, and for
a stage that goes back alone.

Failures come by themselves at a constant rate (a Poisson process), in N nodes N times as often as in one. `stall`
seconds are lost to every save, `interval` seconds of work lie between two, a failure takes `restart` seconds and the
work since the last save.
"""

import math

__all__ = ["daly_interval", "effective_share", "young_interval"]


def young_interval(stall: float, mtbf: float) -> float:
    """Seconds of work between two saves that lose the least time, to first order: sqrt(2 stall mtbf).

    Young, "A first order approximation to the optimum checkpoint interval", Communications of the ACM 17 (1974).

    Args:
        stall, mtbf: seconds; mtbf is that of the whole machine.

    Raises:
        ValueError: a number that is not positive and finite.
    """
    _check(stall=stall, mtbf=mtbf)
    return math.sqrt(2 * stall * mtbf)


def daly_interval(stall: float, mtbf: float) -> float:
    """The same to higher order, valid where failures are as frequent as saves are long, too.

    Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation Computer
    Systems 22 (2006). Arguments and errors as of `young_interval`.
    """
    _check(stall=stall, mtbf=mtbf)
    if stall >= 2 * mtbf:
        return mtbf
    ratio = stall / (2 * mtbf)
    return young_interval(stall, mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall


def effective_share(stall: float, mtbf: float, restart: float, interval: float) -> float:
    """Share of the time that becomes lasting work (effective training time ratio, ETTR): 0 to 1.

    interval / (mtbf exp(restart / mtbf) (exp((interval + stall) / mtbf) - 1)): Daly's complete model, exact for such
    failures, which may also hit a save or a restart.

    Args:
        stall, mtbf, restart, interval: seconds; stall and restart may be 0.

    Raises:
        ValueError: a number that is negative or not finite, or an mtbf or interval of 0.
    """
    _check(mtbf=mtbf, interval=interval)
    _check(least=0.0, stall=stall, restart=restart)
    try:
        return interval / (mtbf * math.exp(restart / mtbf) * math.expm1((interval + stall) / mtbf))
    except OverflowError:
        return 0.0


def _check(least: float | None = None, **seconds: float) -> None:
    for name, value in seconds.items():
        if not math.isfinite(value) or value < 0 or (value == 0 and least is None):
            raise ValueError(f"{name} is {value} seconds; valid: a finite number {'from' if least == 0 else 'above'} 0")
