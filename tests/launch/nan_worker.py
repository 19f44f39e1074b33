"""Runs into which a value that is not a number comes, by many ways. As a program: one rank of such a run.

python nan_worker.py ENGINE WAY VALUE FOLDER
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unlocked.rules import LLS, LayerInfo, LocalRule
from unlocked.runtime import Trainer
from unlocked.runtime.engines import as_engine

ROWS, STEPS = 10, 4  # of a micro-batch, of an epoch


class Spoil(nn.Module):
    """Passes on what it gets; in training micro-batch `step` (from 0), or in evaluation, all of it is spoilt."""

    def __init__(self, value: float, step: int | None = None) -> None:
        super().__init__()
        self.value, self.step = value, step
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # restored after a warm-up, as weights are

    def forward(self, x: Tensor) -> Tensor:
        learns = torch.is_grad_enabled() and len(x) == ROWS
        spoils = self.seen == self.step if learns else self.step is None and not self.training
        self.seen += learns
        return x * self.value if spoils else x


class SpoiltRule(LocalRule):
    """Its loss is no number from the seventh micro-batch on."""

    value = float("nan")

    def __init__(self, layer: LayerInfo) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        self.seen += len(labels) == ROWS
        return activations.square().mean() * (self.value if self.seen > 6 else 1.0)


def begin(run: dict[str, Any], value: float) -> None:
    run["model"][0][1].weight.data[1, 2] = value


def pixel(run: dict[str, Any], value: float, where: str = "train") -> None:
    run[where][0][17, 5] = value


def loader(run: dict[str, Any], value: float, where: str = "train") -> None:
    pixel(run, value, where)
    samples, labels = run[where]
    run[where] = list(zip(samples.split(ROWS), labels.split(ROWS), strict=True))


def layer(run: dict[str, Any], value: float, index: int, step: int | None) -> None:
    run["model"][index].append(Spoil(value, step))


def last_step(run: dict[str, Any], value: float) -> None:
    """Every loss is finite, and there is no evaluation: what the last update leaves is not."""
    run["optimizer"] = partial(torch.optim.SGD, lr=1e38, weight_decay=1e10)
    run["max_steps"], run["test"] = 1, None


def rule(run: dict[str, Any], value: float) -> None:
    run["rule"] = SpoiltRule


# How the value comes in, and what the error must say: a pattern, in which E stands for "epoch".
WAYS: dict[str, tuple[Callable[[dict[str, Any], float], None], str]] = {
    "weights at the start": (begin, "layer .* begins with values that are not finite in .*weight"),
    "a training sample": (pixel, "the train data holds (nan|-?inf) in sample 17, at 5"),
    "a test sample": (partial(pixel, where="test"), "the test data holds (nan|-?inf) in sample 17, at 5"),
    "a loader's training sample": (loader, "E 0.* (nan|inf|finite)"),
    "a loader's test sample": (partial(loader, where="test"), "(nan|inf) in the evaluation after E 0"),
    "a hidden layer at once": (partial(layer, index=0, step=0), "E 0.* (nan|inf|finite)"),
    "a hidden layer in mid-epoch": (partial(layer, index=0, step=6), "E 1.* (nan|inf|finite)"),
    "a later layer in mid-epoch": (partial(layer, index=1, step=6), "E 1.* (nan|inf|finite)"),
    "the labels' scores in mid-epoch": (partial(layer, index=2, step=6), "E 1.* (nan|inf|finite)"),
    "the evaluation alone": (partial(layer, index=1, step=None), "nan in the evaluation after E 0"),
    "the labels' scores in evaluation": (partial(layer, index=2, step=None), "nan in the evaluation after E 0"),
    "the last update": (last_step, r"E 0.* not finite in .*weight"),
    "a rule's loss": (rule, "E 1.* nan"),
}


def run(engine: str, way: str, value: float, folder: Path, **options: Any) -> None:
    """Three layers, three epochs, with everything that a run may leave behind."""
    generator = torch.Generator().manual_seed(1)
    samples, labels = torch.randn(2 * ROWS * STEPS, 12, generator=generator), torch.arange(2 * ROWS * STEPS) % 3
    half = ROWS * STEPS
    torch.manual_seed(3)  # all ranks build the same model
    given: dict[str, Any] = {
        "model": nn.Sequential(
            nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU()),
            nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
            nn.Sequential(nn.Linear(8, 3)),
        ),
        "rule": LLS(),
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "train": (samples[:half].clone(), labels[:half]),
        "test": (samples[half:].clone(), labels[half:]),
        "max_steps": None,
    }
    spoil, _ = WAYS[way]
    spoil(given, value)
    train, test, max_steps = (given.pop(name) for name in ("train", "test", "max_steps"))
    saved: dict[str, Any] = {"snapshot_dir": folder / "snapshots", "snapshot_every": 1}
    saved |= {} if test is None else {"best_dir": folder / "best"}
    rows = {} if isinstance(train, list) else {"batch_size": ROWS}
    trainer = Trainer(engine=as_engine(engine), print_freq=50, **saved, **given | options)
    trainer.fit(train, epochs=3, eval_data=test, max_steps=max_steps, **rows)


def check_what_is_left(folder: Path) -> None:
    """No best weights, and no snapshot from which a run would go on with what is no number."""
    assert not list(folder.glob("**/model_best.pt"))
    for path in folder.glob("snapshots/*/layer-*.pt"):  # the half file of a process that was ended is none
        for name, value in torch.load(path, weights_only=True)["block"].items():
            assert value.isfinite().all(), (path, name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], sys.argv[2], float(sys.argv[3]), Path(sys.argv[4]))
