"""One rank whose stage 0 stands still in its rule while its worker's other threads live.

python stalled_worker.py FOLDER TIMEOUT
"""

import os
import sys
import threading
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from unlocked.models import small_conv
from unlocked.rules import LayerInfo, LocalRule
from unlocked.runtime import Processes, Trainer

FOLDER, SUPERVISOR = Path(sys.argv[1]), os.getpid()


class Stalls(LocalRule):
    def __init__(self, layer: LayerInfo) -> None:
        super().__init__()
        self.steps, self.stalls = 0, layer.index == 0 and os.getpid() != SUPERVISOR

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        self.steps += 1
        if self.stalls and self.steps == 3:
            (FOLDER / "stalled").touch()
            threading.Event().wait()
        return activations.square().mean()


if __name__ == "__main__":
    torch.set_num_threads(1)
    data = (torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 5)
    engine = Processes(stages="0-1,2-4", transport="group")
    optimizer = partial(torch.optim.SGD, lr=0.01)
    trainer = Trainer(
        small_conv(3, 5, 16), rule=Stalls, optimizer=optimizer, engine=engine, redraw=True, timeout=float(sys.argv[2])
    )
    trainer.fit(data, epochs=2, batch_size=16)
