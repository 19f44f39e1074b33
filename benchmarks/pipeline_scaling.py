"""What a pipeline of processes gains over the plain loop on this machine's CPU, and what a hop between stages costs.

    python benchmarks/pipeline_scaling.py                                   # synthetic data of CIFAR-10's size
    python benchmarks/pipeline_scaling.py --dataset CIFAR10 --dataset-dir datasets --json scaling.json
    python benchmarks/pipeline_scaling.py --models SmallConv:5:150 VGG8:8:32 MobileNetV1:16:48    # on many cores

Runs take turns, `--repeats` times: `sequential` with one thread and with two, and two processes of one thread, each
training SmallConv by LLS for `--max-steps` micro-batches of 64 without evaluation. Set-up is not in the times. The hop
is an edge between two processes whose stages do nothing: seconds per micro-batch, sent and received in a row.

With `--models` instead: each network by 1, 2, 4, ... processes of one thread up to a number (a small one: each up to
it), as far as there are layers and cores, and by one process with as many threads.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unlocked.comparison.environment import environment
from unlocked.comparison.stages.hops import measure_hops
from unlocked.data.cores import usable_cores
from unlocked.models import get_model
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.typed import to_plain

ROOT = Path(__file__).resolve().parent.parent
# Shapes of SmallConv's edges at batch 64: after conv1, conv2, conv3 and linear1.
HOPS = {
    "conv1 (32, 16, 16)": (32, 16, 16),
    "conv2 (64, 8, 8)": (64, 8, 8),
    "conv3 (128, 2, 2)": (128, 2, 2),
    "linear1 (512)": (512,),
}

# By default processes have cores of their own and read ahead; one process does neither.
PLACEMENTS = {
    "processes, 2 x 1 thread: cores shared": ["--no-pin"],
    "processes, 2 x 1 thread: not read ahead": ["--prefetch", "0"],
    "sequential, 2 threads: read ahead": ["--prefetch", "2"],
}


def main() -> int:
    options = parse()
    return scale(options) if options.models else compare(options)


def compare(options: argparse.Namespace) -> int:
    """Two processes beside one, taking turns, and the hops."""
    contenders = {
        "sequential, 1 thread": ("sequential", 1, 1),
        "sequential, 2 threads": ("sequential", 1, 2),
        "processes, 2 x 1 thread": ("processes", 2, 1),
    }
    flags: dict[str, list[str]] = {name: [] for name in contenders}
    if options.placement:
        contenders |= {name: contenders[name.split(":")[0]] for name in PLACEMENTS}
        flags |= PLACEMENTS
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for _ in range(options.repeats):
        for name, (engine, processes, threads) in contenders.items():
            runs[name].append(train(options, engine, processes, threads, flags[name]))
    rates = {name: [run["images_per_second"] for run in results] for name, results in runs.items()}
    base = statistics.median(rates["sequential, 1 thread"])
    print(f"SmallConv, LLS, {options.dataset}, batch 64, {options.max_steps} micro-batches, {options.repeats} repeats")
    print(f"{environment().line}\n")
    print(f"{'engine':<42}{'images/s':>10}{'min':>9}{'max':>9}{'x 1 thread':>12}  busy share of each stage")
    for name, values in rates.items():
        median = statistics.median(values)
        busy = ", ".join(f"{share:.2f}" for share in runs[name][-1]["busy_fraction"])
        print(f"{name:<42}{median:>10.0f}{min(values):>9.0f}{max(values):>9.0f}{median / base:>12.2f}  {busy}")
    stages = runs["processes, 2 x 1 thread"][-1]["stages"]
    print("stages: " + " | ".join(", ".join(stage) for stage in stages))
    same = len(
        {run["weights_sha256"] for name in ("sequential, 1 thread", "processes, 2 x 1 thread") for run in runs[name]}
    )
    print(f"weights of one thread and of two processes: {'equal, bit for bit' if same == 1 else 'DIFFERENT'}\n")
    hops = show_hops(options.hop_batches)
    if options.json:
        report = {"environment": to_plain(environment()), "options": {k: str(v) for k, v in vars(options).items()}}
        write_json(options.json, {**report, "runs": runs, "hops": hops})
    return 0 if same == 1 else 1


def scale(options: argparse.Namespace) -> int:
    """Every network by more and more processes. Results are written after each run; 1 if a digest differs."""
    report: dict[str, Any] = {"environment": to_plain(environment()), "runs": []}
    report["options"] = {k: str(v) for k, v in vars(options).items()}
    print(f"LLS, {options.dataset}, batch 64\n{environment().line}\n")
    print(f"{'network':<13}{'processes':>10}{'threads':>9}{'images/s':>10}{'x 1':>7}  busy share of each stage")
    different = 0
    for word in options.models:
        model, most, steps = parse_model(word)
        base: dict[str, Any] = {}
        for processes, threads in placements(model, most):
            engine = "sequential" if processes == 1 else "processes"
            flags = ["--model", model, "--max-steps", str(steps)]
            runs = [train(options, engine, processes, threads, flags) for _ in range(options.repeats)]
            rate = statistics.median(run["images_per_second"] for run in runs)
            base = base or {"rate": rate, "digest": runs[0]["weights_sha256"]}
            same = threads > 1 or all(run["weights_sha256"] == base["digest"] for run in runs)
            different += not same
            busy = ", ".join(f"{share:.2f}" for share in runs[-1]["busy_fraction"])
            print(
                f"{model:<13}{processes:>10}{threads:>9}{rate:>10.0f}{rate / base['rate']:>7.2f}  {busy}"
                f"{'' if same else '  DIFFERENT WEIGHTS'}",
                flush=True,
            )
            report["runs"].append({"model": model, "processes": processes, "threads": threads, "summaries": runs})
            if options.json:
                write_json(options.json, report)
    return 1 if different else 0


def parse_model(word: str) -> tuple[str, int, int]:
    """Name, most processes and micro-batches of "VGG8:8:32"."""
    try:
        name, most, steps = word.split(":")
        return name, int(most), int(steps)
    except ValueError:
        raise SystemExit(f"pipeline_scaling: --models {word} is not NAME:PROCESSES:MICRO-BATCHES") from None


def placements(model: str, most: int) -> list[tuple[int, int]]:
    """(processes, threads of each): one, more and more, then one with the threads of the most."""
    limit = min(most, len(get_model(model, in_channels=3, num_classes=10, image_size=32)), usable_cores())
    counts = range(1, limit + 1) if limit <= 5 else sorted({1, 2, 4, 8, limit} & set(range(limit + 1)))
    return [(count, 1) for count in counts] + ([(1, limit)] if limit > 1 else [])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--dataset-dir", default="datasets")
    parser.add_argument("--max-steps", type=int, default=400, help="micro-batches of a run, where --models says none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--placement", action="store_true", help="also without cores of one's own, and reading ahead")
    parser.add_argument("--hop-batches", type=int, default=2000)
    parser.add_argument(
        "--models", nargs="+", metavar="NAME:PROCESSES:MICRO-BATCHES", help="the table of many processes"
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def show_hops(batches: int) -> dict[str, Any]:
    """Bytes and seconds per micro-batch of each of SmallConv's edges, by shared memory and by Gloo."""
    hops = {
        transport: measure_hops(HOPS, batch_size=64, transport=transport, batches=batches)
        for transport in ("shared", "group")
    }
    print(f"{'edge (batch 64)':<22}{'KiB':>8}{'shared us':>12}{'limit us':>10}{'Gloo us':>10}")
    for name, (size, seconds) in hops["shared"].items():
        limit = 60 + size / 4096  # the house's budget for a hop: 60 us and 1 us per 4 KiB
        gloo = hops["group"][name][1]
        print(f"{name:<22}{size / 1024:>8.0f}{seconds * 1e6:>12.0f}{limit:>10.0f}{gloo * 1e6:>10.0f}")
    return hops


def train(
    options: argparse.Namespace, engine: str, processes: int, threads: int, more: Sequence[str] = ()
) -> dict[str, Any]:
    """One run in processes of its own, with `more` flags; its summary."""
    with tempfile.TemporaryDirectory() as folder:
        summary = Path(folder) / "summary.json"
        launcher = [sys.executable]
        if engine == "processes":
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        flags = ["--dataset", options.dataset, "--dataset-dir", options.dataset_dir, "--engine", engine, "--no-eval"]
        flags += ["--max-steps", str(options.max_steps), "--kernels", options.kernels, "--plain", *more]
        command = [*launcher, str(ROOT / "launch" / "pipeline.py"), *flags, "--no-save", "--summary", str(summary)]
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
        content: dict[str, Any] = json.loads(summary.read_text())
        return content


if __name__ == "__main__":
    sys.exit(main())
