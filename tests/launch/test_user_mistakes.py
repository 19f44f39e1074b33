"""Every mistake on the command line ends in one clear line and exit code 2, without a traceback."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import ENVIRONMENT, PIPELINE

from unlocked.launch.pipeline import main

SUMMARY_FIELDS = {
    *("engine", "stages", "model", "training_mode", "dataset", "epochs", "steps", "batch_size", "seed", "device"),
    *("torch", "train_seconds", "setup_seconds", "images_per_second", "test_acc1", "test_loss", "local_losses"),
    *("weights_sha256", "peak_memory_bytes", "busy_fraction"),
}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "ResNet"], ["'ResNet'", "SmallConv", "MobileNetV1"]),
        (["--dataset", "cifar"], ["'cifar'", "digits", "CIFAR10AUG"]),
        (["--training-mode", "LSS"], ["'LSS'", "LLS_MxM_reduced", "LocalLosses", "BP"]),
        (["--optimizer", "Adma"], ["'Adma'", "SGD, Adam"]),
        (["--engine", "threads"], ["'threads'", "sequential, streams, processes"]),
        (["--kernels", "metal"], ["'metal'", "auto, torch, triton, cuda"]),
        (["--waveform", "triangle"], ["'triangle'", "cosine, square"]),
        (["--lr-scheduler", "Step"], ["'Step'", "MultiStepLR"]),
        (["--lr", "much"], ["--lr", "'much'"]),
        (["--lr", "-1"], ["-1.0", "positive"]),
        (["--no-such-flag"], ["--no-such-flag"]),
        (["--batch-size", "2000"], ["2000", "1438"]),
        (["--engine", "streams", "--stages", "9"], ["9", "5"]),
        (
            ["--engine", "sequential", "--stages", "2"],
            ["sequential does not use --stages", "--engine streams or processes"],
        ),
        (["--training-mode", "BP", "--engine", "streams", "--stages", "2"], ["not local", "stages=2", "sequential"]),
        (["--device", "cuda:7"], ["cuda:7", "cpu"]),
        (["--kernels", "cuda"], ["'cuda'", "can't run on cpu"]),
        (["--temperature", "0"], ["temperature is 0", "positive"]),
        (["--snapshot-every", "5"], ["--save-path"]),
        (["--resume", "nowhere"], ["nowhere", "--snapshot-every"]),
        (["--engine", "streams", "--queue-depth", "0"], ["queue_depth is 0", "at least 1"]),
        (["--engine", "processes"], ["--stages", "torchrun"]),
        (["--max-steps", "0"], ["max_steps is 0"]),
        (["--gamma", "nan"], ["gamma is nan", "at least 0"]),
        (["--temperature", "inf"], ["temperature is inf", "positive"]),
        (["--dropout", "1"], ["dropout is 1.0", "below 1"]),
        (["--label-smoothing", "nan"], ["label_smoothing is nan", "below 1"]),
        (["--lr", "1e400"], ["lr is inf", "positive"]),
        (["--test-batch-size", "0"], ["test_batch_size is 0", "at least 1"]),
        (["--timeout", "inf"], ["timeout is inf", "at most"]),
        (["--prefetch", "1000000000000"], ["prefetch is 1000000000000", "at most 1024"]),
        (["--threads", "100000"], ["threads is 100000", "at most 1024"]),
        (["--seed", str(2**64)], [f"seed is {2**64}", f"at most {2**64 - 1}"]),
        (["--engine", "processes", "--coordinator-port", "70000"], ["coordinator_port is 70000", "at most 65535"]),
        (["--engine", "processes", "--start-timeout", "nan"], ["start_timeout is nan", "positive"]),
        (["--trace", "/"], ["trace / is a folder"]),
        (["--save-path", "/etc/passwd"], ["save_path /etc/passwd is a file"]),
        (["--save-path", "~nosuchuser/runs"], ["save_path is ~nosuchuser/runs", "no such user"]),
        (["--summary", "/etc/passwd/s.json"], ["summary /etc/passwd/s.json can't be written", "/etc/passwd is a file"]),
        (["--save-path", "runs", "--experiment-name", "../up"], ["experiment_name is '../up'", "one folder"]),
        (
            ["--batch-size", "1437"],
            ["layer linear1", "BatchNorm1d", "1438 training rows", "--drop-last", "1436", "1438"],
        ),
    ],
)
def test_a_mistake_is_one_line(flags: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plain", "--num-epochs", "1", *flags]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert len(text.splitlines()) == 1
    for word in words:
        assert word in text, text


def test_a_damaged_dataset_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(b"not a pickle")
    assert main(["--plain", "--dataset", "CIFAR10", "--dataset-dir", str(tmp_path)]) == 2
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1
    assert str(folder) in text


def test_summary_trace_log_and_best_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--num-epochs", "2", "--seed", "3", "--print-freq", "10", "--experiment-name", "one", "--plain"]
    files = ["--summary", str(tmp_path / "s.json"), "--trace", str(tmp_path / "t.json"), "--save-path", str(tmp_path)]
    engine = ["--engine", "streams", "--stages", "0-1,2-4", "--save-best-model", "--snapshot-every", "20"]
    assert main([*flags, *files, *engine]) == 0
    summary = json.loads((tmp_path / "s.json").read_text())
    assert set(summary) >= SUMMARY_FIELDS
    assert summary["stages"] == [["conv1", "conv2"], ["conv3", "linear1", "output"]]
    assert summary["steps"] == 46
    assert set(summary["local_losses"]) == {"conv1", "conv2", "conv3", "linear1", "output"}
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {e["tid"] for e in events if e["ph"] == "X"} == {0, 1}
    log = (tmp_path / "one" / "train.log").read_text()
    for form in ("Epoch: [0] [", "@Training * Acc@1", "@Testing * Acc@1", "Losses - L1: "):
        assert form in log
    assert (tmp_path / "one" / "model_final.pt").exists()
    assert (tmp_path / "one" / "best" / "model_best.pt").exists()
    assert (tmp_path / "one" / "metrics.csv").read_text().count("\n") == 3
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["settings"]["seed"] == 3
    capsys.readouterr()
    assert main([*flags, *files, "--max-steps", "1"]) == 0  # a second run of that name has a folder of its own
    assert f"saved in {tmp_path / 'one-2'}\n" in capsys.readouterr().out
    assert (tmp_path / "one" / "metrics.csv").read_text().count("\n") == 3
    assert main([*flags, *files, "--num-epochs", "3", "--resume", str(tmp_path / "one"), "--snapshot-every", "20"]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["steps"] == 69
    assert main([*flags[:2], "--plain", "--drop-last", *files[:2]]) == 0
    summary = json.loads((tmp_path / "s.json").read_text())
    assert (summary["steps"], summary["drop_last"]) == (44, True)


@pytest.mark.alone
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("engine", ["sequential", "streams"])
def test_a_signal_stops_in_order(engine: str, number: signal.Signals, code: int, tmp_path: Path) -> None:
    flags = ["--engine", engine, "--num-epochs", "10000", "--plain", "--summary", str(tmp_path / "s.json")]
    with subprocess.Popen(
        [sys.executable, str(PIPELINE), *flags], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch 1/"):
                break
        process.send_signal(number)
        output = process.communicate(timeout=30)[0]
    assert process.returncode == code
    assert f"stopped by signal {int(number)}" in output
    assert json.loads((tmp_path / "s.json").read_text())["stopped_by"] == number
