"""Law 5: nobody hangs. Workers die, freeze or fail, and the others end within seconds with the cause on top."""

import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from ranks import PIPELINE, free_port, ranks

from unlocked.launch import pipeline
from unlocked.launch.pipeline import main
from unlocked.runtime.control.ending import Verdict
from unlocked.runtime.control.set_up import SetUp

pytestmark = pytest.mark.alone

KILLS = int(os.environ.get("UNLOCKED_KILLS", "3"))  # 20 for the long check
ENDLESS = ["--dataset", "synthetic", "--num-epochs", "1000", "--plain", "--no-eval", "--print-freq", "2"]
NAMED = ["--experiment-name", "run", "--save-path"]


def first_error(texts: list[str]) -> str:
    return next(line for text in texts for line in text.splitlines() if line.startswith("error"))


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_worker_ends_all(number: int, tmp_path: Path) -> None:
    size = 2 + number % 2
    victim = number % size
    moment = random.Random(number).uniform(0.0, 1.0)
    with ranks(size, [str(PIPELINE), *ENDLESS, *NAMED, str(tmp_path)]) as started:
        await_start(tmp_path)
        # A random moment of the run: it moves with the machine's load, which is what is wanted.
        deadline = time.monotonic() + moment
        while time.monotonic() < deadline:
            assert all(process.poll() is None for process in started)
            time.sleep(0.01)
        started[victim].send_signal(signal.SIGKILL)
        began = time.monotonic()
        texts = [process.communicate(timeout=10)[1] for process in started]
        assert time.monotonic() - began < 10
    codes = [process.returncode for process in started]
    assert codes[victim] == -signal.SIGKILL
    assert all(code == 1 for rank, code in enumerate(codes) if rank != victim), texts
    others = [text for rank, text in enumerate(texts) if rank != victim]
    assert f"stage {victim} (rank {victim}: " in first_error(others), others


def await_start(folder: Path) -> None:
    """Until the last stage has reported its first micro-batches: before, only a launcher can know of a death."""
    log = folder / "run" / "train.log"
    deadline = time.monotonic() + 120
    while not (log.exists() and "Epoch: [0]" in log.read_text()):
        assert time.monotonic() < deadline, "the run did not begin"
        time.sleep(0.05)


def test_a_non_finite_loss_names_layer_epoch_and_micro_batch() -> None:
    flags = ["--optimizer", "SGD", "--lr", "1e38", "--num-epochs", "1", "--plain"]
    with ranks(2, [str(PIPELINE), *flags]) as started:
        texts = [process.communicate(timeout=60)[1] for process in started]
    assert all(process.returncode not in (0, None) for process in started)
    line = first_error(texts)
    assert "the loss of layer" in line
    assert "epoch 0" in line
    assert "micro-batch" in line
    assert not any("Traceback" in text for text in texts)


def test_a_taken_coordinator_port_ends_every_rank() -> None:
    import socket

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with ranks(2, [str(PIPELINE), "--coordinator-port", str(port), "--plain"]) as started:
            texts = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], texts
    assert all(f"port {port}" in text and "taken" in text and "Traceback" not in text for text in texts), texts


def test_a_taken_master_port_ends_every_rank() -> None:
    import socket

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with ranks(2, [str(PIPELINE), "--plain"], port=port) as started:
            texts = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], texts
    assert all(str(port) in text and "MASTER_PORT" in text and "Traceback" not in text for text in texts), texts


@pytest.mark.parametrize(
    ("size", "flags", "words"),
    [(6, (), "6 processes for the 5 layers"), (2, ("--stages", "3"), "3 stages need 3 processes")],
)
def test_more_processes_than_layers_and_a_wrong_number_of_stages(
    size: int, flags: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every rank sees it before it meets the others, so none has to be started: nobody listens at the port."""
    world = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for rank in range(size):
        for name, value in {**world, "RANK": rank, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, str(value))
        assert main(["--plain", "--engine", "processes", *flags]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_all_ranks_in_order(number: signal.Signals, code: int, tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    with ranks(2, [str(PIPELINE), *ENDLESS, *NAMED, str(tmp_path), "--summary", str(summary)]) as started:
        await_start(tmp_path)
        started[1].send_signal(number)
        outputs = [process.communicate(timeout=30) for process in started]
    assert [process.returncode for process in started] == [code, code], outputs
    assert f"stopped by signal {int(number)}" in outputs[0][0]
    assert summary.exists()


@pytest.mark.parametrize(("is_over", "moment"), [(True, ""), (False, " in set-up")])
def test_an_error_that_names_nobody_names_its_rank(
    is_over: bool, moment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as a descriptor that a process can't have, wherever it asked for it."""
    words: list[Verdict] = []
    set_up = SimpleNamespace(is_over=is_over, leave_word=words.append)
    assert pipeline._complain(0, OSError(24, "Too many open files"), 1, cast(SetUp, set_up)) == 1
    told = f"stage 0 (rank 0: layers unknown) failed{moment}: [Errno 24] Too many open files"
    assert capsys.readouterr().err == f"error: {told}\n"
    assert words == [Verdict(told, 1)]
