"""One rank of the exactness tests: trains several small networks, one after the other, and writes what came out.

python train_worker.py ENGINE OUT.json [--resume-from DIR]
"""

import json
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import schedulefree
import torch

from unlocked.data import Augmentation, ImageDataset
from unlocked.models import small_conv
from unlocked.rules import DRTP, LLS, LLS_M, LLS_MxM
from unlocked.runtime import Processes, Sequential, Trainer
from unlocked.runtime.learning_rate import ReduceLROnPlateau

# What to train by, and in which precision.
RULES = {"LLS": (LLS, "fp32"), "LLS_M": (LLS_M, "fp32"), "LLS_MxM": (LLS_MxM, "bf16")}


def main(engine: str, out: Path) -> None:
    torch.set_num_threads(1)
    both = ("shared", "group") if engine == "processes" else ("auto",)
    for name, (rule, precision) in RULES.items():
        for queue_depth in (1, 8):
            for transport in both if name == "LLS" else ("auto",):
                built = rule(temperature=0.5, label_smoothing=0.1)
                how = {"precision": precision, "queue_depth": queue_depth, "transport": transport}
                run(out, name, engine, rule=built, **how)
    # A rate that waits for the test loss, so that the pipeline drains, with an optimizer that has two sets of weights.
    optimizer = partial(schedulefree.AdamWScheduleFree, lr=1e-2, weight_decay=0.01)
    plateau = ReduceLROnPlateau(factor=0.5, patience=0, threshold=0.5)
    for transport in both:
        how = {"optimizer": optimizer, "lr_factor": plateau, "transport": transport}
        run(out, "DRTP", engine, 3, rule=DRTP, **how)


def run(out: Path, name: str, engine: str, epochs: int = 2, **options: Any) -> None:
    """`options`: the trainer's, and queue depth and transport for engines that have them."""
    train, test = data()
    optimizer = partial(torch.optim.Adam, lr=1e-2)
    own = {option: options.pop(option) for option in ("queue_depth", "transport") if option in options}
    made = Processes(**own) if engine == "processes" else Sequential()
    settings = {"optimizer": optimizer, "seed": 3, "statistics_batches": 3, "print_freq": 2, **options}
    trainer = Trainer(small_conv(3, 7, 16, dropout=0.2), engine=made, **settings)
    result = trainer.fit(train, epochs=epochs, batch_size=16, eval_data=test, eval_batch_size=25)
    figures = [{k: v for k, v in asdict(e).items() if k != "seconds"} for e in result.epochs]
    line = {"rule": name, "sha256": result.weights_sha256, "epochs": figures, "stages": result.stages}
    if os.environ.get("RANK", "0") == "0":
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")


def data() -> tuple[ImageDataset, ImageDataset]:
    """90 and 40 small images of 7 classes: with micro-batches of 16 and 25, both end in a partial one."""
    generator = torch.Generator().manual_seed(0)
    sets = []
    for split, count in (("train", 90), ("test", 40)):
        images = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 7, (count,), generator=generator)
        augmentation = Augmentation(flip=True, crop_padding=2, erase_probability=0.3) if split == "train" else None
        sets.append(
            ImageDataset(
                name="tiny",
                split=split,
                images=images,
                labels=labels,
                num_classes=7,
                mean=(0.5, 0.5, 0.5),
                std=(0.25, 0.25, 0.25),
                augmentation=augmentation or Augmentation(),
            )
        )
    return sets[0], sets[1]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
