"""How long the host of the streams engine takes for a micro-batch, without a GPU: the engine's own Python alone.

    python benchmarks/host_per_tick.py --json FILE

The engine is set up on the stand-in for a GPU that its tests use (`tests/engines/cuda_stand_in`). For the run itself,
what it calls of streams, events and graphs is put aside for functions that do nothing, so that the time is the engine's
own and no driver's: how many of these calls a micro-batch has is counted apart (on a GPU an event or a wait is about a
microsecond, a graph's launch several). The few operations between graphs are done on a CPU, which takes them as long as
a launch would, or longer. Two runs of different length are compared, so that what happens once per run is not in it
either. Times are the processor's. Other programs only make them longer, so the shortest of several runs is nearest to
the truth; the median and the range say how much they were disturbed.
"""

import argparse
import contextlib
import functools
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "engines")]

import torch  # noqa: E402
from cuda_stand_in import device as parts  # noqa: E402
from cuda_stand_in import graphs  # noqa: E402
from stand_in_runs import run_on_stand_in  # noqa: E402
from torch.utils._python_dispatch import _disable_current_modes  # noqa: E402

from unlocked.comparison.environment import environment  # noqa: E402
from unlocked.runtime.engines.streams import engine  # noqa: E402
from unlocked.runtime.metrics.reporter import StageReporter  # noqa: E402
from unlocked.runtime.typed import to_plain  # noqa: E402

_empty = torch.empty
# What the engine calls of streams, events and graphs, and what each returns here.
CALLS: list[tuple[Any, str, Any]] = [
    (parts.Stream, "wait_event", None),
    (parts.Stream, "wait_stream", None),
    (parts.Stream, "synchronize", None),
    (parts.Event, "record", None),
    (parts.Event, "query", True),
    (parts.Event, "synchronize", None),
    (parts.Event, "elapsed_time", 0.0),
    (parts.Device, "synchronize", None),
    (graphs.Graph, "replay", None),
]


def pageable(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
    """Of `torch.empty`: memory can't be page-locked here."""
    return _empty(*args, **kwargs)


@contextlib.contextmanager
def without_device(count: Callable[[str], None] | None) -> Iterator[None]:
    """Inside, calls to streams, events and graphs do nothing; `count` is told of each."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(patch.object(torch, "empty", pageable))
        for place, name, result in CALLS:
            label = f"{place.__name__}.{name}"

            def nothing(*_: Any, result: Any = result, label: str = label, **__: Any) -> Any:
                if count is not None:
                    count(label)
                return result

            stack.enter_context(patch.object(place, name, nothing))
        yield


def host_seconds(
    steps: int, options: argparse.Namespace, count: Callable[[str], None] | None = None
) -> tuple[float, float]:
    """(all, of them in the reporters' `skip`) of a run of `steps` micro-batches."""
    found, in_skip = [], [0.0]
    train, skip = engine._Run.train, StageReporter.skip

    @functools.wraps(skip)
    def timed_skip(*args: Any) -> Any:
        start = time.thread_time()
        result = skip(*args)
        in_skip[0] += time.thread_time() - start
        return result

    def timed_train(*args: Any) -> float:
        with without_device(count):
            start = time.thread_time()
            seconds = train(*args)
            found.append(time.thread_time() - start)
        return seconds

    with contextlib.ExitStack() as stack:
        if options.skip:
            stack.enter_context(patch.object(StageReporter, "skip", timed_skip))
        stack.enter_context(patch.object(engine._Run, "train", timed_train))
        run_on_stand_in(
            stages=options.stages,
            graph_ticks=options.graph_ticks,
            train=2 * steps,
            test=0,
            batch_size=2,
            epochs=1,
        )
    return found[0], in_skip[0]


def calls_per_tick(short: int, long: int, options: argparse.Namespace) -> dict[str, float]:
    counts: dict[int, Counter[str]] = {steps: Counter() for steps in (short, long)}
    for steps, counter in counts.items():
        host_seconds(steps, options, lambda label, counter=counter: counter.update([label]))  # type: ignore[misc]
    return {label: (number - counts[short][label]) / (long - short) for label, number in sorted(counts[long].items())}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stages", type=int, choices=range(1, 6), default=5, help="of the network's five layers")
    parser.add_argument("--graph-ticks", type=int, default=32, help="the engine's")
    parser.add_argument("--steps", type=int, nargs=2, default=(200, 3400), help="micro-batches of the two runs")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--skip", action="store_true", help="also time the reporters' `skip`, which adds its clock's")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(1)
    short, long = sorted(options.steps)
    calls = calls_per_tick(short, long, options)
    found: dict[str, list[float]] = {"all": [], **({"skip": []} if options.skip else {})}
    for _ in range(options.repeats):
        less, more = host_seconds(short, options), host_seconds(long, options)
        for name, values in found.items():
            k = ("all", "skip").index(name)
            values.append(1e6 * (more[k] - less[k]) / (long - short))
    print(environment().line)
    print(f"host's microseconds per micro-batch, {options.stages} stages, {options.repeats} runs:")
    for name, values in found.items():
        middle = statistics.median(values)
        print(f"{name:<6}shortest {min(values):.2f}, median {middle:.2f}, longest {max(values):.2f}")
    print(f"calls to the device per micro-batch: {sum(calls.values()):.2f}")
    for label, number in calls.items():
        if number:
            print(f"  {label:<22}{number:>6.2f}")
    if options.json is not None:
        conditions = {"stages": options.stages, "graph_ticks": options.graph_ticks, "repeats": options.repeats}
        result = {
            "environment": to_plain(environment()),
            **conditions,
            "microseconds_per_micro_batch": {name: statistics.median(values) for name, values in found.items()},
            "shortest": {name: min(values) for name, values in found.items()},
            "each": found,
            "calls_per_micro_batch": calls,
        }
        options.json.write_text(json.dumps(result, indent=1, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
