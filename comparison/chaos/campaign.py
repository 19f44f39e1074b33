"""Runs a training under faults until there were enough of them, and holds every end against the undisturbed run's."""

import csv
import json
import os
import re
import secrets
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from unlocked.comparison.chaos.arming import Armed, Armoury
from unlocked.comparison.chaos.kinds import KINDS, Blow
from unlocked.comparison.chaos.options import ChaosOptions
from unlocked.comparison.chaos.records import Campaign, FaultRecord, RunRecord
from unlocked.comparison.chaos.tree import MARK, Tree
from unlocked.comparison.environment import environment
from unlocked.runtime.faults import VARIABLE
from unlocked.runtime.saving.snapshots import newest_whole
from unlocked.runtime.schedules.stream import StreamPlan

__all__ = ["run_campaign"]

_POLL = 0.05
_ECHO_SECONDS = 1.5  # in which what was under way may still be told of, although the run is about to end
_SURE = 10  # looks in a row that show the same
_LINES = 200  # bytes of the log that are more than one line: the run goes on
_MOST_STARTS = 200  # of one run, which then can't come to an end
_SAY_SECONDS = 0.2  # in which a process can say where it stands
_GONE_SECONDS = 5.0  # in which the last process must follow the launcher
_NOTHING_SECONDS = 5.0  # of training, after which a kind that finds nothing to strike (a link, where all lies in shared
# memory) gives way to another


def run_campaign(
    command: Sequence[str],
    plan: StreamPlan,
    options: ChaosOptions,
    campaign: Campaign,
    *,
    start_timeout: float,
    root: Path | None,
    say: Callable[[str], None],
    keep: Callable[[], object],
) -> None:
    """All runs that are still wanted; a campaign that has begun goes on.

    Args:
        command: starts the training; flags for its files are added.
        plan: what it runs through.
        campaign: takes what is seen, see `new_campaign`.
        start_timeout: the training's, by which a worker is missed that stands still in set-up.
        root: where the runs' folders go; None: they are thrown away.
        say: takes a line at a time.
        keep: called when there is something new to keep.

    Raises:
        ValueError: the undisturbed run fails, or this machine has no /proc.
    """
    if not Path("/proc/self/environ").exists():
        raise ValueError("faults need the process table in /proc (Linux); run them there")
    with tempfile.TemporaryDirectory(prefix="unlocked-chaos-") as scratch:
        folder = Path(scratch) if root is None else root
        if not campaign.weights_sha256:
            _run_undisturbed(_Run(command, folder, f"undisturbed-{secrets.token_hex(3)}"), campaign)
            keep()
        say(f"undisturbed: {campaign.undisturbed_seconds:.1f} s, weights {campaign.weights_sha256[:16]}")
        fruitless = 0  # runs in a row that no fault has struck: what was drawn for them would be drawn again
        while (begun := len(campaign.faults)) < options.fault_count:
            run = _Run(command, folder, f"run-{len(campaign.runs)}-{secrets.token_hex(3)}")
            armoury = Armoury(options, plan, campaign.stages, begun + fruitless)
            try:
                campaign.runs.append(_Disturbed(run, campaign, armoury, options, start_timeout, say).run())
            except KeyboardInterrupt:
                campaign.is_interrupted = True
                del campaign.faults[begun:]
                break
            finally:
                run.tree.end()
            fruitless = 0 if len(campaign.faults) > begun else fruitless + 1
            keep()


def new_campaign(command: Sequence[str], stages: int, options: ChaosOptions) -> Campaign:
    """One that has seen nothing yet."""
    told = {key: str(value) for key, value in vars(options).items() if key not in ("fault_count", "report")}
    return Campaign(
        command=list(command)[1:],
        options=told,
        stages=stages,
        environment=environment(),
        mean_seconds_between_faults=options.mean_seconds,
    )


def _run_undisturbed(run: "_Run", campaign: Campaign) -> None:
    began = time.perf_counter()
    try:
        code = run.start()
    finally:
        run.tree.end()
    if code or not run.summary:
        raise ValueError(f"the undisturbed run failed: {run.first_error or 'see its output'}")
    campaign.undisturbed_seconds = time.perf_counter() - began
    campaign.weights_sha256, campaign.steps = str(run.summary["weights_sha256"]), int(run.summary["steps"])
    campaign.epochs = run.epochs()


class _Run:
    """One training in a folder of its own, started as often as it takes."""

    def __init__(self, command: Sequence[str], root: Path, name: str) -> None:
        self.folder, self._told = root / name, root / f"{name}.json"
        self._errors: list[str] = []  # lines of the latest start
        files = ["--save-path", str(root), "--experiment-name", name, "--summary", str(self._told)]
        self._command = [*command, *files, "--resume", "auto", "--plain"]
        self.tree = Tree(name)
        self._name = name

    def begin(self, fault: str = "") -> "subprocess.Popen[bytes]":
        """Starts it; whoever started it waits for it."""
        own = {MARK: self._name, VARIABLE: fault, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            self._command,
            env=os.environ | own,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stderr is not None
        # A pipe, since a file would share the fate of the run's files.
        self._errors = []
        self._reader = threading.Thread(target=_collect, args=(process.stderr, self._errors), daemon=True)
        self._reader.start()
        return process

    def start(self) -> int:
        """Runs it to its end; the exit code."""
        return self.begin().wait()

    def stacks(self) -> list[str]:
        """Where every thread of a run stands that stands still; ends it."""
        states, said = self.tree.stacks(), len(self._errors)
        for one in reversed(self.tree.processes()):  # a child before its parent, with which it would end
            one.send(signal.SIGABRT)  # at which Python says where its threads are
            time.sleep(_SAY_SECONDS)
        self.tree.end()
        return states + self._errors[said:]

    @property
    def first_error(self) -> str:
        """The first line in which a process of the latest start says why it ended."""
        self._reader.join(_GONE_SECONDS)  # until nobody is left who could write
        return next((line for line in tuple(self._errors) if line.startswith("error")), "")

    @property
    def summary(self) -> dict[str, Any]:
        return dict(json.loads(self._told.read_text())) if self._told.exists() else {}

    def progress(self) -> int:
        """Grows as the run goes on."""
        log = self.folder / "train.log"
        return log.stat().st_size if log.exists() else 0

    def trains(self, since: int) -> bool:
        """Whether it has told of training since its log had `since` bytes."""
        log = self.folder / "train.log"
        if not log.exists():
            return False
        with open(log, "rb") as file:
            file.seek(since)
            return b"Epoch: [" in file.read()

    def epochs(self) -> list[list[str]]:
        """The figures of every epoch, without its seconds."""
        table = self.folder / "metrics.csv"
        if not table.exists():
            return []
        with open(table, newline="", encoding="utf-8") as file:
            head, *rows = csv.reader(file)
        left_out = head.index("seconds")
        return [[*row[:left_out], *row[left_out + 1 :]] for row in rows]

    def position(self) -> int:
        """Where the next start goes on."""
        try:
            snapshot, _ = newest_whole(self.folder / "snapshots")
        except ValueError:
            return 0
        return 0 if snapshot is None else snapshot.position


def _collect(stream: IO[bytes], lines: list[str]) -> None:
    with stream:
        lines.extend(line.decode(errors="replace").rstrip("\n") for line in stream)


class _Disturbed:
    """A run under faults: the same command line, again and again, until it comes to its end."""

    def __init__(
        self,
        run: _Run,
        campaign: Campaign,
        armoury: Armoury,
        options: ChaosOptions,
        start_timeout: float,
        say: Callable[[str], None],
    ) -> None:
        self._run, self._campaign, self._armoury, self._options = run, campaign, armoury, options
        self._say, self._start_timeout = say, start_timeout
        self._still: list[int] = []  # processes that stand still for good
        self._watched = 0  # the process that a stated action will end
        self._alone = 0  # looks in a row at which nobody else was left

    def run(self) -> RunRecord:
        record, campaign = RunRecord(starts=0), self._campaign
        began = time.perf_counter()
        while True:
            if record.starts == _MOST_STARTS:
                record.problem = f"it did not end in {_MOST_STARTS} starts"
                break
            record.starts += 1
            code, fault = self._start()
            if code == 0:
                break
            if fault is None:
                record.problem = f"it ended with code {code} without a fault: {self._run.first_error}"
                break
        record.seconds = time.perf_counter() - began
        summary = self._run.summary
        record.is_exact = summary.get("weights_sha256") == campaign.weights_sha256
        record.epochs_are_exact = (self._run.epochs(), summary.get("steps")) == (campaign.epochs, campaign.steps)
        return record

    def _start(self) -> tuple[int, FaultRecord | None]:
        """One start with its faults; the launcher's exit code, and the latest fault."""
        position = self._run.position()
        armed = self._armoury.draw(position) if self._is_due() else None
        fault: FaultRecord | None = None
        struck = at_start = self._run.progress()
        up_at = time.monotonic()
        at, self._watched, trains, trains_at = 0.0, 0, False, 0.0
        process = self._run.begin(",".join(map(str, armed.faults)) if armed is not None else "")
        while process.poll() is None:
            time.sleep(_POLL)
            now, progress = time.monotonic(), self._run.progress()
            if not trains and progress > at_start and self._run.trains(at_start):
                trains, trains_at = True, now
            if armed is not None and armed.in_run and not trains:
                up_at = now
            if now - at < _ECHO_SECONDS:
                struck = progress
            if fault is not None and not fault.outcome and progress > struck + _LINES:
                self._settle(fault, "recovered" if KINDS[fault.kind].ends else "unharmed", now - at)
                armed, up_at = self._armoury.draw_timed() if self._is_due() else None, now
            if fault is not None and not fault.outcome:
                self._watch(fault, now - at)
            elif armed is not None and (blow := self._strike(armed, now - up_at)) is not None:
                fault, at, struck = self._note(armed, blow, trains), now, progress
                armed = None
            elif armed is not None and not armed.faults and trains:
                due = max(trains_at, up_at + armed.seconds)
                armed, up_at = (armed, up_at) if now - due < _NOTHING_SECONDS else (self._armoury.draw_timed(), now)
        code = process.returncode
        return code, self._after(fault, armed, code, at)

    def _watch(self, fault: FaultRecord, seconds: float) -> None:
        """Looks whether all that can end has: a launcher gives those that stand still half a minute."""
        left = [one for one in self._run.tree.processes() if one.rank is not None]
        self._alone = self._alone + 1 if self._still and left and all(one.state == "T" for one in left) else 0
        if self._alone == _SURE:
            for one in left:
                one.send(signal.SIGKILL)
            fault.seconds = seconds
        limit = self._options.hang_limit
        if fault.moment == "set-up" and (fault.kind == "stop" or not KINDS[fault.kind].ends):
            limit += self._start_timeout + self._campaign.undisturbed_seconds  # it counts from the imports' end
        if seconds > limit and not fault.seconds:
            fault.hung = True
            fault.stood = self._run.stacks()

    def _is_due(self) -> bool:
        return len(self._campaign.faults) < self._options.fault_count

    def _strike(self, armed: Armed, up: float) -> Blow | None:
        """Does it if its moment has come; of one before an action, finds out whether it has."""
        if not armed.faults:
            if up < armed.seconds:
                return None
            return KINDS[armed.kind].strike(self._run.tree, self._run.folder, self._armoury.chance)
        rank = armed.faults[0].action.stage
        worker = self._run.tree.workers().get(rank)
        if armed.kind == "stop":
            return Blow(rank, (worker.pid,)) if worker is not None and worker.state == "T" else None
        before, self._watched = self._watched, worker.pid if worker is not None else self._watched
        return Blow(rank) if before and (worker is None or worker.pid != before) else None

    def _note(self, armed: Armed, blow: Blow, has_begun: bool) -> FaultRecord:
        self._still += blow.pids
        moment = armed.moment or ("steady state" if has_begun else "set-up")
        action = "".join(f"{one} " for one in armed.faults)
        fault = FaultRecord(kind=armed.kind, moment=moment, rank=blow.rank, action=action)
        self._campaign.faults.append(fault)
        for one in armed.faults:
            self._armoury.furthest = max(self._armoury.furthest, one.action.microbatch + 1)
        return fault

    def _after(self, fault: FaultRecord | None, armed: Armed | None, code: int, at: float) -> FaultRecord | None:
        """Once the launcher has ended."""
        now = time.monotonic()
        if armed is not None and armed.faults and code != 0:
            fault, at = self._note(armed, Blow(armed.faults[0].action.stage), True), now
        for pid in self._still:  # one that was stopped must end as soon as it goes on
            if any(one.pid == pid for one in self._run.tree.processes()):
                os.kill(pid, signal.SIGCONT)
        self._still.clear()
        is_gone = self._run.tree.is_gone(_GONE_SECONDS)
        orphans = 0 if is_gone else self._run.tree.end()
        if fault is None:
            return None
        fault.orphans = orphans
        if fault.outcome and code != 0:
            fault.outcome = ""  # it went on for a while only
        if not fault.outcome:
            fault.words = self._run.first_error
            words = KINDS[fault.kind].words.format(rank=fault.rank)
            fault.named = code == 0 or not words or re.search(words, fault.words) is not None
            self._settle(fault, "restarted" if code != 0 else "unharmed", now - at)
        return fault

    def _settle(self, fault: FaultRecord, outcome: str, seconds: float) -> None:
        fault.outcome, fault.seconds = outcome, fault.seconds or seconds
        what = f"fault {len(self._campaign.faults)}: {fault.kind} {fault.action}in {fault.moment}"
        self._say(f"{what}: {'hung, ' * fault.hung}{outcome} after {fault.seconds:.1f} s; {fault.words[:160] or '-'}")
