"""`Processes` outside torchrun: a script's run starts its own workers, and everything comes back to the caller."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unlocked.rules import LLS
from unlocked.runtime import MetricsSink, Processes, RunResult, Trainer
from unlocked.runtime.control.messages import RunFailed

SCRIPT = Path(__file__).with_name("spawning_script.py")

pytestmark = pytest.mark.alone


def run(what: str, folder: Path) -> dict[str, Any]:
    """From a folder that Python does not look for modules in."""
    out = folder / "out.json"
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), what, str(out)],
        cwd=folder,
        env=clean,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_three_processes_leave_a_plain_model_with_the_bits_of_the_loop(tmp_path: Path) -> None:
    for name, found in run("exact", tmp_path).items():
        assert found["digests"][0] == found["digests"][1], name
        assert found["test_loss"][0] == found["test_loss"][1], name
        assert found["equal_logits"], name
        assert found["stages"] == 3, name
        assert found["kind"] == {"resnet": "ResNet"}.get(name, "Sequential"), name


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_script_goes_on_listens_nowhere_and_stops_in_order(tmp_path: Path) -> None:
    found = run("sockets", tmp_path)
    # The last number is drawn afterwards: a shuffling loader has moved the global generator as it would in one process.
    processes, alone = found["digests"]
    assert processes == alone
    assert found["heard"] == ["start", "epoch", "finish", "close"] * 2
    assert not found["open"]
    assert found["stopped_by"] == 2
    assert 0 < found["stopped_steps"] < 600_000
    assert found["children"] == 0


@pytest.mark.parametrize("name", ["a#b", "x" * 110], ids=["#", "long"])
def test_any_temporary_folder_will_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands between an address and its key may be part of a path, and a socket's path is short."""
    with tempfile.TemporaryDirectory(prefix="un-", dir="/tmp") as short:
        folder = Path(short) / name
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        monkeypatch.setenv("TMPDIR", str(folder))
        results = []
        for engine in (Processes(stages=2), "sequential"):
            torch.manual_seed(0)
            network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
            optimizer = partial(torch.optim.SGD, lr=0.1)
            trainer = Trainer(network, rule=LLS(), optimizer=optimizer, engine=engine, threads=1)
            results.append(trainer.fit((torch.rand(16, 12), torch.arange(16) % 3), epochs=1, batch_size=8))
        assert results[0].weights_sha256 == results[1].weights_sha256


class Breaks(nn.Module):
    """In a worker, after some micro-batches; here it only computes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.how, self.calls = how, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += "RANK" in os.environ
        if self.calls == 30:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            print("the thirtieth call")
            raise KeyError("no such word")
        return torch.relu(self.linear(x))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 8, generator=generator), torch.randint(0, 4, (64,), generator=generator)


def fit(how: str, samples: Any = None, rule: Any = None, **options: Any) -> RunResult:
    torch.manual_seed(0)
    model = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()), Breaks(how), nn.Linear(8, 4)]
    optimizer = partial(torch.optim.SGD, lr=0.1)
    # One recovery: each later worker saves itself anew, and would come further than the one before it.
    engine = Processes(stages=2, max_recoveries=1)
    one = Trainer(model, rule=rule or LLS(), optimizer=optimizer, engine=engine, **options)
    if samples is None:
        return one.fit(data(), epochs=20, batch_size=8)
    return one.fit(samples, epochs=1, steps_per_epoch=4)


def test_a_layer_that_fails_is_named_and_its_own_traceback_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    told = r"^stage 1 \(rank 1: breaks2, linear3\) failed in 1F\d+ \(epoch \d, train micro-batch \d\): 'no such word'"
    with pytest.raises(RunFailed, match=told) as found:
        fit("raises")
    (note,) = found.value.__notes__
    assert 'raise KeyError("no such word")' in note
    assert capsys.readouterr() == ("the thirtieth call\n", "")


def test_a_worker_that_is_killed_is_named_and_the_caller_lives(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunFailed, match=r"^stage 1 \(rank 1: breaks2, linear3\) is lost"):
        fit("killed")
    assert not capsys.readouterr().err


def endless() -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield data()[0][:8], data()[1][:8]


def test_what_cannot_be_sent_is_named_in_one_line() -> None:
    lock = threading.Lock()
    instead = r"[^;]*; leave out of it .* or use engine 'streams' or 'sequential', which run in this process$"
    with pytest.raises(ValueError, match=r"^the rule \(function\) can't be sent .*lock" + instead):
        fit("", rule=lambda info: (lock, LLS()(info))[1])
    with pytest.raises(ValueError, match=r"^the training data \(an iterator\) can't be sent .*generator" + instead):
        fit("", samples=endless())


def test_a_sink_that_refuses_the_start_stops_the_run_with_its_own_error() -> None:
    class Refusing(MetricsSink):
        def on_start(self, info: object) -> None:
            raise LookupError("no room for figures")

    with pytest.raises(LookupError, match="no room for figures"):
        fit("", sinks=[Refusing()])


def children() -> list[str]:
    """Of this process; a thread of it may end while it is looked at."""
    found: list[str] = []
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with contextlib.suppress(OSError):
            found += (task / "children").read_text().split()
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_that_stand_still_are_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped before they take their job, which is larger than a socket holds."""
    samples = torch.randn(4000, 500), torch.arange(4000) % 4
    trainer = Trainer(
        [nn.Linear(500, 8), nn.Linear(8, 4)],
        rule=LLS(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        engine=Processes(stages=2, start_timeout=1),
    )
    over = threading.Event()

    def stop_all() -> None:
        stopped: set[str] = set()
        while not over.is_set():
            for pid in set(children()) - stopped:
                # Not before it is a program of its own: until then the one that starts it waits for it.
                with contextlib.suppress(OSError):
                    if b"processes.spawned" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        os.kill(int(pid), signal.SIGSTOP)
                        stopped.add(pid)

    stopping = threading.Thread(target=stop_all)
    stopping.start()
    try:
        with pytest.raises(RunFailed, match=r"the process of stage 0 \(rank 0\) stands still: .* within 1 s"):
            trainer.fit(samples, epochs=1, batch_size=64)
    finally:
        over.set()
        stopping.join()
    assert not capsys.readouterr().err


def test_more_stages_than_layers_are_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="4 stages for 3 layers; give at most 3"):
        Trainer(
            [nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)],
            rule=LLS(),
            optimizer=partial(torch.optim.SGD, lr=0.1),
            engine=Processes(stages=4),
        ).fit(data(), epochs=1, batch_size=8)
