"""One rank whose rule, or script, calls sys.exit: python exit_worker.py script|costs|run RANK."""

import os
import sys
from functools import partial

import torch
from torch import Tensor

from unlocked.models import small_conv
from unlocked.rules import LayerInfo, LocalRule
from unlocked.runtime import Trainer

WHERE, VICTIM = sys.argv[1], sys.argv[2]


class Leaving(LocalRule):
    """Leaves in the hundredth call of the process's, which is in the run, or where costs are measured."""

    calls = 0

    def __init__(self, layer: LayerInfo) -> None:
        super().__init__()
        self.name = layer.name

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        Leaving.calls += len(activations) == 16
        is_due = self.name == "conv2" if WHERE == "costs" else Leaving.calls > 100
        if WHERE != "script" and os.environ["RANK"] == VICTIM and is_due and Leaving.calls:
            sys.exit(0)
        return activations.square().mean()


if __name__ == "__main__":
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    data = (torch.rand(64, 3, 16, 16, generator=generator), torch.arange(64) % 5)
    optimizer = partial(torch.optim.SGD, lr=0.0)
    trainer = Trainer(small_conv(3, 5, 16), rule=Leaving, optimizer=optimizer, engine="processes", print_freq=1)
    if WHERE == "script" and os.environ["RANK"] == VICTIM:
        sys.exit(0)
    trainer.fit(data, epochs=1000, batch_size=16)
