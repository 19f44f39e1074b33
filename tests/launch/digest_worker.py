"""One rank that trains the two small runs whose digests are written down; rank 0 writes what came out.

python digest_worker.py ENGINE STAGES OUT.json
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch

from unlocked.data import load_dataset
from unlocked.models import small_conv
from unlocked.rules import get_rule
from unlocked.runtime import Processes, Sequential, Streams, Trainer

__all__ = ["train"]

RULES = ("LLS", "LLS_MxM")
KERNELS = ("auto", "torch")
ENGINES = {
    "sequential": lambda _: Sequential(),
    "streams": lambda stages: Streams(stages=stages),
    "processes": lambda stages: Processes(stages=stages),
}


def train(engine: str, stages: int) -> dict[str, str]:
    """`weights_sha256` by "kernels rule", after two epochs of digits that are cut at 30 of their 46 micro-batches."""
    train_data, test_data = load_dataset("digits")
    found = {}
    for kernels in KERNELS:
        for rule in RULES:
            trainer = Trainer(
                small_conv(in_channels=1, num_classes=10, image_size=8),
                rule=get_rule(rule, temperature=0.5, label_smoothing=0.0, waveform="cosine"),
                optimizer=partial(torch.optim.Adam, lr=1e-2),
                engine=ENGINES[engine](stages),
                seed=0,
                threads=1,
                kernels=kernels,
            )
            result = trainer.fit(train_data, epochs=2, batch_size=64, eval_data=test_data, max_steps=30)
            assert len(result.stages) == stages
            found[f"{kernels} {rule}"] = result.weights_sha256
    return found


def main(engine: str, stages: int, out: Path) -> None:
    torch.set_num_threads(1)
    found = train(engine, stages)
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
