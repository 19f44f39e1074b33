"""LLS against backpropagation on one GPU: 25 epochs and per-step times of every engine, in one run.

    python benchmarks/single_gpu.py --json results.json          # synthetic data of CIFAR-10's size
    python benchmarks/single_gpu.py --dataset CIFAR10 --dataset-dir datasets

Contenders take turns, `--repeats` times, so that a drifting machine favours nobody; the table gives medians. Set-up
(compilation, capture, warm-up) is outside the times and stands beside them. Training only, unless `--evaluate` is
given.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unlocked.data import load_dataset
from unlocked.models import get_model
from unlocked.rules import get_rule
from unlocked.runtime import RunResult, Trainer


@dataclass(frozen=True)
class Contender:
    """One way to train."""

    name: str
    rule: str
    engine: str = "sequential"
    kernels: str = "auto"
    graphs: bool = True
    compile: bool = False
    steps: int | None = None
    """Training micro-batches of a run; None: all epochs."""


CONTENDERS = [
    Contender("LLS streams", "LLS", engine="streams"),
    Contender("LLS_M streams", "LLS_M", engine="streams"),
    Contender("LLS_MxM streams", "LLS_MxM", engine="streams"),
    Contender("LLS streams cuda", "LLS", engine="streams", kernels="cuda", steps=4000),
    Contender("LLS streams, no graphs", "LLS", engine="streams", graphs=False, steps=1000),
    Contender("LLS sequential graph", "LLS", steps=4000),
    Contender("LLS sequential eager", "LLS", kernels="torch", graphs=False, steps=400),
    Contender("BP graph", "BP", steps=4000),
    Contender("BP compiled", "BP", kernels="torch", graphs=False, compile=True, steps=1000),
    Contender("BP compiled graph", "BP", compile=True, steps=4000),
    Contender("BP eager", "BP", kernels="torch", graphs=False, steps=400),
]


def main() -> int:
    options = parse()
    if not torch.cuda.is_available():
        print("single_gpu: needs a CUDA device; none is there", file=sys.stderr)
        return 1
    torch.backends.cudnn.benchmark = True
    if options.precision == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    else:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    train, test = load_dataset(options.dataset, options.dataset_dir)
    chosen = [c for c in CONTENDERS if not options.only or any(word == c.name for word in options.only)]
    runs: dict[str, list[dict[str, Any]]] = {c.name: [] for c in chosen}
    for repeat in range(options.repeats):
        for contender in chosen:
            steps = contender.steps
            if repeat and steps is None:
                steps = 4000
            if options.max_steps:
                steps = min(steps or options.max_steps, options.max_steps)
            try:
                runs[contender.name].append(measure(contender, train, test, options, steps))
            except Exception as error:  # a contender that fails is shown as failed; the others still report
                runs[contender.name].append({"error": f"{type(error).__name__}: {error}"})
            print(f"{contender.name}: {runs[contender.name][-1]}", flush=True)
    report = {"environment": environment(), "options": vars(options) | {"json": str(options.json)}, "runs": runs}
    print(table(runs))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1, default=str))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--dataset-dir", default="datasets")
    parser.add_argument("--model", default="SmallConv")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--precision", choices=("fp32", "tf32"), default="tf32")
    parser.add_argument("--evaluate", action="store_true", help="evaluate after every epoch")
    parser.add_argument("--trace", type=Path, help="write the first contender's timeline here")
    parser.add_argument("--only", nargs="*", help="names of contenders")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def measure(
    contender: Contender, train: Any, test: Any, options: argparse.Namespace, steps: int | None
) -> dict[str, Any]:
    """One run of one contender."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    channels, height, _ = train.image_shape
    model = get_model(options.model, in_channels=channels, num_classes=train.num_classes, image_size=height)
    if contender.compile:
        for block in model:
            block.body.compile()
    rule: Any = "BP"
    if contender.rule != "BP":
        rule = get_rule(contender.rule, temperature=0.5, label_smoothing=0.0, waveform="cosine")
    fused = contender.kernels == "torch"
    trainer = Trainer(
        model,
        rule=rule,
        optimizer=partial(torch.optim.Adam, lr=0.01, fused=fused or None),
        engine=contender.engine,
        device="cuda",
        kernels=contender.kernels,
        graphs=contender.graphs,
        print_freq=200,
        trace=options.trace if contender is CONTENDERS[0] else None,
    )
    began = time.perf_counter()
    result: RunResult = trainer.fit(
        train,
        epochs=options.epochs,
        batch_size=options.batch_size,
        eval_data=test if options.evaluate else None,
        max_steps=steps,
    )
    last = result.epochs[-1]
    return {
        "steps": result.steps,
        "seconds": result.train_seconds,
        "us_per_step": 1e6 * result.train_seconds / result.steps,
        "images_per_second": result.images_per_second,
        "setup_seconds": result.setup_seconds,
        "wall_seconds": time.perf_counter() - began,
        "peak_memory_mib": result.peak_memory_bytes[0] / 2**20,
        "busy_fraction": result.busy_fraction,
        "train_loss": last.train_loss,
        "train_acc1": last.train_acc1,
        "test_acc1": result.test_acc1,
        "local_losses": result.local_losses,
    }


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    lines = [f"{'contender':<26}{'us/step':>10}{'min':>9}{'max':>9}{'images/s':>12}{'25 epochs s':>13}{'MiB':>8}"]
    for name, results in runs.items():
        times = [r["us_per_step"] for r in results if "error" not in r]
        if not times:
            lines.append(f"{name:<26}failed: {results[0]['error'][:90]}")
            continue
        median = statistics.median(times)
        images = statistics.median(r["images_per_second"] for r in results if "error" not in r)
        whole = median * 25 * 782 / 1e6
        memory = results[0]["peak_memory_mib"]
        lines.append(
            f"{name:<26}{median:>10.1f}{min(times):>9.1f}{max(times):>9.1f}{images:>12.0f}{whole:>13.2f}{memory:>8.0f}"
        )
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
    }


if __name__ == "__main__":
    sys.exit(main())
