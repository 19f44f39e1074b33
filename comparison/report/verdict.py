"""The comparison in a sentence or two, with its conditions; made of the figures alone."""

from collections.abc import Callable

from unlocked.comparison.results import Contender, Report

__all__ = ["best", "verdict"]

_CLOSE = 0.02  # medians nearer to each other than this are called equally fast


def verdict(report: Report) -> str:
    """Whether local learning pays here: the fastest form of LLS against the fastest forms of backpropagation."""
    local = best(report, lambda c: c.family != "BP")
    rival = best(report, lambda c: c.family == "BP")
    if local is None or rival is None:
        return "Nothing to compare: " + ("no local rule" if local is None else "no backpropagation") + " was measured."
    settings, environment = report.settings, report.environment
    machine = ", ".join([f"{environment.cores} cores", *environment.gpus])
    text = (
        f"On this machine ({machine}), {settings.model} on {settings.dataset} at batch {settings.batch_size}: "
        f"{local.name} trains {_rate(local):,.0f} images/s, {_ratio(local, rival)} the fastest backpropagation "
        f"({rival.name})"
    )
    piped = best(report, lambda c: c.family != "BP" and c.is_pipeline)
    piped_rival = best(report, lambda c: c.family == "BP" and c.is_pipeline)
    if piped is not None and piped_rival is not None:
        text += f"; as a pipeline, {piped.name} is {_ratio(piped, piped_rival)} {piped_rival.name}"
    reached, rivals = local.test_acc1, rival.test_acc1
    if reached is not None and rivals is not None:
        difference = reached.mean - rivals.mean
        points = f"{abs(difference):.1f} points {'more' if difference > 0 else 'less'} than"
        text += (
            f". It reaches {reached.mean:.1f} % test accuracy after {settings.epochs} epochs, "
            f"{points if abs(difference) >= 0.05 else 'as'} backpropagation's {rivals.mean:.1f} %"
        )
    return text + "."


def best(report: Report, fits: Callable[[Contender], bool]) -> Contender | None:
    """The measured contender with the highest median images/s among those that fit; None without any."""
    return max((c for c in report.measured if fits(c)), key=_rate, default=None)


def _rate(contender: Contender) -> float:
    spread = contender.images_per_second
    return spread.median if spread else 0.0


def _ratio(one: Contender, other: Contender) -> str:
    ratio = _rate(one) / _rate(other)
    if abs(ratio - 1) < _CLOSE:
        return "as fast as"
    return f"{ratio:.2f} times the speed of"
