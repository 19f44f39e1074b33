"""Is this checkout as fast as another one? Training runs of both take turns, so that a noisy machine troubles both.

    git worktree add ../before COMMIT
    python benchmarks/two_checkouts.py ../before

SmallConv by LLS at batch 64, training only: one thread, two threads, a pipeline of two processes; images/s of both, the
ratio of the medians, and the lowest and highest ratio of two runs that followed each other. The kernels of both are
compiled before the first turn.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from unlocked.comparison.environment import environment
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.typed import to_plain

HERE = Path(__file__).resolve().parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
# name -> (launcher, flags, threads of a process)
WAYS: dict[str, tuple[list[str], list[str], int]] = {
    "one thread": ([], ["--engine", "sequential", "--threads", "1"], 1),
    "two threads": ([], ["--engine", "sequential", "--threads", "2"], 2),
    "streams, one thread": ([], ["--engine", "streams", "--threads", "1"], 1),
    "two processes": (TORCHRUN, ["--threads", "1"], 1),
}


def main() -> int:
    options = parse()
    checkouts = {"before": options.other.resolve(), "after": HERE}
    if not (checkouts["before"] / "launch" / "pipeline.py").is_file():
        print(f"error: {options.other} is no checkout: it has no launch/pipeline.py", file=sys.stderr)
        return 2
    print(f"{environment().line}\n{'':<22}{'before':>10}{'after':>10}{'ratio':>8}{'lowest':>8}{'highest':>9}")
    speeds: dict[str, Any] = {}
    for way in options.only or WAYS:
        rates: dict[str, list[float]] = {name: [] for name in checkouts}
        for turn in range(options.repeats + 1):  # the first one warms up, and compiles
            for name in sorted(checkouts, reverse=bool(turn % 2)):
                rate = train(checkouts[name], way, options)
                if turn:
                    rates[name].append(rate)
        before, after = (statistics.median(rates[name]) for name in ("before", "after"))
        pairs = [b / a for a, b in zip(rates["before"], rates["after"], strict=True)]
        figures = f"{before:>10,.0f}{after:>10,.0f}{after / before:>8.3f}{min(pairs):>8.3f}{max(pairs):>9.3f}"
        print(f"{way:<22}{figures}", flush=True)
        speeds[way] = rates
    if options.json is not None:
        conditions = {"environment": to_plain(environment()), "micro_batches": options.max_steps}
        write_json(options.json, {**conditions, "images_per_second": speeds})
    return 0


NOTHING_SAVED = {"UNLOCKED_SAVE_PATH": ""}  # a flag would be unknown to an older checkout


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the checkout to compare with")
    parser.add_argument("--max-steps", type=int, default=300, help="micro-batches of a run")
    parser.add_argument("--repeats", type=int, default=7, help="turns that count")
    parser.add_argument("--only", nargs="*", choices=tuple(WAYS))
    parser.add_argument("--json", type=Path, help="write every run's figure here")
    return parser.parse_args()


def train(checkout: Path, way: str, options: argparse.Namespace) -> float:
    """Images per second of one run with a checkout's own code."""
    launcher, flags, threads = WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        summary = Path(folder) / "summary.json"
        subprocess.run(
            [
                *(sys.executable, *launcher, str(checkout / "launch" / "pipeline.py"), "--plain", "--no-eval"),
                *("--dataset", "synthetic", "--num-epochs", "1000", "--max-steps", str(options.max_steps)),
                *("--summary", str(summary), *flags),
            ],
            env=os.environ | {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": str(threads), **NOTHING_SAVED},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return float(json.loads(summary.read_text())["images_per_second"])


if __name__ == "__main__":
    sys.exit(main())
