"""How long it takes until something happens: the command line, a first step, and twenty short runs in one process.

    python benchmarks/start_up.py
    python benchmarks/start_up.py --json start_up.json

Each line is a process of its own, from its start to its end: wall-clock seconds (the best, the median and the slowest
of the repeats), and the processor's seconds in it and in what it started. On a machine that does something else, the
best and the processor's say most.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from unlocked.comparison.environment import environment
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.typed import to_plain

__all__ = ["CASES", "main"]

_ONE_STEP = ("--dataset", "digits", "--num-epochs", "1", "--max-steps", "1", "--no-eval", "--plain")
_SCRIPT = """
from functools import partial
import torch
from unlocked import LLS, Processes, Trainer, load_dataset
from unlocked.models import small_conv
train, test = load_dataset("digits")
def fit(engine, **options):
    adam = partial(torch.optim.Adam, lr=1e-2)
    trainer = Trainer(small_conv(1, 10, 8), rule=LLS(), optimizer=adam, engine=engine, threads=1)
    return trainer.fit(train, epochs=1, batch_size=64, **options)
"""
CASES: dict[str, Sequence[str]] = {
    "unlocked --help": ("-m", "unlocked", "--help"),
    "import torch": ("-c", "import torch"),
    "unlocked train, one step": ("-m", "unlocked", "train", *_ONE_STEP),
    "unlocked train --stages 2, one step": ("-m", "unlocked", "train", "--stages", "2", *_ONE_STEP),
    "Processes(stages=2) in a script, one step": ("-c", _SCRIPT + "fit(Processes(stages=2), max_steps=1)"),
    "twenty runs in one process": ("-c", _SCRIPT + "for _ in range(20): fit('sequential', eval_data=test)"),
}
"""What is started -> Python's arguments."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="of each case, in turns (default: 5)")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help="; ".join(CASES))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    cases = {name: CASES[name] for name in options.only or CASES}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(max(1, options.repeats)):
        for name, command in cases.items():
            found[name].append(_seconds(command))
    print(f"{'':42}{'best':>8}{'median':>8}{'slowest':>8}{'processor':>10}")
    for name, pairs in found.items():
        wall, processor = zip(*pairs, strict=True)
        print(f"{name:42}{min(wall):8.2f}{median(wall):8.2f}{max(wall):8.2f}{min(processor):10.2f}")
    if options.json:
        write_json(options.json, {"environment": to_plain(environment()), "wall and processor seconds": found})
    return 0


def _seconds(command: Sequence[str]) -> tuple[float, float]:
    """(wall-clock, the processor's)."""
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    before, began = _processor_seconds(), time.perf_counter()
    subprocess.run([sys.executable, *command], env=clean, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began, _processor_seconds() - before


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
