"""What the memory study found, as plain data."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from unlocked.comparison.reading import read_record
from unlocked.kernels.dispatch import BACKENDS
from unlocked.runtime.fields import LARGEST, LARGEST_SEED, check, setting
from unlocked.runtime.typed import from_plain, to_plain

__all__ = ["ACCUMULATED", "BP", "CHECKPOINTED", "CHUNKS", "ChainSettings", "MemoryPoint", "MemoryStudy"]

BP: Final = "BP"
CHECKPOINTED: Final = "BP, checkpointed"
ACCUMULATED: Final = "BP, accumulated"
CHUNKS: Final = 4
"""Into which a micro-batch is cut whose gradients are accumulated; smaller ones into chunks of one row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainSettings:
    """The network and how it trains: equal 3x3 convolutional blocks, then an output layer."""

    channels: int = setting(16, "of every block", at_least=1, at_most=65536)
    image_size: int = setting(16, "side of the images in pixels", at_least=1, at_most=16384)
    batch_size: int = setting(16, "rows of a micro-batch", at_least=1, at_most=LARGEST)
    num_classes: int = setting(10, "of the output layer", at_least=1, at_most=LARGEST)
    steps: int = setting(3, "training steps; the first one builds the optimizer's states", at_least=2, at_most=LARGEST)
    device: str = setting("cpu", "cpu, cuda or cuda:INDEX")
    kernels: str = setting("auto", "auto, torch, cpp (CPU), triton, triton_joined or cuda (GPU)", choices=BACKENDS)
    seed: int = setting(0, "of weights and images", at_least=0, at_most=LARGEST_SEED)

    def __post_init__(self) -> None:
        check(self)

    @property
    def activation_bytes(self) -> int:
        """One block's output for one batch, in float32."""
        return 4 * self.batch_size * self.channels * self.image_size**2


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPoint:
    """One chain, one way to train it."""

    method: str
    """"BP", "BP, checkpointed", "BP, accumulated", or the name of a local rule."""
    depth: int
    """Equal blocks, without the output layer."""
    activation_bytes: int
    """The most that was alive at once, less `persistent_bytes`."""
    persistent_bytes: int
    """Weights, optimizer states, buffers and the batch; of a local rule also the gradients."""
    held_bytes: int
    """Alive between two steps beyond `persistent_bytes`: what a method keeps of a batch that it is done with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryStudy:
    """All chains. `as_dict` and `from_dict` are each other's inverse, for JSON."""

    settings: ChainSettings
    points: list[MemoryPoint]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(point.method for point in self.points))

    def of(self, method: str) -> list[MemoryPoint]:
        """A method's points by depth."""
        return sorted((p for p in self.points if p.method == method), key=lambda point: point.depth)

    def slope(self, method: str) -> tuple[float, float]:
        """Bytes per block and bytes at depth 0 of the least-squares line through a method's points.

        Raises:
            ValueError: fewer than two depths.
        """
        points = self.of(method)
        if len({point.depth for point in points}) < 2:
            raise ValueError(f"a line through the points of {method} needs at least two depths.")
        line = statistics.linear_regression([p.depth for p in points], [p.activation_bytes for p in points])
        return line.slope, line.intercept

    def as_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_plain(self)
        return plain

    @classmethod
    def load(cls, path: Path) -> "MemoryStudy":
        """Raises: ValueError if `path` is no study of memory."""
        return read_record(cls, path, what="memory study", remedy="--study memory")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MemoryStudy":
        """Raises: ValueError where a value does not belong."""
        return from_plain(cls, values, "memory study")
