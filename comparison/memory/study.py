"""Peak activation memory against depth: a line for backpropagation, flat for local learning.

    python launch/compare.py --study memory

Trains chains of equal convolutional blocks, a few steps each, and counts to the byte. On the CPU the profiler reports
every allocation and every free of torch's allocator from before the network is built, also those inside an operation
and inside the C++ kernels; on CUDA the caching allocator keeps its own high-water mark. Taken off is what stays for
the whole run: weights, optimizer states, buffers, the batch, and under a local rule the weights' gradients (which
backpropagation frees before its forward pass here, in its favour). The rest, at its highest, is the activations and the
intermediate results of a step.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from unlocked.comparison.report.page import Headline, memory_section, render, require_plotting
from unlocked.models import Block, ConvBlock, OutputBlock
from unlocked.rules import Rule, get_rule
from unlocked.runtime.network import Network, backpropagation_network, build_layer, build_network
from unlocked.runtime.saving.whole_file import write_whole
from unlocked.workers.actions import Item
from unlocked.workers.fused import choose_step
from unlocked.workers.stage import Stage

__all__ = [
    "BP",
    "CHECKPOINTED",
    "ChainSettings",
    "MemoryPoint",
    "MemoryStudy",
    "build_chain",
    "chain",
    "main",
    "measure",
    "run_memory_study",
]

BP: Final = "BP"
CHECKPOINTED: Final = "BP, checkpointed"
_CUDA_BLOCK: Final = 512  # bytes to which torch's CUDA allocator rounds up


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainSettings:
    """The network and how it trains: equal 3x3 convolutional blocks, then an output layer."""

    channels: int = 16
    image_size: int = 16
    batch_size: int = 16
    num_classes: int = 10
    steps: int = 3
    """Training steps; the first one builds the optimizer's states."""
    device: str = "cpu"
    kernels: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("channels", "image_size", "batch_size", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not valid. Give at least 1.")
        if self.steps < 2:
            raise ValueError(f"steps={self.steps} is not valid. Give at least 2: the first one only warms up.")

    @property
    def activation_bytes(self) -> int:
        """One block's output for one batch, in float32."""
        return 4 * self.batch_size * self.channels * self.image_size**2


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPoint:
    """One chain, one way to train it."""

    method: str
    """"BP", "BP, checkpointed", or the name of a local rule."""
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
        return {"settings": asdict(self.settings), "points": [asdict(point) for point in self.points]}

    @classmethod
    def load(cls, path: Path) -> "MemoryStudy":
        """Raises: ValueError if `path` is no study of memory."""
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no memory study ({error}); make it anew with --study memory") from None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MemoryStudy":
        points = [MemoryPoint(**point) for point in values["points"]]
        return cls(settings=ChainSettings(**values["settings"]), points=points)


def chain(depth: int, settings: ChainSettings) -> list[Block]:
    """`depth` equal convolutional blocks [B, channels, image_size, image_size], and an output layer."""
    c = settings.channels
    last = depth - 1
    # The last block pools to 2 x 2, so that the output layer is small whatever the image.
    blocks: list[Block] = [
        ConvBlock(c, c, name=f"conv{i + 1}", pool="average" if i == last else "none", pool_size=2 if i == last else 1)
        for i in range(depth)
    ]
    return [*blocks, OutputBlock(4 * c, settings.num_classes)]


def measure(method: str, depth: int, settings: ChainSettings) -> MemoryPoint:
    """Trains one chain and counts.

    Args:
        method: "BP", "BP, checkpointed" (every sqrt(depth) blocks keep their input only and compute again), or a rule.
    """
    device = torch.device(settings.device)
    with _count_allocations(device) as counted:
        stage, x, labels = build_chain(method, depth, settings, device)
        item = Item(0, "train", 0, 0, settings.batch_size, False)
        for _ in range(settings.steps):
            stage.forward(item, x, labels)
            stage.update(item)
            if method in (BP, CHECKPOINTED):
                # Backpropagation makes all gradients anew while activations go: none needs to be there at its peak.
                stage.layers[0].optimizer.zero_grad(set_to_none=True)
        persistent = _bytes_of(_persistent_tensors(stage, x, labels), device)
    return MemoryPoint(
        method=method,
        depth=depth,
        activation_bytes=counted.peak - persistent,
        persistent_bytes=persistent,
        held_bytes=counted.now - persistent,
    )


def run_memory_study(
    settings: ChainSettings, depths: Sequence[int], methods: Sequence[str], report: Any = print
) -> MemoryStudy:
    """Measures every method at every depth, and reports each line of the table as it is known."""
    points: list[MemoryPoint] = []
    report(f"{'blocks':>6}" + "".join(f"{method:>20}" for method in methods) + "   (peak activation memory, MiB)")
    for depth in depths:
        row = [measure(method, depth, settings) for method in methods]
        report(f"{depth:>6}" + "".join(f"{point.activation_bytes / 2**20:>20.2f}" for point in row))
        points += row
    return MemoryStudy(settings=settings, points=points)


def describe_slopes(study: MemoryStudy) -> list[str]:
    """One line per method: the fitted bytes per block, also in activations of a block."""
    lines = []
    for method in study.methods:
        slope, start = study.slope(method)
        lines.append(
            f"{method}: {slope / 1024:.2f} KiB per block ({slope / study.settings.activation_bytes:.3f} of a block's "
            f"output), {start / 2**20:.2f} MiB at depth 0"
        )
    return lines


def describe_growth(study: MemoryStudy) -> str:
    """One sentence: how much each method's memory grows from the shallowest chain to the deepest."""
    parts = []
    for method in study.methods:
        points = study.of(method)
        factor = points[-1].activation_bytes / points[0].activation_bytes
        growth = "needs the same activation memory" if round(factor, 2) == 1 else f"needs {factor:.1f} times as much"
        parts.append(f"{method} {growth}")
    first, last = points[0].depth, points[-1].depth
    return f"From {first} blocks to {last}, {', '.join(parts[:-1])} and {parts[-1]}."


def main(arguments: Sequence[str] | None = None) -> int:
    """The study on the command line: a table, the slopes, and a page."""
    parser = argparse.ArgumentParser(
        prog="compare.py --study memory",
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--depths", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128, 256], help="blocks of the chains")
    add("--training-mode", nargs="+", default=["LLS"], help="local rules, beside BP with and without checkpoints")
    add("--channels", type=int, default=16)
    add("--image-size", type=int, default=16)
    add("--batch-size", type=int, default=16)
    add("--device", default="cpu")
    add("--kernels", default="auto")
    add(
        "--output",
        type=Path,
        default=Path("runs/comparison"),
        help="folder for memory.json, .csv and .html",
    )
    options = parser.parse_args(arguments)
    require_plotting()
    if min(options.depths) < 1 or len(set(options.depths)) < 2:
        raise ValueError(f"--depths {options.depths} is not valid. Give at least two different depths of 1 or more.")
    settings = ChainSettings(
        channels=options.channels,
        image_size=options.image_size,
        batch_size=options.batch_size,
        device=options.device,
        kernels=options.kernels,
    )
    methods = [BP, CHECKPOINTED, *options.training_mode]
    study = run_memory_study(settings, sorted(set(options.depths)), methods)
    print(*describe_slopes(study), sep="\n")
    write_memory_study(study, options.output)
    print(f"wrote {options.output / 'memory.html'}, memory.json and memory.csv")
    return 0


def write_memory_study(study: MemoryStudy, folder: Path) -> None:
    """memory.json, memory.csv and memory.html."""
    folder.mkdir(parents=True, exist_ok=True)
    s = study.settings
    conditions = (f"batch {s.batch_size}", f"{s.channels} channels", f"torch {torch.__version__}", f"on {s.device}")
    what = Headline(sentence=describe_growth(study), conditions=conditions)
    page = render("Activation memory against depth", what, [memory_section(study)])
    write_whole(folder / "memory.html", page)
    write_whole(folder / "memory.json", json.dumps(study.as_dict(), indent=1))
    names = list(asdict(study.points[0]))
    rows = [names, *([str(value) for value in asdict(point).values()] for point in study.points)]
    write_whole(folder / "memory.csv", "".join(",".join(_quote(cell) for cell in row) + "\n" for row in rows))


def _quote(cell: str) -> str:
    return f'"{cell}"' if "," in cell else cell


class _Checkpointed(nn.Module):
    """Blocks in about sqrt(depth) segments, of which only the inputs live until the backward pass."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        segments = max(1, round(math.sqrt(len(self.blocks))))
        result: Tensor = checkpoint_sequential(self.blocks, segments, x, use_reentrant=False)
        return result


def build_chain(method: str, depth: int, settings: ChainSettings, device: torch.device) -> tuple[Stage, Tensor, Tensor]:
    """A stage with the whole chain, its images and its labels, ready to train by `method` (see `measure`)."""
    shape = (settings.channels, settings.image_size, settings.image_size)
    network = build_network(
        chain(depth, settings), input_shape=shape, num_classes=settings.num_classes, seed=settings.seed
    )
    rules: Rule | Sequence[Rule] = []
    if method == CHECKPOINTED:
        network = _checkpointed_network(network)
    elif method == BP:
        network = backpropagation_network(network)
    else:
        rules = get_rule(method, temperature=0.5, label_smoothing=0.0, waveform="cosine")
    layers = [
        build_layer(
            network,
            index,
            rule=rules,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
            device=device,
            step=choose_step(settings.kernels, device),
        )
        for index in range(len(network.blocks))
    ]
    generator = torch.Generator().manual_seed(settings.seed)
    x = torch.randn(settings.batch_size, *shape, generator=generator).to(device)
    x = x.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(settings.num_classes, (settings.batch_size,), generator=generator).to(device)
    return Stage(0, layers), x, labels


def _checkpointed_network(network: Network) -> Network:
    whole = backpropagation_network(network)
    return replace(whole, blocks=[Block("network", nn.Sequential(_Checkpointed(network.blocks)), is_output=True)])


def _persistent_tensors(stage: Stage, x: Tensor, labels: Tensor) -> Iterator[Tensor]:
    """Everything that a run keeps from its first step to its last."""
    yield from (x, labels)
    for layer in stage.layers:
        for module in (layer.block, layer.rule):
            yield from module.buffers()
            for parameter in module.parameters():
                yield parameter
                if parameter.grad is not None:
                    yield parameter.grad
        # Sums and counts of the layer, and constants of its closed-form step.
        yield from (value for holder in (layer, layer.step) for value in _own_tensors(holder))
        if layer.optimizer is not None:
            for state in layer.optimizer.state_dict()["state"].values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


def _own_tensors(holder: object) -> Iterator[Tensor]:
    constants = ("totals", "eval_totals", "clock", "_counted", "_zero")
    for owner in (holder, getattr(holder, "body", None)):
        found = (getattr(owner, name, None) for name in constants)
        yield from (value for value in found if isinstance(value, Tensor))


def _bytes_of(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Of all storages, each once; a scalar that an optimizer keeps on the CPU does not count on a GPU."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device == device}
    if device.type == "cuda":
        return sum(-(-size // _CUDA_BLOCK) * _CUDA_BLOCK for size in storages.values())
    return sum(storages.values())


@dataclass(slots=True)
class _Count:
    peak: int = 0
    now: int = 0


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's native code says on the descriptor itself that it starts and stops."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@contextlib.contextmanager
def _count_allocations(device: torch.device) -> Iterator[_Count]:
    """Bytes allocated inside: the most at once, and at the end."""
    count = _Count()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield count
        torch.cuda.synchronize(device)
        count.peak = torch.cuda.max_memory_allocated(device) - before
        count.now = torch.cuda.memory_allocated(device) - before
        return
    gc.collect()  # what an earlier chain left in cycles would be freed inside
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _silent_stderr():
        profiler.start()
    try:
        yield count
    finally:
        with _silent_stderr():
            profiler.stop()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events: list[Any] = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        count.now += event.nbytes()
        count.peak = max(count.peak, count.now)
