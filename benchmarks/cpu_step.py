"""The local step without a GPU: against a plain implementation and backpropagation, and taken apart.

    python benchmarks/cpu_step.py                                          # synthetic data of CIFAR-10's size
    python benchmarks/cpu_step.py --dataset CIFAR10 --dataset-dir datasets --json cpu_step.json

Seven tables, of SmallConv at batch 64 unless they say otherwise:
  engines      images/s in processes of their own that take turns: plain PyTorch (benchmarks/plain_lls.py), eager
               backpropagation (channels last, fused Adam), LLS by one and two threads and by two processes
  optimizers   images/s of LLS by one thread with Adam, the authors' AdamWSF and the library's newest, taking turns
  ladder       milliseconds of each kept improvement on top of the one before, taking turns in this process
  operations   where a step's time goes now: bytes, operations, and the share of what the machine reaches
  surroundings what lies around the convolutions of a step: by one thread and by several, out to the whole run
  hops         an edge between two processes (benchmarks/pipeline_scaling.py)
  memory       VGG8 at batch 128, LLS and backpropagation: what training adds to the process, and the whole process
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cpu_operations import ceilings, ladder, operations
from cpu_surroundings import surroundings
from pipeline_scaling import ROOT, show_hops, train

from unlocked.comparison.environment import environment
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.typed import to_plain

Runs = dict[str, list[float]]


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    print(f"{environment().line}, {options.threads} threads where nothing else is said\n")
    settings = {k: str(v) for k, v in vars(options).items()}
    report: dict[str, Any] = {"environment": to_plain(environment()), "options": settings}
    tables: dict[str, Callable[[argparse.Namespace], Any]] = {
        "engines": show_engines,
        "optimizers": show_optimizers,
        "ladder": show_ladder,
        "operations": show_operations,
        "surroundings": show_surroundings,
        "hops": lambda options: show_hops(options.hop_batches),
        "memory": show_memory,
    }
    for name in options.only or tables:
        report[name] = tables[name](options)
        print(flush=True)
    if options.json:
        write_json(options.json, report)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--dataset-dir", default="datasets")
    parser.add_argument("--max-steps", type=int, default=200, help="micro-batches of a run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="what `two threads` stands for")
    parser.add_argument("--steps", type=int, default=20, help="steps of a round in the ladder and per operation")
    parser.add_argument("--hop-batches", type=int, default=1000)
    parser.add_argument("--kernels", default="auto")
    tables = ("engines", "optimizers", "ladder", "operations", "surroundings", "hops", "memory")
    parser.add_argument("--only", nargs="*", choices=tables)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def show_engines(options: argparse.Namespace) -> dict[str, Any]:
    """Interleaved runs; ratios are of medians, with the smallest and the largest of the same turn beside them."""
    many = options.threads
    backpropagation = ["--training-mode", "BP"]
    contenders: dict[str, Callable[[], float]] = {
        f"plain PyTorch, LLS, {many} threads": partial(plain, options),
        f"BP sequential, {many} threads": lambda: rate(train(options, "sequential", 1, many, backpropagation)),
        "LLS sequential, 1 thread": lambda: rate(train(options, "sequential", 1, 1)),
        f"LLS sequential, {many} threads": lambda: rate(train(options, "sequential", 1, many)),
        "LLS processes, 2 x 1 thread": lambda: rate(train(options, "processes", 2, 1)),
    }
    runs: Runs = {name: [] for name in contenders}
    for _ in range(options.repeats):
        for name, run in contenders.items():
            runs[name].append(run())
    plain_name, bp, one, two, processes = runs
    pairs = ((two, plain_name), (two, bp), (processes, two), (two, one), (processes, one))
    print_runs("engines", runs, pairs)
    return runs


def show_optimizers(options: argparse.Namespace) -> dict[str, Any]:
    """The schedule-free optimizers at the authors' batch size, beside the same run with Adam."""
    flags = ["--batch-size", "128", "--lr", "5e-3", "--optimizer"]
    runs: Runs = {name: [] for name in ("Adam", "AdamWSF", "AdamWScheduleFree")}
    for _ in range(options.repeats):
        for name, values in runs.items():
            values.append(rate(train(options, "sequential", 1, 1, [*flags, name])))
    print_runs("optimizers", runs, (("AdamWSF", "AdamWScheduleFree"), ("AdamWSF", "Adam")))
    return runs


def print_runs(title: str, runs: Runs, pairs: Iterable[tuple[str, str]]) -> None:
    """Images/s of each contender, then the ratio of each pair: of the medians and, in brackets, turn by turn."""
    print(f"{title:<32}{'images/s':>10}{'min':>9}{'max':>9}")
    for name, values in runs.items():
        print(f"{name:<32}{statistics.median(values):>10.0f}{min(values):>9.0f}{max(values):>9.0f}")
    for above, below in pairs:
        turns = [a / b for a, b in zip(runs[above], runs[below], strict=True)]
        ratio = statistics.median(runs[above]) / statistics.median(runs[below])
        print(f"  {above} / {below}: {ratio:.2f} ({min(turns):.2f} to {max(turns):.2f})")


def show_ladder(options: argparse.Namespace) -> Runs:
    times = ladder(options.repeats, options.steps)
    print(f"{'ladder, ' + str(options.threads) + ' threads':<32}{'ms/step':>10}{'min':>9}{'max':>9}{'x plain':>9}")
    first = statistics.median(next(iter(times.values())))
    for name, values in times.items():
        middle = statistics.median(values)
        print(
            f"{name:<32}{middle * 1e3:>10.2f}{min(values) * 1e3:>9.2f}{max(values) * 1e3:>9.2f}{first / middle:>9.2f}"
        )
    return times


def show_operations(options: argparse.Namespace) -> dict[str, Any]:
    """With one thread, where an operation's time is its own."""
    torch.set_num_threads(1)
    try:
        peak, bandwidth = ceilings()
        rows = operations(options.steps)
    finally:
        torch.set_num_threads(options.threads)
    total = sum(row["seconds"] for row in rows)
    print(f"one thread; this machine reaches {peak / 1e9:.0f} GFLOP/s (product) and {bandwidth / 1e9:.1f} GB/s (copy)")
    print(
        f"{'layer':<10}{'operation':<28}{'ms':>8}{'share':>8}{'MiB':>8}{'MFLOP':>8}"
        f"{'GFLOP/s':>9}{'GB/s':>7}{'floor ms':>10}"
    )
    for row in rows:
        time, moved, flops = row["seconds"], row["bytes"], row["operations"]
        row["floor"] = floor = max(flops / peak, moved / bandwidth)
        print(
            f"{row['layer']:<10}{row['operation']:<28}{time * 1e3:>8.3f}{time / total:>8.1%}{moved / 2**20:>8.1f}"
            f"{flops / 1e6:>8.0f}{flops / time / 1e9:>9.1f}{moved / time / 1e9:>7.1f}{floor * 1e3:>10.3f}"
        )
    print(f"{'sum':<38}{total * 1e3:>8.3f}")
    return {"peak_operations_per_second": peak, "copy_bytes_per_second": bandwidth, "rows": rows}


def show_surroundings(options: argparse.Namespace) -> list[dict[str, Any]]:
    counts = sorted({1, options.threads})
    tables = [surroundings(threads, options.repeats, options.steps) for threads in counts]
    torch.set_num_threads(options.threads)
    print("| ms of a step | " + " | ".join(f"threads: {threads}" for threads in counts) + " |")
    print("| --- |" + " --- |" * len(counts))
    for name in tables[0]["milliseconds"]:
        cells = []
        for table in tables:
            values = table["milliseconds"][name]
            cells.append(f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        print(f"| {name} | {' | '.join(cells)} |")
    return tables


def show_memory(options: argparse.Namespace) -> dict[str, dict[str, int]]:
    """A run of no step says what the process holds anyway: Python, torch, the data and the model."""
    flags = ["--model", "VGG8", "--batch-size", "128"]
    found: dict[str, dict[str, int]] = {}
    for mode in ("LLS", "BP"):
        peaks = {}
        for what, size, steps in (("base", "2", 1), ("whole", "128", 3)):
            few = argparse.Namespace(**(vars(options) | {"max_steps": steps}))
            more = [*flags, "--training-mode", mode, "--batch-size", size]
            peaks[what] = int(train(few, "sequential", 1, options.threads, more)["peak_memory_bytes"][0])
        found[mode] = peaks | {"training": peaks["whole"] - peaks["base"]}
    print(f"{'memory, VGG8, batch 128':<26}{'whole process MiB':>18}{'of it training MiB':>20}")
    for mode, peaks in found.items():
        print(f"{mode:<26}{peaks['whole'] / 2**20:>18.0f}{peaks['training'] / 2**20:>20.0f}")
    ratios = {what: found["LLS"][what] / found["BP"][what] for what in ("whole", "training")}
    print(f"{'LLS / BP':<26}{ratios['whole']:>18.2f}{ratios['training']:>20.2f}")
    return found


def plain(options: argparse.Namespace) -> float:
    command = [sys.executable, str(ROOT / "benchmarks" / "plain_lls.py"), "--steps", str(options.max_steps)]
    command += ["--threads", str(options.threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    result = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    return float(json.loads(result.stdout)["images_per_second"])


def rate(summary: dict[str, Any]) -> float:
    return float(summary["images_per_second"])


if __name__ == "__main__":
    sys.exit(main())
