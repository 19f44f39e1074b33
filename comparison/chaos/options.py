"""What the faults are told: how many, how often, of which kinds."""

from dataclasses import dataclass
from pathlib import Path

from unlocked.comparison.chaos.kinds import KINDS
from unlocked.runtime.fields import LARGEST, LARGEST_SEED, check, setting
from unlocked.runtime.schedules.marks import Period

__all__ = ["ChaosOptions"]


@dataclass(frozen=True, kw_only=True)
class ChaosOptions:
    """Options of `unlocked chaos`, beside those of the training.

    Raises:
        ValueError: one is out of range; says what is valid.
    """

    mtbf: str = setting("10s", "mean time between two faults while the run is up, such as 10s or 2m")
    faults: str = setting(",".join(KINDS), "kinds of faults, separated by commas")
    fault_count: int = setting(
        10,
        "faults of this command line in all; the run is repeated until there were as many",
        at_least=1,
        at_most=LARGEST,
    )
    at_actions: float = setting(
        0.5,
        "share of the starts whose fault comes at a stated action (of a step, a snapshot or an evaluation) instead of "
        "any moment",
        at_least=0,
        at_most=1,
    )
    hang_limit: float = setting(
        15.0, "seconds after a fault by which the run must go on or have ended", above=0, at_most=3600
    )
    chaos_seed: int = setting(0, "of the faults' kinds, victims and moments", at_least=0, at_most=LARGEST_SEED)
    report: Path | None = setting(
        None,
        "write all faults and the table here, as JSON, beside those that are there; the same command goes on",
        place="JSON file",
    )

    def __post_init__(self) -> None:
        check(self)
        if not self.mean_seconds:
            raise ValueError(f"mtbf is {self.mtbf!r}; it must be a time such as 10s or 2m")
        unknown = [name for name in self.kinds if name not in KINDS]
        if unknown or not self.kinds:
            raise ValueError(f"faults are {self.faults!r}; valid: {', '.join(KINDS)}")

    @property
    def mean_seconds(self) -> float:
        """Between two faults."""
        try:
            return Period.of(self.mtbf).seconds
        except ValueError:
            return 0.0

    @property
    def kinds(self) -> list[str]:
        """The kinds that were chosen."""
        return [name.strip() for name in self.faults.split(",") if name.strip()]
