"""What the study of stages found, as plain data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlocked.comparison.memory.results import ChainSettings
from unlocked.comparison.reading import read_record
from unlocked.comparison.stages.scaling_model import LOCAL, CostModel, Prediction
from unlocked.runtime.typed import from_plain, to_plain
from unlocked.workers.edges import SlotLayout

__all__ = ["MeasuredStages", "StagesSettings", "StagesStudy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StagesSettings:
    """What was asked for."""

    chain: ChainSettings
    blocks_per_stage: int
    rule: str
    cores: int
    repeats: int
    microbatches: int
    """Of one step of backpropagation."""
    spread: float
    speed: float
    link_latency: float | None
    """Microseconds; None: the measured hop."""
    link_bandwidth: float | None
    """GB/s."""
    torch: str
    step_repeats: int = 20
    hop_batches: int = 1000
    run_seconds: float = 3.0
    """Length of a measured run."""
    growing_limit: int = 128
    """Most stages at which 1F1B is also simulated with four micro-batches per stage."""

    @property
    def hop_bytes(self) -> int:
        """Of a micro-batch between two stages, its labels included."""
        c = self.chain
        return SlotLayout(c.batch_size, (c.channels, c.image_size, c.image_size)).nbytes(c.batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStages:
    """A pipeline that was trained."""

    stages: int
    images_per_second: float
    """Median."""
    low: float
    high: float
    repeats: int
    oversubscribed: bool
    """More processes than cores: they share them, which the prediction does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagesStudy:
    """Everything. `as_dict` and `from_dict` are each other's inverse, for JSON."""

    settings: StagesSettings
    model: CostModel
    measured: list[MeasuredStages]
    predictions: list[Prediction]

    @property
    def schedules(self) -> list[str]:
        return list(dict.fromkeys(p.schedule for p in self.predictions))

    def of(self, schedule: str, *, spread: float = 0.0, growing: bool = False) -> list[Prediction]:
        """A schedule's predictions by stages. `growing`: those whose step grows with the pipeline."""
        fixed = {1} if schedule == LOCAL else {self.settings.microbatches}
        found = [
            p
            for p in self.predictions
            if p.schedule == schedule and p.spread == spread and (p.microbatches in fixed) is not growing
        ]
        return sorted(found, key=lambda p: p.stages)

    def images_per_second(self, prediction: Prediction) -> float:
        return prediction.microbatches_per_second * self.settings.chain.batch_size

    def error(self, measured: MeasuredStages) -> float | None:
        """Predicted over measured, less 1; None where nothing was predicted for this machine and so many stages."""
        s = self.settings
        if s.speed != 1 or s.link_latency is not None:
            return None
        found = [p for p in self.of(LOCAL) if p.stages == measured.stages]
        return self.images_per_second(found[0]) / measured.images_per_second - 1 if found else None

    def table(self) -> list[str]:
        """For the terminal."""
        lines = ["", f"{'stages':>6}{'measured images/s':>20}{'slowest to fastest':>22}{'predicted / measured':>22}"]
        for m in self.measured:
            error = self.error(m)
            ratio = "" if error is None else f"{1 + error:.2f}"
            note = "  shares cores" if m.oversubscribed else ""
            lines.append(
                f"{m.stages:>6}{m.images_per_second:>20,.0f}{f'{m.low:,.0f} to {m.high:,.0f}':>22}{ratio:>22}{note}"
            )
        names = self.schedules
        lines += ["", f"{'stages':>6}" + "".join(f"{name:>12}" for name in names) + "   (predicted images/s)"]
        columns = {name: {p.stages: p for p in self.of(name)} for name in names}
        for count in columns[names[0]]:
            lines.append(
                f"{count:>6}" + "".join(f"{self.images_per_second(columns[name][count]):>12,.0f}" for name in names)
            )
        return lines

    def sentence(self) -> str:
        """What the deepest prediction says."""
        local = self.of(LOCAL)
        last, first = local[-1], local[0]
        kept = last.microbatches_per_second / first.microbatches_per_second
        rivals = [p for name in self.schedules if name != LOCAL for p in self.of(name) if p.stages == last.stages]
        most = max(rivals, key=lambda p: p.microbatches_per_second)
        return (
            f"With {last.stages:,} stages, and a network {last.stages:,} times as deep, a pipeline of LLS is predicted "
            f"to keep {kept:.0%} of the images per second of one stage: {self._ratio(last, most):.1f} times those of "
            f"the best schedule of BP ({most.schedule}, {most.microbatches} micro-batches a step)."
        )

    def as_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_plain(self)
        return plain

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "StagesStudy":
        """Raises: ValueError where a value does not belong."""
        return from_plain(cls, values, "study of stages")

    @classmethod
    def load(cls, path: Path) -> "StagesStudy":
        """Raises: ValueError if `path` is no study of stages."""
        return read_record(cls, path, what="study of stages", remedy="--study stages")

    @staticmethod
    def _ratio(a: Prediction, b: Prediction) -> float:
        return a.microbatches_per_second / b.microbatches_per_second
