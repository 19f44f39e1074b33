"""One rank whose worker for stage 0 is built once there is a file `go`: python slow_worker.py FOLDER."""

import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from unlocked.models import small_conv
from unlocked.rules import LayerInfo, LocalRule
from unlocked.runtime import Trainer

FOLDER, RANK, SUPERVISOR = Path(sys.argv[1]), os.environ["RANK"], os.getpid()


class Slow(LocalRule):
    def __init__(self, layer: LayerInfo) -> None:
        super().__init__()
        if os.getpid() == SUPERVISOR:
            return
        (FOLDER / f"building-{RANK}").touch()
        while RANK == "0" and not (FOLDER / "go").exists():
            time.sleep(0.01)

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return activations.square().mean()


if __name__ == "__main__":
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    data = (torch.rand(64, 3, 16, 16, generator=generator), torch.arange(64) % 5)
    optimizer = partial(torch.optim.SGD, lr=0.01)
    trainer = Trainer(small_conv(3, 5, 16), rule=Slow, optimizer=optimizer, engine="processes", redraw=True)
    result = trainer.fit(data, epochs=2, batch_size=16)
    if RANK == "0":
        told = [(one.stage, one.incarnation, one.cause) for one in result.recoveries]
        (FOLDER / "recoveries").write_text(str(told))
