"""Learning-rate schedules as pure functions, so that every stage knows its rate without asking.

A schedule maps the epoch to a factor of the initial rate. `ReduceLROnPlateau` maps the test losses so far instead: the
rate of an epoch is not known before the evaluation of the one before, so a pipeline drains there (and only then).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

__all__ = [
    "LR_SCHEDULES",
    "CosineAnnealingLR",
    "LearningRate",
    "LrSchedule",
    "MultiStepLR",
    "PerStep",
    "ReduceLROnPlateau",
    "WarmUp",
    "constant",
    "lr_schedule",
    "warmed_up",
]

LR_SCHEDULES = ("none", "MultiStepLR", "CosineAnnealingLR", "ReduceLROnPlateau")
SMALLEST_CHANGE = 1e-8  # of a rate; torch's default for ReduceLROnPlateau's `eps`


def constant(epoch: int) -> float:
    """The initial rate throughout."""
    return 1.0


@dataclass(frozen=True, slots=True)
class MultiStepLR:
    """Times `gamma` at every milestone epoch, as torch.optim.lr_scheduler.MultiStepLR."""

    milestones: tuple[int, ...]
    gamma: float

    def __post_init__(self) -> None:
        if not isinstance(self.milestones, tuple | list) or not all(map(_is_count, self.milestones)):
            shown = list(self.milestones) if isinstance(self.milestones, tuple) else self.milestones
            raise ValueError(f"milestones are epochs from 0, got {shown!r}")
        if not _is_factor(self.gamma):
            raise ValueError(f"gamma is {self.gamma!r}; it must be a finite number of at least 0")

    def __call__(self, epoch: int) -> float:
        return self.gamma ** sum(epoch >= milestone for milestone in self.milestones)


@dataclass(frozen=True, slots=True)
class CosineAnnealingLR:
    """Half a cosine from the initial rate to 0 over `epochs`, as torch's (Loshchilov and Hutter 2017)."""

    epochs: int

    def __post_init__(self) -> None:
        if not _is_count(self.epochs) or self.epochs < 1:
            raise ValueError(f"CosineAnnealingLR has epochs {self.epochs!r}; it must be a whole number of at least 1")

    def __call__(self, epoch: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReduceLROnPlateau:
    """Times `factor` whenever the test loss has not fallen for more than `patience` epochs.

    As torch.optim.lr_scheduler.ReduceLROnPlateau in its mode "min" with a relative threshold, in factors of the
    initial rate instead of rates.
    """

    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    """A loss counts as fallen below `1 - threshold` times the best so far."""
    cooldown: int = 0
    """Epochs after a reduction in which none counts as bad."""
    min_factor: float = 0.0
    """No reduction goes below."""
    eps: float = SMALLEST_CHANGE
    """A reduction by less than this share of the initial rate is left out."""

    def __post_init__(self) -> None:
        if not _is_factor(self.factor) or self.factor >= 1:
            raise ValueError(f"the factor of ReduceLROnPlateau is {self.factor!r}; it must lie in [0, 1)")
        if not (_is_count(self.patience) and _is_count(self.cooldown)):
            raise ValueError(
                f"ReduceLROnPlateau has patience {self.patience!r} and cooldown {self.cooldown!r}; both count epochs "
                "and must be at least 0"
            )
        for name in ("threshold", "min_factor", "eps"):
            if not _is_factor(getattr(self, name)):
                raise ValueError(
                    f"ReduceLROnPlateau has {name} {getattr(self, name)!r}; it must be a finite number of at least 0"
                )

    def __call__(self, losses: Sequence[float]) -> float:
        """The factor of the epoch that follows those with these test losses."""
        rate, best, bad, rest = 1.0, math.inf, 0, 0
        for loss in losses:
            if loss < best * (1 - self.threshold):
                best, bad = loss, 0
            else:  # also a loss that is not a number
                bad += 1
            if rest:
                rest, bad = rest - 1, 0
            if bad > self.patience:
                lower = max(rate * self.factor, self.min_factor)
                rate = lower if rate - lower > self.eps else rate
                rest, bad = self.cooldown, 0
        return rate


@dataclass(frozen=True, slots=True)
class PerStep:
    """A factor for every training micro-batch instead of every epoch: `factor(step)`, counted over the run from 0."""

    factor: Callable[[int], float]

    def __call__(self, step: int) -> float:
        return self.factor(step)


@dataclass(frozen=True, slots=True)
class WarmUp:
    """From 1/steps of the rate to all of it over the first `steps` training micro-batches, evenly; times `then`, a
    schedule of epochs or a `PerStep`."""

    steps: int
    then: Callable[[int], float] = constant

    def __post_init__(self) -> None:
        if not _is_count(self.steps) or self.steps < 1:
            raise ValueError(f"WarmUp has steps {self.steps!r}; it must be a whole number of at least 1")
        if isinstance(self.then, ReduceLROnPlateau) or not callable(self.then):
            raise ValueError(
                f"WarmUp is followed by {self.then!r}; give a function from the epoch, or PerStep, whose factor does "
                "not wait for a test loss"
            )

    def at(self, epoch: int, step: int) -> float:
        """The factor of a training micro-batch."""
        after = self.then(step) if isinstance(self.then, PerStep) else self.then(epoch)
        return min(1.0, (step + 1) / self.steps) * after

    def __call__(self, epoch: int) -> float:
        """What it comes to in that epoch."""
        return self.then(epoch)


LrSchedule = Callable[[int], float] | ReduceLROnPlateau | PerStep | WarmUp
"""Epoch -> factor of the initial learning rate; or the one schedule that needs the test losses; or one with a factor
for every training micro-batch."""


def warmed_up(schedule: LrSchedule, steps: int) -> LrSchedule:
    """`schedule` after a warm-up of so many micro-batches, if there are any.

    Raises:
        ValueError: a schedule that waits for the test loss.
    """
    if steps == 0:
        return schedule
    if isinstance(schedule, ReduceLROnPlateau):
        raise ValueError(
            "--warmup-steps goes with any --lr-scheduler but ReduceLROnPlateau, which waits for a test loss"
        )
    return WarmUp(steps, schedule)


class LearningRate:
    """One run's factor of the learning rate, epoch by epoch: a schedule and what it has been told.

    Args:
        losses: the test loss of each epoch before a resume, by epoch.
    """

    def __init__(self, schedule: LrSchedule, losses: Mapping[int, float] | None = None) -> None:
        self.schedule = schedule
        self._losses = dict(losses or {})

    @property
    def needs_losses(self) -> bool:
        """An epoch's factor is not known before the evaluation of the epoch before."""
        return isinstance(self.schedule, ReduceLROnPlateau)

    @property
    def per_step(self) -> bool:
        """The rate changes with every training micro-batch."""
        return isinstance(self.schedule, PerStep | WarmUp)

    def at(self, epoch: int, step: int) -> float:
        """The factor of training micro-batch `step`, counted over the run, of a schedule that is `per_step`.

        Raises:
            ValueError: as `__call__`.
        """
        schedule: Any = self.schedule
        call = schedule.at if isinstance(schedule, WarmUp) else lambda _, step: schedule(step)
        return _factor(lambda: call(epoch, step), f"training micro-batch {step}")

    def __call__(self, epoch: int) -> float:
        """The factor of `epoch`.

        Raises:
            ValueError: the schedule fails, or gives no finite number of at least 0; names the epoch and what it gave.
        """
        if isinstance(self.schedule, ReduceLROnPlateau):
            return self.schedule([loss for _, loss in self.losses_before(epoch)])
        schedule = self.schedule
        return _factor(lambda: schedule(epoch), f"epoch {epoch}")

    def observe(self, epoch: int, loss: float) -> str | None:
        """Takes the test loss of `epoch`. Returns a line for the user if the rate changes after it."""
        if not self.needs_losses:
            return None
        before = self(epoch)
        self._losses = {**self._losses, epoch: loss}  # never changed in place: a thread that writes snapshots reads it
        after = self(epoch + 1)
        if after == before:
            return None
        return f"the test loss is on a plateau: after epoch {epoch + 1} the rate is {after:g} of the initial one"

    def losses_before(self, epoch: int) -> list[tuple[int, float]]:
        """(epoch, test loss) of the epochs before `epoch`: the schedule's whole state, for snapshots."""
        return sorted((e, loss) for e, loss in self._losses.items() if e < epoch)


def _factor(call: Callable[[], float], when: str) -> float:
    try:
        factor = call()
    except OverflowError:
        factor = math.inf
    except Exception as error:
        raise ValueError(f"the learning-rate schedule fails for {when}: {error!r}") from error
    if not _is_factor(factor):
        raise ValueError(
            f"the learning-rate schedule gives {factor!r} for {when}; a factor of the initial rate is a finite number "
            "of at least 0"
        )
    return factor


def _is_factor(value: object) -> bool:
    number: Any = value
    return isinstance(value, Real) and not isinstance(value, bool) and bool(0 <= number < math.inf)


def _is_count(value: object) -> bool:
    number: Any = value
    return isinstance(value, Integral) and not isinstance(value, bool) and bool(number >= 0)


def lr_schedule(
    name: str, *, epochs: int, milestones: Sequence[int], gamma: float, patience: int = 10, lr: float = 1.0
) -> LrSchedule:
    """The schedule of that name.

    Args:
        epochs: of the whole run, for CosineAnnealingLR.
        milestones: for MultiStepLR.
        gamma: what MultiStepLR and ReduceLROnPlateau multiply by.
        patience: for ReduceLROnPlateau.
        lr: the initial rate; ReduceLROnPlateau leaves reductions by less than 1e-8 out, as torch's.

    Raises:
        ValueError: lists the valid names, or says what a value must be.
    """
    if name == "none":
        return constant
    if name == "MultiStepLR":
        return MultiStepLR(tuple(milestones), gamma)
    if name == "CosineAnnealingLR":
        return CosineAnnealingLR(epochs)
    if name == "ReduceLROnPlateau":
        # A reduction is by less than 1, so 1 leaves as many out as anything above it.
        return ReduceLROnPlateau(factor=gamma, patience=patience, eps=min(SMALLEST_CHANGE / lr, 1.0))
    raise ValueError(f"lr scheduler {name!r} is not known; valid: {', '.join(LR_SCHEDULES)}")
