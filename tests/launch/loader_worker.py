"""One rank that trains from DataLoaders and writes what it read: python loader_worker.py OUT_FOLDER [SECONDS | faults].

With SECONDS the training data takes that long for one sample of the second micro-batch, which is longer than the others
wait. With the word "faults" it trains from every pair of `WITHOUT_WORKERS`, and stage 0 is killed amid each run.
"""

import json
import os
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from unlocked.models import small_conv
from unlocked.rules import LLS
from unlocked.runtime import RunResult, Trainer
from unlocked.runtime.engines.processes import memory_saver
from unlocked.runtime.faults import VARIABLE

__all__ = ["FAULTS", "PAIRS", "WITHOUT_WORKERS", "fit", "pair", "samples", "seeded"]

FAULTS = "kill@0SEND3,kill@0SEND8#1,kill@0SEND11#2,kill@0SEND20#3"
"""Amid training, at the end of an epoch's evaluation, and twice amid training again: items 0 to 8 are epoch 0."""


def samples(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 5, (count,), generator=generator)


def seeded(data: TensorDataset, workers: int = 0) -> DataLoader:
    return DataLoader(data, 16, shuffle=True, generator=torch.Generator().manual_seed(7), num_workers=workers)


def fit(train: Any, test: Any = None, engine: Any = "sequential", **options: Any) -> RunResult:
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


class Chance(TensorDataset):
    """Makes every sample anew by all three generators of the process."""

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        factor = float(torch.rand(())) * random.random() * np.random.random()
        return image * factor, label


def pair(kind: str) -> tuple[DataLoader, DataLoader]:
    """Training and evaluation data as a script makes them, one of `PAIRS`."""
    torch.manual_seed(11)
    random.seed(12)
    np.random.seed(13)
    train, test = TensorDataset(*samples(70)), TensorDataset(*samples(40))
    one, other = (torch.Generator().manual_seed(seed) for seed in (7, 8))
    return PAIRS[kind](train, test, one, other)


PAIRS: dict[str, Any] = {
    "one generator": lambda train, test, one, _: (
        DataLoader(train, 16, shuffle=True, generator=one),
        DataLoader(test, 25, shuffle=True, generator=one),
    ),
    "generators of their own": lambda train, test, one, other: (
        DataLoader(train, 16, shuffle=True, generator=one),
        DataLoader(test, 25, shuffle=True, generator=other),
    ),
    "no generator": lambda train, test, *_: (DataLoader(train, 16, shuffle=True), DataLoader(test, 25, shuffle=True)),
    "no generator, evaluation in order": lambda train, test, *_: (
        DataLoader(train, 16, shuffle=True),
        DataLoader(test, 25),
    ),
    "no generator, evaluation in order by a worker": lambda train, test, *_: (
        DataLoader(train, 16, shuffle=True),
        DataLoader(test, 25, num_workers=1),
    ),
    "samples made by chance": lambda train, test, *_: (
        DataLoader(Chance(*train.tensors), 16),
        DataLoader(Chance(*test.tensors), 25),
    ),
    "samples made by chance in a worker": lambda train, test, *_: (
        DataLoader(Chance(*train.tensors), 16, num_workers=1),
        DataLoader(test, 25),
    ),
    "samples made by chance in a worker that stays": lambda train, test, *_: (
        DataLoader(Chance(*train.tensors), 16, num_workers=1, persistent_workers=True),
        DataLoader(test, 25),
    ),
}


# A loader that forks while other threads run may get a child that hangs (in glibc's list of exit functions, say), and
# which nobody ends once its parent was killed.
WITHOUT_WORKERS = [kind for kind in PAIRS if "worker" not in kind]


def under_faults(out: Path) -> None:
    memory_saver._SHORTEST, memory_saver._SHARE = 0.0, 1e9  # a stage saves itself after every item
    found = {}
    for kind in WITHOUT_WORKERS:
        os.environ[VARIABLE] = FAULTS
        result = fit(*pair(kind), "processes", epochs=3)
        recoveries = [(one.stage, one.position) for one in result.recoveries]
        found[kind] = {"sha256": result.weights_sha256, "recoveries": recoveries}
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


def main(out: Path, how: str = "") -> None:
    torch.set_num_threads(1)
    if how == "faults":
        under_faults(out)
        return
    if seconds := float(how or 0):
        slow = Slow(*samples(70))
        slow.seconds = seconds
        fit(DataLoader(slow, 16), engine="processes", timeout=2.0)
    train, test = Counted(*samples(70)), Counted(*samples(40))
    result = fit(seeded(train), DataLoader(test, 25), "processes")
    content = {"sha256": result.weights_sha256, "read": [train.count, test.count]}
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
