"""Small runs of the streams engine on the stand-in for a GPU, and of the plain loop that they must equal."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from cuda_stand_in.device import Device
from cuda_stand_in.install import cuda_stand_in
from engine_runs import split_options
from torch import Tensor

from unlocked.data import Augmentation, ImageDataset
from unlocked.kernels import reference
from unlocked.models import Block, ConvBlock, LinearBlock, OutputBlock
from unlocked.rules import LLS
from unlocked.runtime import RunResult, Streams, Trainer, job
from unlocked.runtime.fields import setting_names
from unlocked.workers.fused import fused_step

__all__ = ["closed_form", "fit", "fit_plainly", "run_on_stand_in"]

CLASSES, SIDE = 4, 6


class DeviceMomentum:
    """SGD with momentum that keeps all of its state, the learning rate included, on the device: what a graph
    can hold without kernels of our own. Like a schedule-free one its weights are elsewhere for evaluation."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.05, momentum: float = 0.9) -> None:
        self._params = list(params)
        self._momentum, self._trains = momentum, True
        rate = torch.full((), lr, device=self._params[0].device)
        self.param_groups: list[dict[str, Any]] = [{"params": self._params, "lr": rate}]
        self._sums = [torch.zeros_like(p) for p in self._params]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self._params:
            p.grad = None

    @torch.no_grad()
    def step(self, grads: Iterable[Tensor] | None = None) -> None:
        assert self._trains
        rate = self.param_groups[0]["lr"]
        given = [p.grad for p in self._params] if grads is None else list(grads)
        for p, mean, grad in zip(self._params, self._sums, given, strict=True):
            assert grad is not None
            mean.mul_(self._momentum).add_(grad.view_as(p))
            p.sub_(mean * rate)

    def train(self) -> None:
        self._switch(True)

    def eval(self) -> None:
        self._switch(False)

    @torch.no_grad()
    def _switch(self, trains: bool) -> None:
        if trains != self._trains:
            for p, mean in zip(self._params, self._sums, strict=True):
                p.add_(mean, alpha=0.01 if trains else -0.01)
        self._trains = trains

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "lr": self.param_groups[0]["lr"], "trains": self._trains}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.param_groups[0]["lr"].copy_(state["lr"])
        self._trains = state["trains"]
        for mine, saved in zip(self._sums, state["sums"], strict=True):
            mine.copy_(saved)


def network(layers: int = 5, dropout: float = 0.0) -> list[Block]:
    """Three or five layers with few operations each, and the same start values every time."""
    torch.manual_seed(2)
    first = ConvBlock(1, 3, name="conv", pool="max", latent_size=2, dropout=dropout)
    between = [LinearBlock(12, 12, name="linear2", dropout=dropout), LinearBlock(12, 12, name="linear3")]
    return [first, LinearBlock(27, 12, name="linear1"), *(between if layers == 5 else []), OutputBlock(12, CLASSES)]


def dataset(count: int, split: str, *, augment: bool = False) -> ImageDataset:
    generator = torch.Generator().manual_seed(count)
    return ImageDataset(
        name="tiny",
        split=split,
        images=torch.randint(0, 256, (count, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8),
        labels=torch.randint(0, CLASSES, (count,), generator=generator),
        num_classes=CLASSES,
        mean=(0.5,),
        std=(0.25,),
        augmentation=Augmentation(flip=True, crop_padding=1, erase_probability=0.5) if augment else Augmentation(),
    )


@contextlib.contextmanager
def closed_form() -> Iterator[None]:
    """Inside, layers train by the closed form on the reference's operations, as they do on a GPU by its kernels."""
    with patch.object(job, "choose_step", lambda kernels, device: fused_step(reference)):
        yield


def fit(engine: str, *, autograd: bool = False, **options: Any) -> RunResult:
    """One run.

    Args:
        autograd: layers train through autograd instead of in closed form.
        options: the engine's, the trainer's; `train`, `test` (numbers of samples, or data), `epochs`, `batch_size`,
            `eval_batch_size`, `augment`, `layers`, `dropout`, `rule`.
    """
    train, test = options.pop("train", 22), options.pop("test", 5)
    augment = options.pop("augment", False)
    blocks = network(options.pop("layers", 5), options.pop("dropout", 0.0))
    plan = {name: options.pop(name, default) for name, default in _PLAN.items()}
    rule = options.pop("rule", None) or LLS()
    made, others = split_options(engine, options)
    settings = {"seed": 5, "kernels": "torch", "statistics_batches": 2, "optimizer": DeviceMomentum, **others}
    trainer = Trainer(blocks, rule=rule, engine=made, **settings)  # type: ignore[arg-type]
    train = dataset(train, "train", augment=augment) if isinstance(train, int) else train()
    test = (dataset(test, "test") if isinstance(test, int) else test()) if test else None
    with contextlib.nullcontext() if autograd else closed_form():
        return trainer.fit(train, eval_data=test, **plan)


_PLAN: dict[str, Any] = {"epochs": 2, "batch_size": 2, "eval_batch_size": 2, "max_steps": None}


def fit_plainly(**options: Any) -> RunResult:
    """The same run by the plain loop, without what belongs to the streams engine and without a trace."""
    others = {key: value for key, value in options.items() if key not in {*setting_names(Streams), "trace"}}
    if "snapshot_dir" in others:
        others["snapshot_dir"] = others["snapshot_dir"] / "plain"
    return fit("sequential", **others)


def run_on_stand_in(removed: Iterable[str] = (), *, strict: bool = False, **options: Any) -> tuple[RunResult, Device]:
    with cuda_stand_in(removed, strict=strict) as device:
        return fit("streams", device="cuda", **options), device
