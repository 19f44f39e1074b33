"""Layers that draw, as docs/chance.md lists them, trained by any engine; or as one rank, which writes what came out.

python chance_worker.py OUT.json
"""

import json
import os
import random
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unlocked.models import Block
from unlocked.rules import LLS
from unlocked.runtime import RunResult, Trainer

__all__ = ["LINES", "made", "model", "train", "trainer", "unsettle"]

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "chance.md"
LINES = re.findall(r"^\| `(.+)` \| (keyed|refused) \| (.+) \|$", DOCUMENT.read_text(), re.MULTILINE)
SCOPE = {
    "nn": nn,
    "F": F,
    "torch": torch,
    "np": np,
    "random": random,
    "checkpoint": checkpoint,
    "generator": torch.Generator(),
}


class Alone(nn.Module):
    """The tensor out of what torch's module gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        given = self.inner(x, x, x) if isinstance(self.inner, nn.MultiheadAttention) else self.inner(x)
        return given[0] if isinstance(given, tuple) else given


def made(code: str) -> nn.Module:
    """The module that a line's code builds, or one whose forward(self, x) returns what it says."""
    if code.startswith("nn."):
        return Alone(eval(code, SCOPE))
    scope = dict(SCOPE)
    exec(
        f"class Drawing(nn.Module):\n    def forward(self, x):\n        return {code}\n",
        scope | {"__name__": "own"},
        scope,
    )
    scope["Drawing"].forward.__globals__.update(SCOPE)
    return scope["Drawing"]()


def model(code: str) -> list[nn.Module]:
    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Flatten(), nn.LazyLinear(12), nn.BatchNorm1d(12), nn.ReLU())
    return [Block("drawing", nn.Sequential(nn.Linear(8, 8), made(code))), hidden, nn.Linear(12, 4)]


def unsettle(state: int) -> None:
    """Puts every global generator where no other run has it."""
    torch.manual_seed(state)
    random.seed(state)
    np.random.seed(state)


def train(code: str, state: int, **options: Any) -> RunResult:
    layers = model(code)
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(40, 8, 8, generator=generator), torch.randint(0, 4, (40,), generator=generator)
    one = trainer(layers, **options)
    unsettle(state)
    return one.fit(data, epochs=2, batch_size=8, eval_data=data)


def trainer(layers: list[nn.Module], **options: Any) -> Trainer:
    optimizer = partial(torch.optim.Adam, lr=1e-2)
    return Trainer(layers, rule=LLS(), optimizer=optimizer, seed=3, statistics_batches=2, **options)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    found = {}
    for code, outcome, _ in LINES:
        if outcome == "keyed":
            result = train(code, 100 + rank, engine="processes")
            found[code] = [result.weights_sha256, result.test_loss]
    if rank == 0:
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
