"""The CUDA side of the streams engine without a GPU: on a stand-in that has CUDA's order and the rules of captures.

The stand-in does everything as it is issued, and checks of every operation whether what it reads and writes is ordered
by events, streams and launches alone. So a run that ends well here has all the waits that it needs; and each of them is
needed, as it shows when that one is left out.
"""

import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_stand_in.device import Device
from cuda_stand_in.install import cuda_stand_in
from engine_runs import figures
from stand_in_runs import dataset, fit_plainly, run_on_stand_in

from unlocked.runtime import MetricsSink, ReduceLROnPlateau
from unlocked.runtime.engines.streams import engine
from unlocked.workers.captured import Captured
from unlocked.workers.errors import StageError


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A loader of eleven micro-batches."""
    data = dataset(22, "train")
    images = data.images.float() / 255
    return [(images[i : i + 2], data.labels[i : i + 2]) for i in range(0, 22, 2)]


SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, foreach=False)
LONG = {"train": 82, "epochs": 1, "test": 0}
SMALL = {"layers": 3, "train": 20, "test": 14, "epochs": 1}  # whole micro-batches only
CASES: dict[str, dict[str, Any]] = {
    **{
        f"depth {depth}, {ticks} ticks": {"queue_depth": depth, "graph_ticks": ticks, **more}
        for depth, ticks, more in [
            (1, 0, {}),
            (1, 3, {"test": 21}),
            (2, 2, {"train": 47, "batch_size": 3, "test": 21, "print_freq": 3, "epochs": 1}),
            (2, 32, LONG),
            (3, 0, {}),
            (3, 3, {"train": 47, "batch_size": 3, "test": 21}),
            (3, 32, {**LONG, "layers": 3, "print_freq": 7}),
        ]
    },
    "three stages": {"stages": 3, "queue_depth": 2, "graph_ticks": 4, "train": 47, "batch_size": 3},
    "traced": {
        "stages": 3,
        "queue_depth": 2,
        "graph_ticks": 2,
        "train": 47,
        "batch_size": 3,
        "epochs": 1,
        "trace": "trace.json",
    },
    "traced without graphs": {"graphs": False, "trace": "trace.json"},
    "no graphs": {"graphs": False, "queue_depth": 1},
    "backpropagation in one stage": {"stages": 1, "rule": "BP", "autograd": True, "graph_ticks": 3},
    "plateau": {"lr_factor": ReduceLROnPlateau(factor=0.5, patience=0, threshold=0.05), "graph_ticks": 2, "epochs": 3},
    "bf16": {"precision": "bf16", "queue_depth": 2, "graph_ticks": 2},
    "autograd": {"autograd": True, "queue_depth": 2, "graph_ticks": 2},
    "autograd with an optimizer of the library": {"autograd": True, "optimizer": SGD},
    "snapshots": {"snapshot_every": 5, "snapshot_dir": "snapshots", "queue_depth": 2, "graph_ticks": 2},
    "best weights": {"best_dir": "best", "graph_ticks": 2, "queue_depth": 2},
    "streamed data": {"train": batches, "batch_size": None, "prefetch": 1},
    "no evaluation": {"test": 0, "queue_depth": 2, "graph_ticks": 2},
    "augmented, with dropout": {"augment": True, "dropout": 0.3, "queue_depth": 2, "graph_ticks": 2, "epochs": 1},
    "longer evaluation": {"test": 61, "queue_depth": 2, "graph_ticks": 8, "statistics_batches": 12, "train": 42},
}


def with_folder(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {key: folder / v if key in ("trace", "snapshot_dir", "best_dir") else v for key, v in options.items()}


@pytest.mark.filterwarnings("ignore:streams. no CUDA graphs")
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_accessed_out_of_order_and_the_bits_are_those_of_the_plain_loop(case: str, tmp_path: Path) -> None:
    expected = fit_plainly(**with_folder(CASES[case], tmp_path))
    got, device = run_on_stand_in(**with_folder(CASES[case], tmp_path))
    assert device.order.unordered == []
    assert device.order.checked > 1000
    assert got.weights_sha256 == expected.weights_sha256
    assert figures(got) == figures(expected)
    assert (device.launches > 0) == ("no graphs" not in case and "without graphs" not in case and "library" not in case)
    assert device.most_ahead <= engine._GRAPHS_AHEAD + 1


@pytest.mark.parametrize("cut", [5, 15])
def test_a_resumed_run_goes_on_in_order_and_exactly(cut: int, tmp_path: Path) -> None:
    """In the first epoch and in the second, whose sums so far come out of the snapshot."""
    options: dict[str, Any] = {"snapshot_every": 5, "snapshot_dir": tmp_path, "layers": 3, "graph_ticks": 2}
    whole, _ = run_on_stand_in(**options)
    resumed, device = run_on_stand_in(**options, resume=tmp_path / f"step-{cut:08d}")
    assert device.order.unordered == []
    assert device.launches > 0
    assert (resumed.first_step, resumed.steps) == (cut, whole.steps)
    assert resumed.weights_sha256 == whole.weights_sha256 == fit_plainly(**options).weights_sha256
    assert figures(resumed)[-1] == figures(whole)[-1]


class StopAfter(MetricsSink):
    """Asks for a stop at the first step that is reported."""

    def on_step(self, step: Any) -> None:
        signal.raise_signal(signal.SIGINT)


STOPPED: dict[str, Any] = {"test": 0, "train": 60, "queue_depth": 2, "graph_ticks": 2, "print_freq": 9}


def test_a_stopped_run_has_waited_for_all_that_it_began() -> None:
    got, device = run_on_stand_in(**STOPPED, sinks=[StopAfter()])
    expected = fit_plainly(**STOPPED, max_steps=got.steps)
    assert got.stopped_by == signal.SIGINT
    assert 5 <= got.steps < 20
    assert device.order.unordered == []
    assert got.weights_sha256 == expected.weights_sha256


# What each wait is for is seen in one of these runs, which have them all.
REMOVED_FROM: dict[str, dict[str, Any]] = {
    "graphs": {**SMALL, "queue_depth": 2, "graph_ticks": 2, "print_freq": 3},
    "traced": {**SMALL, "queue_depth": 1, "graph_ticks": 2, "trace": "trace.json"},
    "traced without graphs": {**SMALL, "graphs": False, "trace": "trace.json"},
    "streamed data": {"layers": 3, "train": batches, "test": 0, "batch_size": None, "prefetch": 1, "epochs": 1},
    "plateau": {**SMALL, **CASES["plateau"]},
    "stopped": {**STOPPED, "layers": 3, "sinks": [StopAfter()]},
}
# Waits that order no access, and what else they are for.
OTHERWISE = {
    "synchronize: _now:": "measures time",
    "synchronize: _Run._launch:": "bounds how far the host runs ahead: seen by `most_ahead`",
}
# A wait that another one covers today; without that one it is needed.
COVERED = {"synchronize: _Run._synchronize:2 < _Run.prepare:": "synchronize: DeviceClock.__init__:"}


def waits_of(device: Device) -> list[str]:
    """Those that can be left out; a read of a value can't be had without its wait."""
    return [name for name in device.waits if not name.startswith("read") and "by torch" not in name]


def goes_wrong(removed: list[str], options: dict[str, Any]) -> bool:
    """Whether an access is unordered without these waits, or a capture fails."""
    try:
        run_on_stand_in(removed, strict=True, **options)
    except RuntimeError as error:
        assert "CUDA error" in str(error) or "out of order" in str(error)  # noqa: PT017
        return True
    return False


def test_without_any_one_of_its_waits_a_run_is_out_of_order(tmp_path: Path) -> None:
    needed: dict[str, bool] = {}
    for case in REMOVED_FROM.values():
        options = with_folder(case, tmp_path)
        _, device = run_on_stand_in(**options)
        waits = waits_of(device)
        for wait in waits:
            if any(map(wait.startswith, OTHERWISE)) or needed.get(wait):
                continue
            needed[wait] = goes_wrong([wait], options)
            cover = next((other for start, other in COVERED.items() if wait.startswith(start)), None)
            if cover is not None:
                others = [one for one in waits if one.startswith(cover)]
                without = [run_on_stand_in(gone, **options)[1] for gone in (others, [wait, *others])]
                needed[wait] = len(without[0].order.unordered) < len(without[1].order.unordered)
    assert len(needed) > 20
    assert [wait for wait, is_needed in needed.items() if not is_needed] == []


def test_the_host_is_held_back_by_what_bounds_it() -> None:
    options: dict[str, Any] = {**SMALL, "test": 0, "train": 40, "queue_depth": 2, "graph_ticks": 2}
    _, device = run_on_stand_in(**options)
    assert device.most_ahead <= engine._GRAPHS_AHEAD + 1
    bounds = [wait for wait in device.waits if wait.startswith("synchronize: _Run._launch:")]
    _, unbounded = run_on_stand_in(bounds, **options)
    assert unbounded.most_ahead > engine._GRAPHS_AHEAD + 1


def test_a_failure_in_a_capture_comes_out_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not as what the capture's end, or the putting back of all state, then fails with."""
    with cuda_stand_in():
        stream, other, sums = torch.cuda.Stream(), torch.cuda.Stream(), torch.zeros(2, device="cuda")

        def work() -> None:
            fork = torch.cuda.Event()
            fork.record(stream)
            other.wait_event(fork)
            with torch.cuda.stream(other):
                sums.add_(1)  # is never joined: the capture can't end
            raise ValueError("the first cause")

        with pytest.raises(ValueError, match=r"^the first cause$"):
            Captured(work, stream)
        assert torch.cuda.current_stream() is torch.cuda.default_stream()

    def update(*_: Any) -> None:
        if torch.cuda.current_stream().capture is not None:
            torch.cuda.synchronize()

    monkeypatch.setattr("stand_in_runs.DeviceMomentum.step", update)
    with pytest.raises(RuntimeError, match=r"not permitted when stream is capturing \(synchronize\)"):
        run_on_stand_in(graph_ticks=2, queue_depth=2)


def test_a_failure_while_a_tick_graph_is_captured_names_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from unlocked.workers.lane import Lane

    original = Lane._compute_plainly

    def compute(self: Lane, *given: Any) -> None:
        if self.cursor_stays and self.stage.index == 2:
            raise KeyError("broken")
        original(self, *given)

    monkeypatch.setattr(Lane, "_compute_plainly", compute)
    with pytest.raises(StageError, match=r"stage 2 .*2F.*broken"):
        run_on_stand_in(graph_ticks=2, queue_depth=2)
