"""Models whose weights, or parts of them, are given; trained by any engine, or as one rank, which writes what came out.

python kept_weights_worker.py OUT.json
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unlocked.rules import LLS
from unlocked.runtime import RunResult, Trainer

__all__ = ["MODELS", "digests", "fit", "trainer"]


class Scaled(nn.Module):
    """Holds a parameter made by hand, which no reset_parameters sets."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(0.5 + torch.rand(8))
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.tanh(self.linear(x) * self.scale)
        return y


def constant() -> list[nn.Module]:
    model = _plain()
    for module in model:
        for parameter in module.parameters():
            nn.init.constant_(parameter, 0.25)
    return model


def frozen_backbone() -> list[nn.Module]:
    model = _plain()
    model[0].requires_grad_(False)
    return model


def norm_in_eval_mode() -> list[nn.Module]:
    model = _plain()
    _norm(model).eval()
    return model


def norm_without_gradients() -> list[nn.Module]:
    model = _plain()
    _norm(model).requires_grad_(False)
    return model


def by_hand() -> list[nn.Module]:
    return [Scaled(), nn.Linear(8, 4)]


MODELS: dict[str, Callable[[], list[nn.Module]]] = {
    made.__name__: made for made in (constant, frozen_backbone, norm_in_eval_mode, norm_without_gradients, by_hand)
}


def _plain() -> list[nn.Module]:
    hidden = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
    hidden[1].running_mean.fill_(0.3)
    hidden[1].running_var.fill_(2.0)
    return [hidden, nn.Sequential(nn.Linear(8, 6), nn.Tanh()), nn.Linear(6, 4)]


def _norm(model: list[nn.Module]) -> nn.Module:
    norm: nn.Module = model[0].get_submodule("1")
    return norm


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 8, generator=generator), torch.randint(0, 4, (40,), generator=generator)


def trainer(model: Any, engine: Any, **options: Any) -> Trainer:
    """`options`: the trainer's, some in the place of those here."""
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    settings = {"rule": LLS(), "optimizer": optimizer, "seed": 3, "statistics_batches": 2}
    return Trainer(model, engine=engine, **settings | options)


def fit(one: Trainer) -> RunResult:
    return one.fit(data(), epochs=1, batch_size=8, eval_data=data())


def digests(name: str, engine: Any) -> list[tuple[str, float | None]]:
    """After the first and the second fit of one model."""
    torch.manual_seed(0)
    one = trainer(MODELS[name](), engine)
    results = [fit(one), fit(one)]
    return [(result.weights_sha256, result.test_loss) for result in results]


def main(out: Path) -> None:
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    found = {name: digests(name, "processes") for name in MODELS}
    if rank == "0":
        out.write_text(json.dumps(found))
    model = constant()
    if rank == "1":
        nn.init.constant_(model[1].get_parameter("0.weight"), 0.5)
    fit(trainer(model, "processes"))  # is refused


if __name__ == "__main__":
    main(Path(sys.argv[1]))
