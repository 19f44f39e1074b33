"""The streams engine on a CPU: captured items and graphs of many ticks, and what is timed.

Captured work is launched with the host's values as they were when it was captured, as a CUDA graph does. So equality
with the plain loop shows that all that changes lies in tensors: the cursor, the order, clocks, learning rates.
"""

import json
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import dataset, figures, trainer
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked import AdamWSF
from unlocked.runtime import RunResult, Trainer
from unlocked.runtime.engines.streams.green import make_streams, share
from unlocked.runtime.engines.streams.tick_graph import TickGraph
from unlocked.runtime.schedules.schedule import stage_actions
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.workers.errors import StageError
from unlocked.workers.lane import Lane

schedulefree = pytest.importorskip("schedulefree")

TRAIN, TEST = dataset(100), dataset(20, "test", augment=False)
SHORT = {"epochs": 2, "batch_size": 8, "eval_batch_size": 16}  # 12 full micro-batches and one of 4 rows an epoch


def fit(one: Trainer, evaluate: bool = True, **options: Any) -> RunResult:
    return one.fit(TRAIN, eval_data=TEST if evaluate else None, **{**SHORT, **options})


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions at which tick graphs were launched."""
    seen: list[int] = []
    original = TickGraph.launch

    def launch(self: TickGraph, first: Any) -> None:
        seen.append(first.position)
        original(self, first)

    monkeypatch.setattr(TickGraph, "launch", launch)
    return seen


@pytest.fixture(scope="module")
def expected() -> RunResult:
    return fit(trainer(lr_factor=lambda epoch: 0.5**epoch))


@pytest.mark.parametrize(("stages", "depth", "ticks"), [(5, 2, 2), (2, 4, 4), (3, 1, 3), (1, 4, 6)])
def test_tick_graphs_equal_the_plain_loop(
    stages: int, depth: int, ticks: int, launches: list[int], expected: RunResult
) -> None:
    """Dropout, augmentation, partial micro-batches, evaluation, statistics, another learning rate each epoch."""
    got = fit(
        trainer("streams", stages=stages, queue_depth=depth, graph_ticks=ticks, lr_factor=lambda epoch: 0.5**epoch)
    )
    assert len(launches) >= 2
    assert got.weights_sha256 == expected.weights_sha256
    assert figures(got) == figures(expected)


@settings(max_examples=4)
@given(
    stages=st.integers(1, 5),
    depth=st.integers(1, 5),
    ticks=st.integers(0, 9),
    batch=st.integers(4, 16).filter(lambda batch: 100 % batch != 1),  # BatchNorm takes no single row
    steps=st.integers(1, 25),
    evaluate=st.booleans(),
)
def test_any_tick_graphs_equal_the_plain_loop(
    stages: int, depth: int, ticks: int, batch: int, steps: int, evaluate: bool
) -> None:
    options: dict[str, Any] = {"batch_size": batch, "max_steps": steps, "epochs": 3, "evaluate": evaluate}
    whole = fit(trainer(), **options)
    got = fit(trainer("streams", stages=stages, queue_depth=depth, graph_ticks=ticks), **options)
    assert got.weights_sha256 == whole.weights_sha256
    assert figures(got) == figures(whole)


@pytest.mark.parametrize(
    "kind", [AdamWSF, schedulefree.AdamWScheduleFree, schedulefree.SGDScheduleFree, torch.optim.Adam]
)
@pytest.mark.parametrize("graphs", [True, False])
def test_a_warm_up_leaves_nothing_behind(kind: type, graphs: bool, launches: list[int]) -> None:
    """Optimizers that hold their weights at two points, and that make their state in the first step."""
    options: dict[str, Any] = {"optimizer": partial(kind, lr=1e-2)}
    whole = fit(trainer(**options))
    got = fit(trainer("streams", **options, queue_depth=2, graph_ticks=2, graphs=graphs))
    assert bool(launches) == graphs
    assert got.weights_sha256 == whole.weights_sha256
    assert figures(got) == figures(whole)


def test_a_resume_in_the_middle_of_an_epoch_keeps_its_sums(tmp_path: Path, launches: list[int]) -> None:
    options: dict[str, Any] = {"snapshot_every": 14, "snapshot_dir": tmp_path}
    whole = fit(trainer(**options))
    resumed = trainer("streams", **options, resume=tmp_path / "step-00000014", queue_depth=2, graph_ticks=2)
    got = fit(resumed)
    assert launches
    assert got.weights_sha256 == whole.weights_sha256
    assert figures(got)[-1] == figures(whole)[-1]


@pytest.mark.parametrize(("stages", "depth", "ticks"), [(1, 4, 4), (2, 1, 3), (5, 2, 2)])
def test_a_resume_with_another_learning_rate_begins_with_it(
    stages: int, depth: int, ticks: int, launches: list[int], tmp_path: Path
) -> None:
    """In the middle of an epoch, where a tick graph could begin with the last stage's first micro-batch."""
    plan = {"batch_size": 4, "epochs": 1}  # 25 micro-batches
    options: dict[str, Any] = {"snapshot_every": 11, "snapshot_dir": tmp_path / "whole"}
    fit(trainer(**options), **plan, max_steps=11)
    changed = {**options, "resume": tmp_path / "whole" / "step-00000011", "lr_factor": lambda epoch: 0.1}
    expected = fit(trainer(**{**changed, "snapshot_dir": tmp_path / "plain"}), **plan)
    placed = {"stages": stages, "queue_depth": depth, "graph_ticks": ticks, "snapshot_dir": tmp_path / "streams"}
    got = fit(trainer("streams", **{**changed, **placed}), **plan)
    assert launches
    assert got.weights_sha256 == expected.weights_sha256
    assert figures(got) == figures(expected)


def test_a_failure_inside_a_tick_graph_names_the_real_micro_batch(
    launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the third layer turns infinite in the ninth step."""
    original = Lane._compute_plainly

    def compute(self: Lane, item: Any, held: Any, slot: Any) -> None:
        if self.stage.index == 2 and (self.offset or 0) + item.position == 8 and item.kind == "train":
            with torch.no_grad():
                self.stage.layers[0].parameters[0].fill_(torch.inf)
        original(self, item, held, slot)

    monkeypatch.setattr(Lane, "_compute_plainly", compute)
    with pytest.raises(StageError, match=r"stage 2 .*2U8 \(epoch 0, train micro-batch 8\)"):
        fit(trainer("streams", graph_ticks=2, queue_depth=2))
    assert launches[-1] <= 8 + 2 < launches[-1] + 2  # stage 2 is two ticks behind


def read_trace(path: Path) -> tuple[dict[int, str], list[tuple[int, str, float, float]]]:
    """(row names, actions as (row, label, begin, end) in microseconds)."""
    events = json.loads(path.read_text())["traceEvents"]
    rows = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    return rows, [(e["tid"], e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X"]


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("sequential", {}),
        ("streams", {"stages": 3, "graph_ticks": 2, "queue_depth": 2}),
        ("streams", {"stages": 5, "graphs": False}),
    ],
)
def test_a_trace_has_every_action_of_the_schedule(engine: str, options: dict[str, Any], tmp_path: Path) -> None:
    """One row per stage, each action once, in order, none inside another; the busy fraction is theirs."""
    path = tmp_path / "trace.json"
    saved = {"snapshot_every": 9, "snapshot_dir": tmp_path / "snapshots"}
    result = fit(trainer(engine, **options, **saved, trace=path))
    rows, actions = read_trace(path)
    assert list(rows.values()) == [f"stage {k}: {', '.join(names)}" for k, names in enumerate(result.stages)]
    plan = StreamPlan(
        epochs=2, train_size=100, batch_size=8, eval_size=20, eval_batch_size=16, statistics_batches=2, snapshot_every=9
    )
    for k in rows:
        mine = [a for a in actions if a[0] == k]
        assert [label for _, label, *_ in mine] == [str(a) for a in stage_actions(k, len(rows), plan.items())]
        assert all(end <= begin + 1e-3 for (*_, end), (_, _, begin, _) in pairwise(mine))
        busy = 1e-6 * sum(end - begin for _, label, begin, end in mine if "RECV" not in label and "SEND" not in label)
        assert result.busy_fraction[k] == pytest.approx(busy / result.train_seconds, rel=1e-3)
    kinds = Counter("".join(c for c in label if c.isalpha()) for _, label, *_ in actions)
    assert set(kinds) - {"RECV", "SEND"} == {"F", "U", "E", "SNAP"}


def test_green_contexts_say_what_they_need() -> None:
    with pytest.raises(ValueError, match="valid: off, sms, queues"):
        trainer("streams", green_contexts="on")
    for kind in ("sms", "queues"):
        with pytest.raises(ValueError, match=f"green_contexts '{kind}' need a CUDA device, the run is on cpu"):
            trainer("streams", green_contexts=kind)
        with pytest.raises(ValueError, match="need a CUDA device"):
            make_streams(kind, torch.device("cpu"), 5)
    assert make_streams("off", torch.device("cpu"), 3) == ([None] * 3, [])


@given(multiprocessors=st.integers(8, 200), stages=st.integers(1, 30))
def test_a_share_of_the_multiprocessors_can_be_had(multiprocessors: int, stages: int) -> None:
    got = share(multiprocessors, stages)
    assert got % 8 == 0
    assert 8 <= got <= max(8, multiprocessors // stages)


def test_negative_graph_ticks_are_refused() -> None:
    with pytest.raises(ValueError, match="graph_ticks is -1"):
        trainer("streams", graph_ticks=-1)
