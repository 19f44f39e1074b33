"""One rank of a run whose sink writes what it hears, one word a line.

python sink_worker.py FILE ends|fails|dies RANK: what the rank of that number does once the run is under way.
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from unlocked.models import small_conv
from unlocked.rules import LayerInfo, LocalRule
from unlocked.runtime import MetricsSink, Trainer
from unlocked.runtime.metrics.records import RunInfo, StepResult

FILE, WHAT, VICTIM = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
UNDER_WAY = FILE.with_suffix(".under-way")


class Ending(LocalRule):
    def __init__(self, layer: LayerInfo) -> None:
        super().__init__()

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        if WHAT != "ends" and os.environ["RANK"] == VICTIM and UNDER_WAY.exists():
            if WHAT == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the rule broke")
        return activations.square().mean()


class Words(MetricsSink):
    def on_start(self, info: RunInfo) -> None:
        self._write("start")

    def on_step(self, step: StepResult) -> None:
        UNDER_WAY.touch()

    def on_finish(self, summary: object) -> None:
        self._write("finish")

    def on_failure(self, error: BaseException) -> None:
        self._write(f"failure {error}")

    def close(self) -> None:
        self._write("close")

    def _write(self, word: str) -> None:
        with FILE.open("a") as file:
            file.write(word + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    data = (torch.rand(64, 3, 16, 16, generator=generator), torch.arange(64) % 5)
    trainer = Trainer(
        small_conv(3, 5, 16),
        rule=Ending,
        optimizer=partial(torch.optim.SGD, lr=1e-3),
        engine="processes",
        print_freq=1,
        sinks=lambda: [Words()],
    )
    trainer.fit(data, epochs=2 if WHAT == "ends" else 10_000, batch_size=16)
