"""The engines on a GPU: the plain loop, graphs and plain launches give the same bits with deterministic kernels."""

import json
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import dataset, figures, trainer

from unlocked.runtime import RunResult

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TRAIN, TEST = dataset(300), dataset(40, "test", augment=False)  # 37 full micro-batches and one of 4 rows
STREAMS = {"engine": "streams", "queue_depth": 2, "graph_ticks": 8}


def fit(device: str = "cuda", evaluate: bool = True, **options: Any) -> RunResult:
    one = trainer(options.pop("engine", "sequential"), options.pop("rule", None), device=device, **options)
    return one.fit(TRAIN, eval_data=TEST if evaluate else None, epochs=2, batch_size=8, eval_batch_size=16)


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.mark.parametrize(
    "options",
    [
        STREAMS,
        {**STREAMS, "graphs": False},
        {**STREAMS, "graph_ticks": 0},
        {**STREAMS, "stages": 2},
        {**STREAMS, "stages": 1},
        {"engine": "streams", "stages": 1, "graphs": False},
    ],
)
def test_placement_and_graphs_change_no_bit(options: dict[str, Any]) -> None:
    expected, got = fit(), fit(**options)
    assert got.weights_sha256 == expected.weights_sha256
    assert figures(got) == figures(expected)


def test_what_is_asked_for_by_the_setting_gives_equal_bits() -> None:
    torch.backends.cudnn.deterministic = False
    digests = {fit(**options, deterministic=True).weights_sha256 for options in ({}, STREAMS, {**STREAMS, "stages": 2})}
    assert len(digests) == 1
    assert not torch.backends.cudnn.deterministic


def test_a_gpu_computes_what_a_cpu_does() -> None:
    """Within what float32 sums in another order make of 76 steps of Adam."""
    there, here = fit(**STREAMS), fit("cpu")
    assert abs(there.epochs[-1].train_loss - here.epochs[-1].train_loss) < 0.02 * here.epochs[-1].train_loss


@pytest.mark.parametrize("options", [{"precision": "tf32"}, {"precision": "bf16"}, {"kernels": "torch"}])
def test_every_precision_streams(options: dict[str, Any]) -> None:
    assert fit(**STREAMS, **options).weights_sha256 == fit(**options).weights_sha256


@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"compile": True}])
def test_backpropagation_in_a_graph_equals_plain_launches(options: dict[str, Any]) -> None:
    graph, plain = fit(rule="BP", **STREAMS, **options), fit(rule="BP", **options)
    assert graph.weights_sha256 == plain.weights_sha256
    assert figures(graph) == figures(plain)


def test_a_schedule_free_optimizer_survives_the_warm_up() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    options: dict[str, Any] = {"optimizer": partial(schedulefree.AdamWScheduleFree, lr=1e-2)}
    assert fit(**STREAMS, **options).weights_sha256 == fit(**options).weights_sha256


def test_a_resume_goes_on_exactly(tmp_path: Path) -> None:
    options: dict[str, Any] = {**STREAMS, "snapshot_every": 20, "snapshot_dir": tmp_path}
    whole = fit(**options)
    resumed = fit(**options, resume=tmp_path / "step-00000060")
    assert resumed.weights_sha256 == whole.weights_sha256
    assert figures(resumed)[-1] == figures(whole)[-1]


def test_a_trace_shows_every_action_in_order_and_stages_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    result = fit(**STREAMS, trace=path, evaluate=False)
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
    for k in range(len(result.stages)):
        mine = [e for e in events if e["tid"] == k]
        assert [e["name"] for e in mine] == [f"{k}{what}{m}" for m in range(76) for what in "FU"]
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1 for a, b in pairwise(mine))
        assert 0 < result.busy_fraction[k] <= 1
    begins = {e["name"]: e["ts"] for e in events}
    ends = {e["name"]: e["ts"] + e["dur"] for e in events}
    for m in range(76):  # an output is there before the next stage reads it
        assert all(begins[f"{k}F{m}"] < begins[f"{k + 1}F{m}"] for k in range(4))
    assert any(begins["1F20"] < ends[name] and begins[name] < ends["1U20"] for name in begins if name[0] != "1")


@pytest.mark.parametrize("kind", ["sms", "queues"])
def test_green_contexts_change_no_bit_or_say_why_not(kind: str) -> None:
    try:
        got = fit(**STREAMS, green_contexts=kind)
    except ValueError as error:
        assert "leave them off" in str(error)  # noqa: PT017
    else:
        assert got.weights_sha256 == fit().weights_sha256


@pytest.mark.parametrize("engine", ["sequential", "streams"])
def test_a_second_fit_goes_on_from_what_the_first_has_left_on_the_gpu(engine: str) -> None:
    one = trainer(engine, device="cuda")
    first = one.fit(TRAIN, epochs=1, batch_size=8)
    assert next(one.module.parameters()).is_cuda
    second = one.fit(TRAIN, epochs=1, batch_size=8)
    assert second.epochs[-1].train_loss < first.epochs[-1].train_loss
    assert one.predict(TEST.images[:3]).isfinite().all()


def test_a_model_that_lies_on_the_gpu_trains_as_one_that_does_not() -> None:
    expected, one = fit(), trainer("sequential", device="cuda")
    one.module.cuda()
    got = one.fit(TRAIN, eval_data=TEST, epochs=2, batch_size=8, eval_batch_size=16)
    assert got.weights_sha256 == expected.weights_sha256


def test_two_runs_in_one_process_leave_each_other_alone() -> None:
    first = fit(**STREAMS)
    assert fit(**STREAMS).weights_sha256 == first.weights_sha256
    assert len(first.peak_memory_bytes) == 5
