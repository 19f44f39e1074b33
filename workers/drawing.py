"""A layer that draws from the process's global generators: around its work, and only there, they are seeded by keys.

So its draws depend on (seed, layer, micro-batch) alone, whatever ran before in the process, and the caller's generators
are left as they were. A layer that draws nothing is a plain `Layer`, to which nothing of this is added.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from unlocked.kernels.philox import Purpose, philox_int
from unlocked.models.generators import GlobalGenerators, mixed
from unlocked.workers.layer import Layer

__all__ = ["DrawingLayer"]

_USES = ("train", "update", "statistics", "evaluate", "carry")


class DrawingLayer(Layer):
    """Arguments as `Layer`, and: sources: the global generators to seed (`unlocked.models.generators.SOURCES`).

    Every forward in training and every update has a key of its own. Evaluation has one for all micro-batches of the
    run; re-estimating statistics has that of the training step before it, as keyed dropout has.
    """

    def __init__(self, *args: Any, sources: Iterable[str], **options: Any) -> None:
        super().__init__(*args, **options)
        info = self.info
        self._generators = GlobalGenerators(sources, self.device)
        self._bases = {use: philox_int(info.seed, Purpose.DRAW, info.index, i) for i, use in enumerate(_USES)}
        self._keeps_clock = True
        self._steps = 0  # the clock's value, on the host, since a device's would have to be waited for

    @property
    def is_capturable(self) -> bool:
        """Never: generators are seeded by the host, which a replayed graph doesn't ask."""
        return False

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        with self._generators.keyed(mixed(self._bases["train"], self._steps)):
            return super().forward(x, out)

    def update(self, labels: Tensor) -> None:
        with self._generators.keyed(mixed(self._bases["update"], self._steps)):
            super().update(labels)

    @torch.no_grad()
    def infer(self, x: Tensor, mode: str) -> Tensor:
        step = 0 if mode == "evaluate" else self._steps
        with self._generators.keyed(mixed(self._bases[mode], step)):
            return super().infer(x, mode)

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        with self._generators.keyed(mixed(self._bases["evaluate"], 0)):
            return super().evaluate(x)

    def advance(self, steps: int, *, on_device: bool = True) -> None:
        super().advance(steps, on_device=on_device)
        self._steps += steps

    def set_clock(self, clock: Tensor) -> None:
        super().set_clock(clock)
        self._steps = int(clock)
