"""What a campaign of faults has seen, and its table."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from unlocked.comparison.results import Environment

__all__ = ["Campaign", "FaultRecord", "RunRecord", "format_table"]

MOMENTS = ("set-up", "steady state", "snapshot", "evaluation", "replay")


@dataclass(kw_only=True, slots=True)
class FaultRecord:
    """One fault and what came of it."""

    kind: str
    moment: str
    """One of `MOMENTS`: in which part of the run it came; replay: where a resumed run did over what had been done."""
    rank: int | None
    """Whose worker it hit."""
    action: str = ""
    """Before which action, where that was chosen: `kill@1SEND17`."""
    outcome: str = ""
    """recovered: the run went on by itself; restarted: the same command line did; unharmed: nobody had to notice."""
    named: bool = True
    """Whether the first error names the victim."""
    words: str = ""
    """The first error."""
    seconds: float = 0.0
    """Until the run had ended, or had made progress again."""
    hung: bool = False
    orphans: int = 0
    """Processes that were left behind."""
    stood: list[str] = field(default_factory=list)
    """Of a hang: what every process was about, and how busy the machine was."""


@dataclass(kw_only=True, slots=True)
class RunRecord:
    """One training under faults."""

    starts: int = 1
    seconds: float = 0.0
    """From the first start to the end."""
    is_exact: bool = False
    """Whether it came to the undisturbed run's `weights_sha256`."""
    epochs_are_exact: bool = False
    """Whether every epoch's figures are the undisturbed run's, once each."""
    problem: str = ""


@dataclass(kw_only=True, slots=True)
class Campaign:
    """All runs of one command line under one kind of fire."""

    command: list[str]
    options: dict[str, str]
    """Of the faults, but for their number."""
    stages: int
    environment: Environment
    mean_seconds_between_faults: float
    """That was asked for."""
    undisturbed_seconds: float = 0.0
    weights_sha256: str = ""
    """That every run must come to."""
    steps: int = 0
    epochs: list[list[str]] = field(default_factory=list)
    """The undisturbed run's figures of every epoch."""
    is_interrupted: bool = False
    """Somebody stopped it; of the run at hand nothing is kept."""
    runs: list[RunRecord] = field(default_factory=list)
    faults: list[FaultRecord] = field(default_factory=list)

    @property
    def ettr(self) -> float:
        """Effective training time: the undisturbed run's seconds over those that the same work took under faults."""
        taken = sum(run.seconds for run in self.runs)
        return len(self.runs) * self.undisturbed_seconds / taken if taken else 0.0

    @property
    def problems(self) -> list[str]:
        """Everything that must not be, in words; empty: all is well."""
        found = [f"run {i}: {run.problem}" for i, run in enumerate(self.runs) if run.problem]
        found += [f"run {i}: other weights" for i, run in enumerate(self.runs) if not run.problem and not run.is_exact]
        found += [
            f"run {i}: an epoch was lost or counted twice"
            for i, run in enumerate(self.runs)
            if not run.problem and not run.epochs_are_exact
        ]
        for i, fault in enumerate(self.faults):
            what = f"fault {i} ({fault.kind} {fault.action}in {fault.moment})"
            if fault.hung:
                found.append(f"{what}: it hung")
            if fault.orphans:
                found.append(f"{what}: {fault.orphans} processes were left")
            if not fault.named:
                found.append(f"{what}: its cause was not named, but {fault.words or 'nothing said'!r}")
        return found


def format_table(campaigns: Sequence[Campaign]) -> str:
    """Of all of them together, by kind, by moment and by the number of processes: how many, what came of them, how long
    it took."""
    faults = [fault for campaign in campaigns for fault in campaign.faults]
    heads = ("recovered", "restarted", "unharmed", "hung", "unnamed", "median s")
    lines = [f"{'':<14}{'faults':>7}" + "".join(f"{head:>11}" for head in heads)]
    lines += [_row(name, [one for one in faults if one.kind == name]) for name in dict.fromkeys(f.kind for f in faults)]
    lines.append("")
    lines += [_row(name, some) for name in MOMENTS if (some := [one for one in faults if one.moment == name])]
    lines.append("")
    for stages in sorted({campaign.stages for campaign in campaigns}):
        some = [fault for campaign in campaigns if campaign.stages == stages for fault in campaign.faults]
        lines.append(_row(f"{stages} processes", some))
    runs = [run for campaign in campaigns for run in campaign.runs]
    exact = sum(run.is_exact and run.epochs_are_exact for run in runs)
    starts = sum(run.starts for run in runs)
    lines += [
        "",
        _row("all", faults),
        "",
        f"{exact} of {len(runs)} runs came to the undisturbed weights and epochs, in {starts} starts",
    ]
    lines += [
        f"effective training time {one.ettr:.3f} at a fault every {one.mean_seconds_between_faults:g} s of "
        f"{one.stages} processes (the undisturbed run takes {one.undisturbed_seconds:.1f} s)"
        for one in campaigns
    ]
    return "\n".join(lines)


def _row(name: str, faults: Sequence[FaultRecord]) -> str:
    cells = [sum(one.outcome == what for one in faults) for what in ("recovered", "restarted", "unharmed")]
    cells += [sum(one.hung for one in faults), sum(not one.named for one in faults)]
    seconds = statistics.median(one.seconds for one in faults) if faults else 0.0
    return f"{name:<14}{len(faults):>7}" + "".join(f"{cell:>11}" for cell in cells) + f"{seconds:>11.2f}"
