"""One rank, or the plain loop, of the test of placement: layers that compute little and pass on much, save one of them.

python placement_worker.py ENGINE STEPS OUT.json [PLACEMENT.json TRACE.json]
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from unlocked.rules import LocalRule
from unlocked.runtime import Processes, Trainer
from unlocked.runtime.job import Engine

__all__ = ["ROWS", "WIDTHS"]

ROWS = 1024
WIDTHS = (512, 512, 512, 128, 512, 512, 10)
"""Floats of a sample that leave every layer: behind the fourth one a quarter of what passes elsewhere."""
_CLASSES, _USED = 10, 16


class Wide(nn.Module):
    """A linear layer of a few inputs, whose outputs are filled up with zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.width = nn.Linear(_USED, min(width, _USED)), width

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x[:, :_USED])
        return nn.functional.pad(y, (0, self.width - y.shape[1]))


class FirstScores(LocalRule):
    """A layer's first activations are its scores: nothing is as cheap."""

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(activations[:, :_CLASSES], labels)


def main(engine: str, steps: int, out: Path, placement: Path | None, trace: Path | None) -> None:
    torch.manual_seed(0)
    samples, labels = torch.randn(4 * ROWS, _USED), torch.randint(_CLASSES, (4 * ROWS,))
    chosen: Engine | str = Processes(placement=placement) if engine == "processes" else engine
    trainer = Trainer(
        [Wide(width) for width in WIDTHS],
        rule=FirstScores,
        optimizer=partial(torch.optim.SGD, lr=0.01),
        engine=chosen,
        threads=1,
        progress=False,
        trace=trace,
    )
    result = trainer.fit((samples, labels), epochs=steps, batch_size=ROWS, max_steps=steps)
    if os.environ.get("RANK", "0") == "0":
        told = {
            "weights_sha256": result.weights_sha256,
            "stages": [len(stage) for stage in result.stages],
            "images_per_second": result.images_per_second,
            "predicted_images_per_second": result.predicted_images_per_second,
        }
        out.write_text(json.dumps(told, allow_nan=False))


if __name__ == "__main__":
    files = [Path(name) for name in sys.argv[4:]]
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), *(files or [None, None]))
