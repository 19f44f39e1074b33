"""What a snapshot costs the stage that takes it: written by the action itself, or beside the stream.

    python benchmarks/snapshots.py --json FILE

The same run takes turns: without snapshots, with snapshots that the action SNAP writes and waits for, and with those
that a thread writes while the stage goes on. What counts is how long SNAP keeps the stage, and the whole run's speed.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from unlocked.comparison.environment import environment
from unlocked.data.synthetic import load_synthetic
from unlocked.models import get_model
from unlocked.rules import LLS
from unlocked.runtime import Trainer
from unlocked.runtime.saving.writer import SnapshotWriter
from unlocked.runtime.typed import to_plain

WAYS = ("none", "in the action", "beside the stream")
_save = SnapshotWriter.save


def run(way: str, options: argparse.Namespace) -> tuple[float, list[float]]:
    """(seconds of training, seconds that each SNAP kept the stage)."""
    train, _ = load_synthetic(num_train=options.batch_size * options.steps, num_classes=10, image_size=32, seed=0)
    kept: list[float] = []

    def save(writer: SnapshotWriter, *arguments: Any, **more: Any) -> None:
        began = time.perf_counter()
        _save(writer, *arguments, **more)
        if way == "in the action":
            writer.finish()
        kept.append(time.perf_counter() - began)

    with tempfile.TemporaryDirectory() as folder, patch.object(SnapshotWriter, "save", save):
        trainer = Trainer(
            get_model(options.model, in_channels=3, num_classes=10, image_size=(32, 32)),
            rule=LLS(),
            optimizer=partial(torch.optim.Adam, lr=1e-3, fused=True),
            snapshot_dir=Path(folder),
            snapshot_every=0 if way == "none" else options.every,
            keep_snapshots=1,
        )
        result = trainer.fit(train, epochs=1, batch_size=options.batch_size)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.pt"))
    options.bytes = max(getattr(options, "bytes", 0), size)
    return result.train_seconds, kept


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="VGG8")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12, help="micro-batches of a run")
    parser.add_argument("--every", type=int, default=4, help="micro-batches between two snapshots")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    kept: dict[str, list[float]] = {way: [] for way in WAYS[1:]}
    for _ in range(options.repeats):
        for way in WAYS:
            whole, each = run(way, options)
            seconds[way].append(whole)
            if way in kept:
                kept[way] += each[1:]  # the first one also takes its memory
    print(f"{environment().line}\n{options.model}, snapshots of {options.bytes / 1e6:.1f} MB, {options.repeats} turns:")
    medians = {way: statistics.median(one) for way, one in kept.items()}
    for way in WAYS:
        speed = options.batch_size * options.steps / statistics.median(seconds[way])
        held = f", SNAP keeps the stage {1e3 * medians[way]:.1f} ms" if way in medians else ""
        print(f"{way:<18}{speed:>8.1f} images/s{held}")
    if options.json is not None:
        told = {name: getattr(options, name) for name in ("model", "batch_size", "steps", "every", "repeats", "bytes")}
        result = {"environment": to_plain(environment()), **told, "seconds": seconds, "kept_seconds": kept}
        options.json.write_text(json.dumps(result | {"median_kept_seconds": medians}, indent=1, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
