"""The benchmarks without a GPU: they start, refuse clearly, count a step's kernels, and predict from the counts."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from unlocked.kernels import cpp, reference

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = (
    *("ahead_of_time", "channel_division", "coordinator_load", "cpu_step", "data_input", "host_per_tick"),
    *("own_networks", "pipeline_scaling", "plain_lls", "kernels", "models", "plain_reproduce", "predict"),
    *("recovery", "reproduce", "rule_costs", "scale", "single_gpu", "snapshots", "start_up", "two_checkouts"),
    *("precision", "winograd", "zero_lock", "language", "gpu_exact", "gpu_placements", "launches"),
)

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )


HELP = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv, sys.path[0] = [path, "--help"], path.rpartition("/")[0]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as left:
        print("left with", left.code)
"""


def test_help() -> None:
    """Of all in one process, which imports torch once."""
    command = [sys.executable, "-c", HELP, *(str(BENCHMARKS / f"{script}.py") for script in SCRIPTS)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    for script, printed in zip(SCRIPTS, result.stdout.split("left with 0\n"), strict=False):
        assert f"usage: {script}.py" in printed, script
    assert result.stdout.count("left with 0\n") == len(SCRIPTS), result.stdout


@no_gpu
@pytest.mark.parametrize("script", ["kernels", "single_gpu"])
def test_without_a_gpu_one_line_says_so(script: str) -> None:
    result = run(script, *(["--quick"] if script == "kernels" else []))
    assert result.returncode == 1
    assert "needs a CUDA device" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_host_time_of_the_streams_engine_is_measured(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    small = ["--stages", "2", "--graph-ticks", "4", "--steps", "20", "420", "--repeats", "1", "--skip"]
    assert load("host_per_tick").main([*small, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    found = report["microseconds_per_micro_batch"]
    assert all(math.isfinite(found[kind]) for kind in ("skip", "all"))  # differences of times: no more is sure
    calls = report["calls_per_micro_batch"]
    # A launch of four ticks, and an event that bounds the host; the stages' sums are read together, every 50th
    # micro-batch; and between two launches nothing waits for anything.
    assert calls["Graph.replay"] == pytest.approx(1 / 4)
    assert calls["Event.record"] == pytest.approx(1 / 4 + 1 / 50 + 1 / (4 * 32), abs=0.01)
    assert calls.get("Stream.wait_stream", 0) == 0


def test_what_a_snapshot_costs_the_stage_is_measured(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    small = ["--model", "SmallConv", "--batch-size", "4", "--steps", "6", "--every", "2", "--repeats", "1"]
    assert load("snapshots").main([*small, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert all(seconds > 0 for seconds in found["median_kept_seconds"].values())
    assert found["bytes"] > 100_000


SMALL = ("--device", "cpu", "--max-steps", "2", "--train-size", "12", "--compile-backend", "eager")


def test_every_contender_runs_where_there_is_no_gpu(load: Any, tmp_path: Path, capsys: Any) -> None:
    """All but the CUDA calls of them, and of VGG8 one: it is a minute of work on a CPU."""
    single_gpu, path = load("single_gpu"), tmp_path / "results.json"
    names = [c.name for c in single_gpu.CONTENDERS if c.model == "SmallConv"] + ["VGG8 LLS streams"]
    assert single_gpu.main([*SMALL, "--in-process", "--rounds", "1", "--json", str(path), "--only", *names]) == 0
    report = json.loads(path.read_text())
    for name in names:
        (result,) = report["runs"][name]
        if any(word in name for word in ("green", "C++", "joined")):
            assert "no CPU form" in result["skipped"]
        else:
            assert result["steps"] == 2
            assert result["us_per_step"] > 0
            assert result["peak_allocated_mib"] > 0
    # What differs in speed alone gives the same weights; a rule, an end-to-end gradient or a precision does not.
    weights = {name: runs[0].get("weights_sha256") for name, runs in report["runs"].items()}
    same = ("LLS streams", "LLS streams, traced", "LLS sequential plain", "LLS streams fp32", "LLS streams, no graphs")
    assert len({weights[name] for name in same}) == 1
    assert len({weights[name] for name in ("LLS streams", "LLS_MxM streams", "BP graph", "LLS streams bf16")}) == 4
    assert 0 <= report["runs"]["LLS streams, traced"][0]["overlapped"] < 0.01  # one after the other on a CPU
    printed = capsys.readouterr().out
    assert "x the images/s of BP graph" in printed
    assert report["predicted"]["BP graph"]["floor_us"] < report["predicted"]["BP graph"]["us_per_step"]


@pytest.mark.alone
def test_a_contender_that_fails_or_hangs_does_not_stop_the_others(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real processes: one that fails, one that is out of time, one that trains; the report is there after each."""
    single_gpu, path = load("single_gpu"), tmp_path / "results.json"
    contenders = [
        single_gpu.Contender(name="fails", model="nonsense"),
        single_gpu.Contender(name="hangs", budget=0.01),
        single_gpu.Contender(name="trains", options={}, rounds=2, budget=100.0),
    ]
    monkeypatch.setattr(single_gpu, "CONTENDERS", contenders)
    monkeypatch.setattr(single_gpu, "predicted", lambda contender: None)
    written = []
    monkeypatch.setattr(single_gpu, "_write", lambda path, report: written.append(json.loads(json.dumps(report))))
    monkeypatch.setattr(single_gpu, "_LEAST", 1.0)
    assert single_gpu.main([*SMALL, "--rounds", "1", "--time-limit", "100", "--json", str(path)]) == 0
    assert len(written) == 3
    assert written[0]["runs"]["trains"] == []
    runs = written[-1]["runs"]
    assert "nonsense" in runs["fails"][0]["error"]
    assert "out of time" in runs["hangs"][0]["error"]
    assert runs["trains"][0]["steps"] == 2
    assert single_gpu.main([*SMALL, "--time-limit", "0", "--json", str(path)]) == 0
    assert {r["skipped"] for runs in written[-1]["runs"].values() for r in runs} == {"no time was left"}


def test_overlap_is_the_share_of_stage_time_in_company(load: Any) -> None:
    overlap = load("single_gpu").overlap

    def event(begin: float, end: float, row: int) -> dict[str, Any]:
        return {"ph": "X", "ts": begin, "dur": end - begin, "tid": row}

    alone = [event(0, 10, 0), event(10, 30, 1)]
    assert overlap(alone) == 0
    # [0, 10) one, [10, 20) two, [20, 25) three, [25, 30) one: 20 + 15 of 50 microseconds in company.
    some = [event(0, 25, 0), event(10, 30, 1), event(20, 25, 2), {"ph": "M", "tid": 0}]
    assert overlap(some) == pytest.approx(35 / 50)


@no_gpu
def test_contenders_agree_with_the_reference() -> None:
    result = run("kernels", "--check", "--only", "local", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "0 wrong on cpu"
    for contender in ("triton", "eager", "hand"):
        assert f" {contender} " in result.stdout


def test_check_finds_a_wrong_contender(load: Any) -> None:
    kernels, cases = load("kernels"), load("kernel_cases")
    right, wrong = torch.arange(4.0), torch.tensor([0.0, 1.0, 2.0, float("nan")])
    case = cases.Case("op", "4", 16, 4, {"reference": lambda i: lambda: (right,), "bad": lambda i: lambda: (wrong,)})
    assert kernels.check(case, ["bad"]) == {"bad": float("inf")}
    assert kernels.check_all(iter([case]), torch.device("cpu")) == 1


def test_a_layer_of_lls_is_six_kernels_of_ours(load: Any) -> None:
    trace = load("step_trace").trace_local("SmallConv", 64)
    assert trace.fused == [True] * 5
    conv2 = [node.name for node in trace.stages[1] if node.kind == "fused"]
    assert conv2 == [
        "norm_act_forward: reduction",
        "norm_act_forward: pass",
        "local_head",
        "norm_act_backward: reduction",
        "norm_act_backward: pass",
        "optimizer (Adam)",
    ]
    (forward,) = [node for node in trace.stages[1] if node.name == "convolution forward"]
    assert forward.flops == 2 * 64 * 16 * 16 * 64 * 32 * 9
    assert forward.bytes == 4 * (64 * 32 * 16 * 16 + 64 * 64 * 16 * 16 + 64 * 32 * 9)


def test_a_fourth_channel_adds_nothing(load: Any) -> None:
    single_gpu = load("single_gpu")
    train, _ = single_gpu._load("synthetic", Path("datasets"), 3)
    four = single_gpu.with_fourth_channel(train)
    assert four.image_shape == (4, *train.image_shape[1:])
    assert torch.equal(four.images[:, :3], train.images)
    order, zero = torch.arange(3), torch.zeros((), dtype=torch.int64)
    options = {"seed": 0, "epoch": zero, **four.batch_options()}
    values, _ = reference.load_batch(four.images, four.labels, order, zero, 3, **options)
    assert torch.equal(values[:, 3], torch.zeros_like(values[:, 3]))


def test_the_report_of_ptxas_is_read(load: Any) -> None:
    log = (
        "ptxas info    : Compiling entry function 'first' for 'sm_90a'\n"
        "ptxas info    : Function properties for first\n"
        "    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 44 registers, used 1 barriers, 8192 bytes smem\n"
        "ptxas info    : Compiling entry function 'second' for 'sm_90a'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 32 registers, used 0 barriers\n"
    )
    first, second = load("ahead_of_time").parse_ptxas(log)
    assert first == {"name": "first", "registers": 44, "spills": 12, "stack": 16, "shared_bytes": 8192}
    assert second == {"name": "second", "registers": 32, "spills": 0, "stack": 0, "shared_bytes": 0}


def test_the_plain_baseline_computes_what_the_runtime_does(load: Any) -> None:
    """Same weights, two steps, the same losses in every layer: the baseline is slower, not different."""
    plain = load("plain_lls").PlainLLS()
    operations = load("cpu_operations")
    layers = operations.build_layers("torch")
    for block, layer in zip([*plain.blocks, plain.output], layers, strict=True):
        ours = list(layer.block.parameters())
        for theirs, weight in zip(block.parameters(), ours, strict=True):
            theirs.data.copy_(weight.data)
    images, labels = operations.batch()
    # Adam's first step turns rounding noise in gradients of nearly zero into whole steps.
    for tolerance in (1e-5, 1e-2):
        expected = plain.step(images.contiguous(), labels)
        x = images
        for layer, loss in zip(layers, expected, strict=True):
            x = layer.forward(x)
            layer.totals.zero_()
            layer.update(labels)
            assert float(layer.totals[0]) / len(labels) == pytest.approx(float(loss), rel=tolerance)


@pytest.mark.skipif(bool(cpp.unavailable("cpu")), reason="no C++ backend")
def test_cpu_step_takes_a_step_apart(tmp_path: Path) -> None:
    report = tmp_path / "cpu.json"
    arguments = [
        "--only",
        "ladder",
        "operations",
        "surroundings",
        "--threads",
        "1",
        "--repeats",
        "1",
        "--steps",
        "1",
        "--json",
        str(report),
    ]
    result = run("cpu_step", *arguments, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    content = json.loads(report.read_text())
    assert next(iter(content["ladder"])) == "plain autograd"
    assert all(seconds > 0 for values in content["ladder"].values() for seconds in values)
    rows = {(row["layer"], row["operation"]): row for row in content["operations"]["rows"]}
    # conv2: 64 images of 16 x 16 pixels, 32 channels to 64, 3 x 3 taps, two operations a tap
    assert rows["conv2", "convolution"]["operations"] == 2 * 64 * 256 * 32 * 64 * 9
    assert {layer for layer, _ in rows} == {"conv1", "conv2", "conv3", "linear1", "output"}
    (around,) = content["surroundings"]
    assert {len(values) for values in around["milliseconds"].values()} == {1}


def test_a_loss_curve_takes_means_apart(load: Any) -> None:
    from unlocked.runtime.metrics.records import StageProgress

    models = load("models")
    curve = models.LossCurve(20)
    common = {"stage": 0, "position": 0, "epoch": 0, "busy_seconds": 0.0, "wait_seconds": 0.0, "seconds": 0.0}
    for images, mean in [(10, ()), (20, (("a", 3.0),)), (33, (("a", 3.0),)), (60, (("a", 2.0),))]:
        curve.on_progress(StageProgress(images=images, local_losses=mean, **common))
    assert curve.intervals() == [
        {"from": 0, "to": 20, "losses": {"a": 3.0}},
        {"from": 20, "to": 60, "losses": {"a": 1.5}},
    ]


def test_a_start_is_timed(load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "start_up.json"
    assert load("start_up").main(["--repeats", "2", "--only", "unlocked --help", "--json", str(path)]) == 0
    assert "unlocked --help" in capsys.readouterr().out
    (pairs,) = json.loads(path.read_text())["wall and processor seconds"].values()
    assert len(pairs) == 2
    assert all(processor > 0 for _, processor in pairs)


def test_the_best_division_by_channels_is_found(load: Any) -> None:
    """By hand: a whole and half of b take 4, the other half and c take 3; undivided, b and c take 5."""
    division = load("channel_division")
    times = {"a": {16: 1.0, 32: 2.0}, "b": {16: 2.0, 32: 4.0}, "c": {division.WHOLE: 1.0}}
    assert division.undivided(times, 2) == 5.0
    best, cuts = division.divided(times, 2)
    assert best == pytest.approx(4.0)
    assert cuts == ["16 channels of b in process 0", "16 channels of b in process 1"]
    assert division.divided(times, 1)[0] == pytest.approx(7.0)
