"""How long the host of the streams engine takes for a micro-batch, without a GPU: the engine's own Python alone.

    python benchmarks/host_per_tick.py --json FILE

The engine runs on the stand-in for a GPU that its tests use (`tests/engines/cuda_stand_in`), whose graphs do nothing
here. Time inside of the stand-in is left out, and with it the driver's calls: an event or a wait is about a microsecond
more on a real GPU, a graph's launch several. The few operations between graphs are done on a CPU, which takes them as
long as a launch would, or longer. Two runs of different length are compared, so that what happens once per run is not
in it either. Times are the processor's, and the shortest of several runs counts: other programs only make them longer.
"""

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Iterator
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
# What the engine calls of the stand-in.
ENTRIES: list[tuple[Any, list[str]]] = [
    (parts.Stream, ["wait_event", "wait_stream", "synchronize"]),
    (parts.Event, ["__init__", "record", "query", "synchronize", "elapsed_time"]),
    (parts.Device, ["synchronize"]),
    (graphs.Graph, ["replay"]),
]


class Watch:
    """Seconds inside of what it wraps; calls from within count to the outermost one."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def wrap(self, function: Any) -> Any:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return function(*args, **kwargs)
            self._depth = 1
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - start
                self._depth = 0

        return timed


@contextlib.contextmanager
def watched(watch: Watch, places: list[tuple[Any, list[str]]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for place, names in places:
            for name in names:
                stack.enter_context(patch.object(place, name, watch.wrap(getattr(place, name))))
        yield


def pageable(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
    """Of `torch.empty`: memory can't be page-locked here."""
    return _empty(*args, **kwargs)


def host_seconds(steps: int, options: argparse.Namespace) -> tuple[float, float]:
    """(all, of them in the reporters' `skip`) of a run of `steps` micro-batches, without the stand-in's."""
    stand_in, found, in_reporters = Watch(), [], [0.0]
    train = engine._Run.train

    def apart(function: Any) -> Any:
        def timed(*args: Any) -> Any:
            inside, start = stand_in.seconds, time.thread_time()
            result = function(*args)
            in_reporters[0] += time.thread_time() - start - (stand_in.seconds - inside)
            return result

        return timed

    def timed_train(*args: Any) -> float:
        with _disable_current_modes(), torch._C.DisableTorchFunction(), patch.object(torch, "empty", pageable):
            inside, start = stand_in.seconds, time.thread_time()
            seconds = train(*args)
            found.append(time.thread_time() - start - (stand_in.seconds - inside))
        return seconds

    with (
        watched(stand_in, ENTRIES),
        patch.object(StageReporter, "skip", apart(StageReporter.skip)),
        patch.object(engine._Run, "train", timed_train),
    ):
        run_on_stand_in(
            idle=True,
            stages=options.stages,
            graph_ticks=options.graph_ticks,
            train=2 * steps,
            test=0,
            batch_size=2,
            epochs=1,
        )
    return found[0], in_reporters[0]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stages", type=int, choices=range(1, 6), default=5, help="of the network's five layers")
    parser.add_argument("--graph-ticks", type=int, default=32, help="the engine's")
    parser.add_argument("--steps", type=int, nargs=2, default=(200, 3400), help="micro-batches of the two runs")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(1)
    short, long = sorted(options.steps)
    seconds: dict[str, dict[int, list[float]]] = {name: {short: [], long: []} for name in ("all", "skip")}
    for _ in range(options.repeats):
        for steps in (short, long):
            for name, value in zip(seconds, host_seconds(steps, options), strict=True):
                seconds[name][steps].append(value)
    # What disturbs a run only makes it longer.
    per_tick = {name: 1e6 * (min(one[long]) - min(one[short])) / (long - short) for name, one in seconds.items()}
    print(
        f"{environment().line}\nhost's microseconds per micro-batch, {options.stages} stages, {options.repeats} runs:"
    )
    for name, value in per_tick.items():
        print(f"{name:<6}{value:>8.2f}")
    if options.json is not None:
        conditions = {"stages": options.stages, "graph_ticks": options.graph_ticks, "repeats": options.repeats}
        result = {"environment": to_plain(environment()), **conditions, "microseconds_per_micro_batch": per_tick}
        options.json.write_text(json.dumps(result | {"seconds": seconds}, indent=1, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
