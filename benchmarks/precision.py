"""What bfloat16 costs in accuracy: rules trained in float32 and in bfloat16, everything else alike.

    python benchmarks/precision.py --dataset-dir datasets --json precision.json      # 25 minutes on two cores
    python benchmarks/precision.py --dataset digits --num-epochs 5 --rules LLS BP    # a minute

Every run is a command of its own, `unlocked train`, and is kept as soon as it has ended: the same command goes on where
it was stopped. Test accuracy is that of the last epoch, in per cent, its mean over the seeds.
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
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.typed import to_plain

PRECISIONS = ("fp32", "bf16")
Run = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    told = {name: getattr(options, name) for name in ("dataset", "model", "num_epochs", "batch_size", "lr")}
    runs = _kept(options.json, told)
    for seed in options.seeds:
        for rule in options.rules:
            for precision in PRECISIONS:
                cell = {"rule": rule, "precision": precision, "seed": seed}
                if any(cell.items() <= run.items() for run in runs):
                    continue
                runs.append(cell | _trained(cell, options))
                print(f"{rule} {precision} seed {seed}: {runs[-1]['accuracy']:.2f} %", flush=True)
                if options.json:
                    write_json(options.json, {"environment": to_plain(environment()), "options": told, "runs": runs})
    print(table(runs))
    return 0


def _kept(path: Path | None, told: dict[str, Any]) -> list[Run]:
    if path is None or not path.exists():
        return []
    kept = json.loads(path.read_text())
    if kept["options"] != told:
        raise SystemExit(f"{path} is of other options: {kept['options']}")
    return list(kept["runs"])


def _trained(cell: Run, options: argparse.Namespace) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        summary = Path(folder) / "summary.json"
        flags = {"dataset": options.dataset, "model": options.model, "num-epochs": options.num_epochs}
        flags |= {"batch-size": options.batch_size, "lr": options.lr, "seed": cell["seed"]}
        flags |= {"training-mode": cell["rule"], "precision": cell["precision"], "summary": summary}
        if options.dataset_dir is not None:
            flags["dataset-dir"] = options.dataset_dir
        command = [sys.executable, "-m", "unlocked", "train", "--plain", "--lr-scheduler", "CosineAnnealingLR"]
        command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        threads = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        subprocess.run(command, check=True, env=threads, stdout=subprocess.DEVNULL)
        told = json.loads(summary.read_text())
    return {"accuracy": told["test_acc1"]} | {name: told[name] for name in ("images_per_second", "weights_sha256")}


def table(runs: Sequence[Run]) -> str:
    """Accuracies by rule: float32, bfloat16, and the difference."""
    lines = ["| rule | seeds | fp32, % | bf16, % | difference, points |", "| --- | --- | --- | --- | --- |"]
    for rule in dict.fromkeys(run["rule"] for run in runs):
        of_rule = [run for run in runs if run["rule"] == rule]
        found = {p: {r["seed"]: r["accuracy"] for r in of_rule if r["precision"] == p} for p in PRECISIONS}
        seeds = sorted(found["fp32"].keys() & found["bf16"].keys())
        if seeds:
            means = [statistics.mean(found[p][seed] for seed in seeds) for p in PRECISIONS]
            lines.append(f"| {rule} | {len(seeds)} | {means[0]:.2f} | {means[1]:.2f} | {means[1] - means[0]:+.2f} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=["LLS", "LLS_M", "LLS_MxM", "BP"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--dataset", default="CIFAR10")
    parser.add_argument("--dataset-dir", type=Path)
    parser.add_argument("--model", default="SmallConv")
    parser.add_argument("--num-epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
