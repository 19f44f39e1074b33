"""Whole runs where sizes are one, odd or uneven: every engine and kernel backend trains alike, or refuses alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite, prod
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unlocked.data import ImageDataset
from unlocked.models import Block, ConvBlock, DepthwiseBlock, LinearBlock, OutputBlock
from unlocked.rules import (
    DRTP,
    LLS,
    LLS_M,
    LLS_M_Random,
    LLS_MxM,
    LLS_MxM_Random,
    LLS_MxM_reduced,
    LLS_Random,
    LocalLosses,
)
from unlocked.runtime import RunResult, Trainer

RULES: list[Any] = [
    *(LLS(), LLS_M(), LLS_MxM(), LLS_MxM_reduced(), LLS_Random(), LLS_M_Random(), LLS_MxM_Random(), LocalLosses()),
    DRTP,
]
SIDES = st.integers(1, 5)


@dataclass(frozen=True)
class Case:
    """A network by its layers' arguments, data by its sizes, and a run."""

    shape: tuple[int, ...]
    layers: tuple[tuple[str, dict[str, Any]], ...]
    classes: int
    rows: int
    batch: int
    eval_rows: int
    eval_batch: int
    drop_last: bool
    rule: int

    def blocks(self) -> list[Block]:
        made: list[Block] = []
        for i, (kind, options) in enumerate(self.layers):
            name, width = f"{kind}{i}", options["width"]
            rest = {key: value for key, value in options.items() if key != "width"}
            shape = self._shape_after(made)
            if kind == "conv":
                made.append(ConvBlock(shape[0], width, name=name, **rest))
            elif kind == "depthwise":
                made.append(DepthwiseBlock(shape[0], width, name=name, **rest))
            elif kind == "conv1d":
                body = nn.Sequential(nn.Conv1d(shape[0], width, 3, padding=1), nn.BatchNorm1d(width), nn.LeakyReLU())
                made.append(Block(name, body, **rest))
            else:
                made.append(LinearBlock(prod(shape), width, name=name, **rest))
        return [*made, OutputBlock(prod(self._shape_after(made)), self.classes)]

    def _shape_after(self, blocks: Sequence[Block]) -> tuple[int, ...]:
        x = torch.zeros(2, *self.shape)
        for block in blocks:
            try:
                x = block.eval()(x)
            except RuntimeError:  # a pool of more than there is, which the run refuses
                break
            block.train()
        return tuple(x.shape[1:])

    def data(self) -> tuple[ImageDataset, ImageDataset | None]:
        generator = torch.Generator().manual_seed(self.rows)

        def split(word: str, rows: int) -> ImageDataset:
            samples = torch.randn(rows, *self.shape, generator=generator)
            labels = torch.randint(self.classes, (rows,), generator=generator)
            return ImageDataset.from_tensors(samples, labels, self.classes, split=word)

        return split("train", self.rows), split("test", self.eval_rows) if self.eval_rows else None

    def outcome(self, engine: str, kernels: str) -> RunResult | str:
        """The run's result, or what it is refused with. Anything else that is raised is a fault."""
        train, test = self.data()
        trainer = Trainer(self.blocks(), rule=RULES[self.rule], optimizer=SGD, engine=engine, kernels=kernels, seed=1)
        try:
            return trainer.fit(
                train,
                epochs=2,
                batch_size=self.batch,
                eval_data=test,
                eval_batch_size=self.eval_batch,
                drop_last=self.drop_last,
            )
        except ValueError as error:
            return str(error)


SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.5)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rank = draw(st.sampled_from([2, 2, 2, 1]))
    layers: list[tuple[str, dict[str, Any]]] = []
    for _ in range(draw(st.integers(0, 2))):
        kind = draw(st.sampled_from(["conv", "depthwise"])) if rank == 2 else "conv1d"
        options: dict[str, Any] = {"width": draw(SIDES), "latent_size": draw(st.none() | st.integers(1, 3))}
        if rank == 2:
            options["pool"] = draw(st.sampled_from(["none", "max", "average"]))
            options["pool_size"] = draw(st.integers(1, 3)) if options["pool"] == "average" else None
        options["reduced_rank"] = draw(st.integers(1, 3))
        layers.append((kind, options))
    if draw(st.booleans()):
        layers.append(("linear", {"width": draw(SIDES), "latent_size": draw(st.none() | SIDES), "reduced_rank": 1}))
    return Case(
        shape=(draw(st.integers(1, 3)), *draw(st.tuples(*[SIDES] * rank))),
        layers=tuple(layers),
        classes=draw(SIDES),
        rows=draw(st.integers(1, 9)),
        batch=draw(SIDES),
        eval_rows=draw(st.integers(0, 5)),
        eval_batch=draw(SIDES),
        drop_last=draw(st.booleans()),
        rule=draw(st.integers(0, len(RULES) - 1)),
    )


@settings(max_examples=40)
@given(cases())
def test_a_small_run(case: Case) -> None:
    found = {
        (engine, kernels): case.outcome(engine, kernels)
        for engine in ("sequential", "streams")
        for kernels in ("torch", "cpp")
    }
    plain = found["sequential", "torch"]
    if isinstance(plain, str):
        assert set(found.values()) == {plain}
        assert "layer" in plain or "block" in plain or "batch_size" in plain
        return
    for kernels in ("torch", "cpp"):
        one, other = found["sequential", kernels], found["streams", kernels]
        assert isinstance(one, RunResult)
        assert isinstance(other, RunResult)
        assert one.weights_sha256 == other.weights_sha256
        assert (one.local_losses, one.test_loss, one.steps) == (other.local_losses, other.test_loss, other.steps)
        assert all(isfinite(loss) for loss in one.local_losses.values())
