"""Our training against figures of the authors' own code: rules times seeds at their settings, tested for differences.

    python benchmarks/reproduce.py --dataset-dir datasets --processes 2        # trains what is missing, then compares
    python benchmarks/reproduce.py --report-only --json reproduce.json         # compares what there is

SmallConv on CIFAR-10 with the optimizer AdamWSF, and AdamWScheduleFree, the library's newest, beside it: one sees what
the test can tell apart. A cell is a rule, an optimizer and a seed: one training run of one thread, kept as a file of
its own in --cells. Whatever is there is not trained again, so that a run which was stopped goes on where it was;
several processes (--processes, or the command given several times) share the cells out among themselves.

For every epoch: test accuracy, training accuracy and each layer's mean loss, as mean, deviation and number of seeds of
both sides, and Welch's p, corrected by Holm for all comparisons with one optimizer. Where a side has one seed only, the
test takes the other side's deviation for both. `*`: the corrected p is below 0.05. `>` and `<`: all our seeds are
above, or below, all of theirs; the probability of either by chance alone is printed with it. `--plain` adds further
seeds to the authors' few.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from scipy import stats

from unlocked.comparison.cells import claimed, read_cell
from unlocked.comparison.significance import LEVEL, holm, welch
from unlocked.runtime.saving.whole_file import write_json

ROOT = Path(__file__).resolve().parent.parent
OPTIMIZERS = ("AdamWSF", "AdamWScheduleFree")
Cell = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return run(parse(arguments))
    except ValueError as error:
        print(f"reproduce.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = ROOT.parent / "shared" / "baseline" / "authors_accuracy.json"
    parser.add_argument("--reference", type=Path, default=beside, help="the authors' figures, a JSON file")
    parser.add_argument("--cells", type=Path, default=ROOT / "benchmarks" / "results" / "reproduce")
    parser.add_argument(
        "--plain", type=Path, help="a folder of plain_reproduce.py: its seeds are added to the reference"
    )
    parser.add_argument("--rules", nargs="+", help="default: those of the reference")
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--max-steps", type=int, help="stop each run after so many micro-batches (for a trial)")
    parser.add_argument("--dataset", default="CIFAR10")
    parser.add_argument("--dataset-dir", type=Path, default=Path("datasets"))
    parser.add_argument("--processes", type=int, default=1, help="train that many cells at once, with one thread each")
    parser.add_argument("--train-only", action="store_true", help="print no comparison")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument("--json", type=Path, help="write the cells, both sides' figures and all tests here")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Trains the cells that are missing and prints the comparison. Returns the exit code."""
    reference = read_reference(options.reference)
    options.rules = options.rules or list(dict.fromkeys(row["rule"] for row in reference["rows"]))
    settings = cell_settings(reference["settings"], options)
    wanted = [(o, r, s) for s in options.seeds for o in options.optimizers for r in options.rules]
    if not options.report_only:
        code = train_apart(options) if options.processes > 1 else train_missing(wanted, settings, options)
        if code:
            return code
    if options.train_only:
        return 0
    cells = [
        c for key in wanted if (c := read_cell(cell_path(options.cells, *key), settings, remedy="--cells")) is not None
    ]
    if missing := len(wanted) - len(cells):
        print(f"{missing} of {len(wanted)} cells are not there yet (see --processes); compared are the others\n")
    if options.plain is not None:
        reference["rows"] += plain_rows(options.plain, reference["rows"])
    report = {"reference": reference, "cells": cells, "comparisons": {}}
    for optimizer in options.optimizers:
        ours = [cell for cell in cells if cell["optimizer"] == optimizer]
        comparisons = compare(reference["rows"], ours, options.epochs)
        print_comparisons(optimizer, comparisons)
        report["comparisons"][optimizer] = [asdict(comparison) for comparison in comparisons]
    if options.json:
        write_json(options.json, report)
    return 0


# Cells


def cell_settings(theirs: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What all cells share: the authors' settings, from the reference, and the length of a run."""
    shared = {key: theirs[key] for key in ("model", "lr", "batch_size", "temperature", "waveform")}
    own = {key: getattr(options, key) for key in ("dataset", "epochs", "max_steps")}
    return shared | own | {"statistics_batches": 50, "threads": 1}


def cell_path(folder: Path, optimizer: str, rule: str, seed: int) -> Path:
    return folder / f"{rule}_{optimizer}_{seed}.json"


def train_apart(options: argparse.Namespace) -> int:
    """Trains in processes of one thread that share the cells out; the worst of their exit codes."""
    lists = {"--rules": options.rules, "--optimizers": options.optimizers, "--seeds": map(str, options.seeds)}
    command = [sys.executable, str(Path(__file__).resolve()), "--train-only", "--epochs", str(options.epochs)]
    command += [word for flag, values in lists.items() for word in (flag, *values)]
    for name in ("reference", "cells", "dataset", "dataset_dir", "max_steps"):
        if (value := getattr(options, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    running = [subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) for _ in range(options.processes)]
    return max(abs(process.wait()) for process in running)


def train_missing(wanted: list[tuple[str, str, int]], settings: dict[str, Any], options: argparse.Namespace) -> int:
    """Trains, one after the other, the cells that nobody has and nobody is at. The exit code."""
    options.cells.mkdir(parents=True, exist_ok=True)
    data = None
    for optimizer, rule, seed in wanted:
        path = cell_path(options.cells, optimizer, rule, seed)
        with claimed(path) as mine:
            if not mine or read_cell(path, settings, remedy="--cells") is not None:
                continue
            if data is None:
                from unlocked import load_dataset

                data = load_dataset(options.dataset, options.dataset_dir)
            cell, signal = train_cell(data, optimizer, rule, seed, settings)
            if signal is not None:
                return 128 + signal
            write_json(path, cell)
            last = cell["epochs"][-1]
            print(f"{path.stem}: {last['test_acc1']:.2f} % after {cell['seconds']:.0f} s", flush=True)
    return 0


def train_cell(
    data: tuple[Any, Any], optimizer: str, rule: str, seed: int, settings: dict[str, Any]
) -> tuple[Cell, int | None]:
    """One run and, if it was stopped before its end, the signal that did."""
    from unlocked import Trainer
    from unlocked.comparison.environment import environment
    from unlocked.models import get_model
    from unlocked.rules import get_rule

    train, test = data
    channels, *sides = train.image_shape
    trainer = Trainer(
        get_model(settings["model"], in_channels=channels, num_classes=train.num_classes, image_size=sides),
        rule=get_rule(rule, label_smoothing=0.0, **{key: settings[key] for key in ("temperature", "waveform")}),
        optimizer=partial(optimizer_class(optimizer), lr=settings["lr"]),
        seed=seed,
        statistics_batches=settings["statistics_batches"],
        threads=settings["threads"],
    )
    result = trainer.fit(
        train,
        epochs=settings["epochs"],
        batch_size=settings["batch_size"],
        eval_data=test,
        eval_batch_size=500,
        max_steps=settings["max_steps"],
    )
    epochs = [
        {
            "epoch": e.epoch + 1,
            "test_acc1": e.eval_acc1,
            "train_acc1": e.train_acc1,
            "local_losses": dict(e.local_losses),
        }
        for e in result.epochs
    ]
    machine = environment()
    cell = {
        "rule": rule,
        "optimizer": optimizer,
        "seed": seed,
        "settings": settings,
        "epochs": epochs,
        "weights_sha256": result.weights_sha256,
        "seconds": result.train_seconds,
        "machine": machine.cpu,
        "versions": machine.versions,
        "commit": machine.commit,
    }
    return cell, result.stopped_by


def optimizer_class(name: str) -> Callable[..., Any]:
    """
    Raises:
        ValueError: the package schedulefree is needed and not installed.
    """
    if name == "AdamWSF":
        from unlocked import AdamWSF

        return AdamWSF
    try:
        import schedulefree
    except ImportError as error:
        raise ValueError(f"{name} needs the package schedulefree; install it, or --optimizers AdamWSF") from error
    found: Callable[..., Any] = schedulefree.AdamWScheduleFree
    return found


# Comparison


@dataclass(kw_only=True)
class Comparison:
    """One figure of one epoch, on both sides."""

    rule: str
    epoch: int
    figure: str  # test_acc1, train_acc1 (percent), or a layer's name (its mean loss)
    theirs: list[float]
    ours: list[float]
    p: float  # of equal means; NaN where neither side can tell its deviation
    corrected: float = math.nan  # by Holm, over all comparisons with the optimizer

    @property
    def apart(self) -> str:
        """`>` or `<` where all of ours are above, or below, all of theirs."""
        return ">" if min(self.ours) > max(self.theirs) else "<" if max(self.ours) < min(self.theirs) else ""

    @property
    def chance(self) -> float:
        """The probability of `apart` if both sides are the same."""
        return 2 / math.comb(len(self.ours) + len(self.theirs), len(self.ours))


def compare(rows: list[dict[str, Any]], cells: list[Cell], epochs: int) -> list[Comparison]:
    """All figures that both sides have, by rule, epoch and figure."""
    theirs = collect(rows)
    ours = collect([epoch | {"rule": cell["rule"]} for cell in cells for epoch in cell["epochs"]])
    found = [
        Comparison(rule=key[0], epoch=key[1], figure=key[2], theirs=values, ours=ours[key], p=welch(values, ours[key]))
        for key, values in theirs.items()
        if key in ours and key[1] <= epochs
    ]
    for comparison, corrected in zip(found, holm([c.p for c in found]), strict=True):
        comparison.corrected = corrected
    return found


def collect(rows: list[dict[str, Any]]) -> dict[tuple[str, int, str], list[float]]:
    """(rule, epoch, figure) -> one value per seed, rounded as the reference is."""
    found: dict[tuple[str, int, str], list[float]] = {}
    for row in rows:
        figures = {"test_acc1": round(row["test_acc1"], 2), "train_acc1": round(row["train_acc1"], 3)}
        figures |= {layer: round(loss, 3) for layer, loss in row["local_losses"].items()}
        for figure, value in figures.items():
            found.setdefault((row["rule"], row["epoch"], figure), []).append(value)
    return found


def plain_rows(folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The plain loop's figures of seeds that the reference lacks, as its rows.

    Raises:
        ValueError: there are none.
    """
    there = {(row["rule"], row["seed"]) for row in rows}
    cells = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not (more := [cell for cell in cells if (cell["rule"], cell["seed"]) not in there]):
        raise ValueError(f"{folder} has no seeds beside the reference's; train them by benchmarks/plain_reproduce.py")
    for cell in more:
        for epoch in cell["epochs"]:
            epoch["local_losses"].pop("output", None)  # the reference has none
    return [epoch | {"rule": cell["rule"], "seed": cell["seed"]} for cell in more for epoch in cell["epochs"]]


def print_comparisons(optimizer: str, comparisons: list[Comparison]) -> None:
    counted = [c for c in comparisons if not math.isnan(c.p)]
    print(f"{optimizer}: {len(comparisons)} comparisons, p corrected (Holm) for {len(counted)}")
    print(
        f"{'rule':<16}{'epoch':>5} {'figure':<11}{'theirs':^21}{'ours':^21}{'difference':>11}{'p':>8}{'corrected':>10}"
    )
    for c in sorted(comparisons, key=lambda c: (c.rule, c.epoch)):
        mark = "*" if c.corrected < LEVEL else ""
        apart = f"{c.apart} ({c.chance:.2f})" if c.apart else ""
        print(
            f"{c.rule:<16}{c.epoch:>5} {c.figure:<11}{side(c.theirs):^21}{side(c.ours):^21}"
            f"{mean(c.ours) - mean(c.theirs):>+11.3f}{c.p:>8.3f}{c.corrected:>10.3f} {mark:<2}{apart}"
        )
    different = [c for c in comparisons if c.corrected < LEVEL]
    told = "; ".join(f"{c.rule} epoch {c.epoch} {c.figure}" for c in different) or "none"
    print(f"differ at a corrected p < {LEVEL}: {told}\n")


def side(values: Sequence[float]) -> str:
    """Mean, deviation and number."""
    spread = f"{stats.tstd(values):.3f}" if len(values) > 1 else "-"
    return f"{mean(values):.3f} {spread} ({len(values)})"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def read_reference(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"the authors' figures are not at {path}; say where by --reference")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


if __name__ == "__main__":
    sys.exit(main())
