"""A metrics sink of one's own: it hears what a run tells about itself, here to write a line of JSON per epoch.

A sink derives from `MetricsSink` and overrides what it needs; the class's text says what is called when.

    python examples/own_sink.py [FILE]
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from unlocked.data import load_dataset
from unlocked.models import small_conv
from unlocked.rules import LLS
from unlocked.runtime import MetricsSink, Trainer
from unlocked.runtime.metrics.records import EpochResult, RunInfo


class JsonLines(MetricsSink):
    """Appends one line to `path` when the run begins, one per epoch, and one when it ends, however it ends."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_start(self, info: RunInfo) -> None:
        # What can be a mistake belongs here: an exception stops the run before its first micro-batch.
        self._file = self._path.open("a", encoding="utf-8")
        self._write({"layers": info.layers, "engine": info.engine})

    def on_epoch(self, result: EpochResult) -> None:
        self._write(asdict(result))

    def on_finish(self, summary: Mapping[str, object]) -> None:
        self._write({"finished": True, "images_per_second": summary["images_per_second"]})

    def on_failure(self, error: BaseException) -> None:
        self._write({"finished": False, "error": f"{type(error).__name__}: {error}"})

    def close(self) -> None:
        self._file.close()

    def _write(self, record: Mapping[str, object]) -> None:
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()  # who watches the file sees the line now


def main(path: Path) -> None:
    torch.set_num_threads(1)
    train, test = load_dataset("digits")
    trainer = Trainer(
        small_conv(in_channels=1, num_classes=10, image_size=8),
        rule=LLS(temperature=0.5),
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        seed=0,
        # With engine="processes" give a function that makes the sinks: it is called in rank 0's process alone.
        sinks=[JsonLines(path)],
    )
    result = trainer.fit(train, epochs=2, batch_size=64, eval_data=test)
    print(f"test accuracy {result.test_acc1:.1f} %; {path} has a line per epoch")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "own_sink.jsonl"))
