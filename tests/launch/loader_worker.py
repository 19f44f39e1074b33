"""One rank that trains from DataLoaders and writes what it read: python loader_worker.py OUT_FOLDER [SECONDS].

With SECONDS the training data takes that long for one sample of the second micro-batch, which is longer than the others
wait.
"""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from unlocked.models import small_conv
from unlocked.rules import LLS
from unlocked.runtime import RunResult, Trainer

__all__ = ["fit", "samples", "seeded"]


def samples(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 5, (count,), generator=generator)


def seeded(data: TensorDataset, workers: int = 0) -> DataLoader:
    return DataLoader(data, 16, shuffle=True, generator=torch.Generator().manual_seed(7), num_workers=workers)


def fit(train: Any, test: Any = None, engine: str = "sequential", **options: Any) -> RunResult:
    of_run = ("epochs", "batch_size", "eval_batch_size", "max_steps", "steps_per_epoch")
    trainer = Trainer(
        small_conv(3, 5, 16),
        rule=LLS(),
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        engine=engine,
        seed=5,
        **{"statistics_batches": 2, **{name: value for name, value in options.items() if name not in of_run}},
    )
    return trainer.fit(train, eval_data=test, **{"epochs": 2, **{k: v for k, v in options.items() if k in of_run}})


class Counted(TensorDataset):
    """Counts the samples that are read by this process or by those that are forked from it."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__(*tensors)
        self._count = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def count(self) -> int:
        return int(self._count)

    def __getitem__(self, index: int) -> Any:
        self._count += 1
        return super().__getitem__(index)


class Slow(TensorDataset):
    """Takes `seconds` for its twentieth sample."""

    seconds = 0.0

    def __getitem__(self, index: int) -> Any:
        if index == 19:
            time.sleep(self.seconds)
        return super().__getitem__(index)


def main(out: Path, seconds: float = 0.0) -> None:
    torch.set_num_threads(1)
    if seconds:
        slow = Slow(*samples(70))
        slow.seconds = seconds
        fit(DataLoader(slow, 16), engine="processes", timeout=2.0)
    train, test = Counted(*samples(70)), Counted(*samples(40))
    result = fit(seeded(train), DataLoader(test, 25), "processes")
    content = {"sha256": result.weights_sha256, "read": [train.count, test.count]}
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(float, sys.argv[2:]))
