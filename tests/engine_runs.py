"""Small runs that the tests of the engines share: a network, data and options that every engine takes."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

import torch

from unlocked.data import Augmentation, ImageDataset
from unlocked.models import small_conv
from unlocked.rules import LLS
from unlocked.runtime import RunResult, Trainer
from unlocked.runtime.engines import engine_class
from unlocked.runtime.fields import setting_names
from unlocked.runtime.job import Engine


def dataset(count: int, split: str = "train", *, augment: bool = True) -> ImageDataset:
    generator = torch.Generator().manual_seed(count)
    return ImageDataset(
        name="tiny",
        split=split,
        images=torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8),
        labels=torch.randint(0, 5, (count,), generator=generator),
        num_classes=5,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        augmentation=Augmentation(flip=True, crop_padding=2, erase_probability=0.5) if augment else Augmentation(),
    )


def trainer(engine: str = "sequential", rule: object = None, **options: object) -> Trainer:
    """`options`: the engine's own and the trainer's, all by their names."""
    made, others = split_options(engine, options)
    settings_ = {"seed": 5, "statistics_batches": 2, "optimizer": partial(torch.optim.Adam, lr=1e-2), **others}
    return Trainer(small_conv(3, 5, 16, dropout=0.2), rule=rule or LLS(), engine=made, **settings_)  # type: ignore


def split_options(engine: str, options: Mapping[str, object]) -> tuple[Engine, dict[str, object]]:
    """The engine with those of the options that are its own, and the others."""
    owner = engine_class(engine)
    own = {name: value for name, value in options.items() if name in setting_names(owner)}
    return owner(**own), {name: value for name, value in options.items() if name not in own}


def fit(one: Trainer, **options: object) -> RunResult:
    plan = {"epochs": 2, "batch_size": 16, "eval_batch_size": 25, **options}
    return one.fit(dataset(70), eval_data=dataset(40, "test", augment=False), **plan)  # type: ignore[arg-type]


def figures(result: RunResult) -> list[dict]:
    return [{k: v for k, v in asdict(epoch).items() if k != "seconds"} for epoch in result.epochs]
