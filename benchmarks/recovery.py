"""How long a killed worker is missed, and what it costs to be able to bring it back.

    python benchmarks/recovery.py                                # SmallConv on synthetic data, two stages
    python benchmarks/recovery.py --kills 20 --pairs 7 --json recovery.json -- --dataset digits

One run of two processes is killed at `--kills` random moments, one stage or the other: from the signal to the first
item that had not been done, by the machine's clock. Then `--pairs` pairs of undisturbed runs take turns, with and
without recovery: images per second, and the processor's seconds of the whole run, set-up included, which other work on
the machine disturbs less. What follows `--` are flags of `unlocked train` for all of them.
"""

import argparse
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unlocked.comparison.environment import environment
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.typed import to_plain

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["--plain", "--no-eval", "--stages", "2"]
DEFAULT = ["--dataset", "synthetic"]


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = {"environment": to_plain(environment()), "flags": [*FLAGS, *options.flags]}
        if options.kills:
            result["recovery"] = killed(options, Path(folder))
        if options.pairs:
            result["cost"] = undisturbed(options, Path(folder))
    if options.json is not None:
        write_json(options.json, result)
    return 0


def killed(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run under fire."""
    chance = random.Random(options.seed)
    summary, log = folder / "summary.json", folder / "run" / "train.log"
    command = [*start([*options.flags, "--num-epochs", "100000", "--print-freq", "5"]), "--summary", str(summary)]
    command += ["--save-path", str(folder), "--experiment-name", "run", "--max-recoveries", "1000000"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        await_line(log, "Epoch: [0]", process)
        moments = []
        for number in range(options.kills):
            time.sleep(chance.uniform(0.5, 2.0))
            workers = descendants(process.pid, 3)
            moments.append(time.time())
            os.kill(workers[chance.randrange(len(workers))], signal.SIGKILL)
            await_line(log, "recovered stage", process, number + 1)
        process.send_signal(signal.SIGINT)
    recoveries = json.loads(summary.read_text())["recoveries"]
    assert len(recoveries) == len(moments), f"{len(recoveries)} recoveries of {len(moments)} deaths"
    seconds = sorted(one["ended"] - moment for one, moment in zip(recoveries, moments, strict=True))
    replayed = [one["replayed"] for one in recoveries]
    told = {
        "kills": len(seconds),
        "median_seconds": statistics.median(seconds),
        "longest_seconds": seconds[-1],
        "median_replayed": statistics.median(replayed),
        "seconds": seconds,
    }
    print(
        f"{told['kills']} kills: {told['median_seconds']:.2f} s from the signal to new work (median; at most "
        f"{told['longest_seconds']:.2f} s), {told['median_replayed']:g} items done again"
    )
    return told


def undisturbed(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs with and without, in turns; the order changes from pair to pair."""
    rates: dict[str, list[float]] = {"with": [], "without": []}
    cpu: dict[str, list[float]] = {"with": [], "without": []}
    for pair in range(options.pairs):
        for kind in sorted(rates, reverse=bool(pair % 2)):
            summary = folder / f"{kind}-{pair}.json"
            command = start([*options.flags, "--max-steps", str(options.max_steps), "--summary", str(summary)])
            command += [] if kind == "with" else ["--max-recoveries", "0"]
            before = cpu_seconds()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            cpu[kind].append(cpu_seconds() - before)
            rates[kind].append(json.loads(summary.read_text())["images_per_second"])
    ratios = [a / b for a, b in zip(rates["with"], rates["without"], strict=True)]
    seconds = statistics.median(a / b for a, b in zip(cpu["with"], cpu["without"], strict=True))
    told = {"images_per_second": rates, "median_ratio": statistics.median(ratios), "ratios": ratios}
    told |= {"cpu_seconds": cpu, "median_cpu_ratio": seconds}
    print(
        f"{options.pairs} pairs: {statistics.median(rates['with']):.0f} images/s with recovery, "
        f"{statistics.median(rates['without']):.0f} without; median of the pairs' ratios {told['median_ratio']:.3f}, "
        f"of their processor's seconds {seconds:.3f}"
    )
    return told


def cpu_seconds() -> float:
    """Of all processes that have been started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def start(flags: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "unlocked", "train", *FLAGS, *flags]


def await_line(log: Path, words: str, process: "subprocess.Popen[bytes]", count: int = 1) -> None:
    """Until the log has so many lines with these words."""
    while not log.exists() or log.read_text().count(words) < count:
        if process.poll() is not None:
            raise SystemExit(f"the run ended with {process.returncode} before it came to {words!r}")
        time.sleep(0.02)


def descendants(pid: int, generations: int) -> list[int]:
    """The processes so many generations below: the launcher's supervisors', and their zygotes' children."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listing.splitlines()]
    found = [pid]
    for _ in range(generations):
        found = [child for child, parent in pairs if parent in found]
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="0: none")
    parser.add_argument("--pairs", type=int, default=5, help="0: none")
    parser.add_argument("--max-steps", type=int, default=300, help="of each undisturbed run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("flags", nargs="*", default=DEFAULT, help="of unlocked train, after --")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
