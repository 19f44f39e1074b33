"""Peak activation memory against depth: a line for backpropagation, flat for local learning.

    python launch/compare.py --study memory

Trains chains of equal convolutional blocks, a few steps each, and counts to the byte. On the CPU the profiler reports
every allocation and every free of torch's allocator from before the network is built, also those inside an operation
and inside the C++ kernels; on CUDA the caching allocator keeps its own high-water mark. Taken off is what stays for
the whole run: weights, optimizer states, buffers, the batch, and under a local rule the weights' gradients (which
backpropagation frees before its forward pass here, in its favour). The rest, at its highest, is the activations and the
intermediate results of a step.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from unlocked.comparison.memory.allocations import count_steps
from unlocked.comparison.memory.chain import build_chain
from unlocked.comparison.memory.page import memory_section
from unlocked.comparison.memory.results import (
    ACCUMULATED,
    BP,
    CHECKPOINTED,
    CHUNKS,
    ChainSettings,
    MemoryPoint,
    MemoryStudy,
)
from unlocked.comparison.report.figures import require_plotting
from unlocked.comparison.report.sections import Headline, render
from unlocked.rules import LOCAL_RULES
from unlocked.runtime.fields import LineParser, add_flags, check, setting
from unlocked.runtime.job import check_device
from unlocked.runtime.saving.whole_file import write_json, write_whole
from unlocked.workers.fused import choose_step

__all__ = ["MemoryOptions", "main", "measure", "parse", "run_memory_study", "write_memory_study"]


def measure(method: str, depth: int, settings: ChainSettings) -> MemoryPoint:
    """Trains one chain and counts.

    Args:
        method: "BP", "BP, checkpointed" (every sqrt(depth) blocks keep their input only and compute again),
            "BP, accumulated" (the gradients of a quarter of the batch at a time are added up), or a rule.
    """
    device = torch.device(settings.device)
    # Before the counting begins: what building tries out is no part of training.
    stage, x, labels = build_chain(method, depth, settings, device)
    chunks = CHUNKS if method == ACCUMULATED else 1
    end_to_end = method in (BP, CHECKPOINTED, ACCUMULATED)
    found = count_steps(stage, x, labels, steps=settings.steps, end_to_end=end_to_end, chunks=chunks)
    return MemoryPoint(
        method=method,
        depth=depth,
        activation_bytes=found.activation_bytes,
        persistent_bytes=found.persistent_bytes,
        held_bytes=found.held_bytes,
    )


def run_memory_study(
    settings: ChainSettings, depths: Sequence[int], methods: Sequence[str], announce: Callable[[str], object] = print
) -> MemoryStudy:
    """Measures every method at every depth, and announces each line of the table as it is known."""
    points: list[MemoryPoint] = []
    announce(f"{'blocks':>6}" + "".join(f"{method:>20}" for method in methods) + "   (peak activation memory, MiB)")
    for depth in depths:
        row = [measure(method, depth, settings) for method in methods]
        announce(f"{depth:>6}" + "".join(f"{point.activation_bytes / 2**20:>20.2f}" for point in row))
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


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """What the study is told."""

    chain: ChainSettings
    depths: tuple[int, ...] = setting(
        (4, 8, 16, 32, 64, 128, 256), "blocks of the chains: two numbers or more", at_least=1, at_most=65536
    )
    training_mode: tuple[str, ...] = setting(
        ("LLS",), "local rules, beside BP, BP with checkpoints and BP with accumulated gradients", choices=LOCAL_RULES
    )
    output: Path = setting(Path("runs/comparison"), "folder for memory.json, .csv and .html", place="new folder")

    def __post_init__(self) -> None:
        check(self)
        if len(set(self.depths)) < 2:
            raise ValueError(f"depths are {', '.join(map(str, self.depths))}; give at least two different depths")


_CHAIN = ("channels", "image_size", "batch_size", "device", "kernels")
"""The chains' settings that the command line gives."""


def parse(arguments: Sequence[str] | None) -> MemoryOptions:
    """Reads the study's command line.

    Raises:
        ValueError: a mistake, in one line.
    """
    parser = LineParser(
        prog="unlocked compare --study memory", description=__doc__.splitlines()[0] if __doc__ else None
    )
    group = parser.add_argument_group("what is measured")
    add_flags(group, MemoryOptions)
    add_flags(group, ChainSettings, _CHAIN)
    given = vars(parser.parse_args(arguments))
    settings = ChainSettings(**{name: given.pop(name) for name in _CHAIN if name in given})
    check_device(settings.device)
    choose_step(settings.kernels, torch.device(settings.device))
    return MemoryOptions(chain=settings, **given)


def main(arguments: Sequence[str] | None = None) -> int:
    """The study on the command line: a table, the slopes, and a page."""
    options = parse(arguments)
    require_plotting()
    methods = [BP, CHECKPOINTED, ACCUMULATED, *options.training_mode]
    study = run_memory_study(options.chain, sorted(set(options.depths)), methods)
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
    write_json(folder / "memory.json", study.as_dict())
    names = list(asdict(study.points[0]))
    rows = [names, *([str(value) for value in asdict(point).values()] for point in study.points)]
    write_whole(folder / "memory.csv", "".join(",".join(_quote(cell) for cell in row) + "\n" for row in rows))


def _quote(cell: str) -> str:
    return f'"{cell}"' if "," in cell else cell
