"""Runs that are cut, frozen, started wrongly or resumed elsewhere, with real ranks."""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import PIPELINE, free_port, mark_of, ranks, torchrun

from unlocked.comparison.chaos.tree import Tree
from unlocked.data import load_dataset
from unlocked.launch import evaluate
from unlocked.launch.pipeline import main
from unlocked.runtime.control.ending import Verdict
from unlocked.runtime.control.presence import lost_in_set_up
from unlocked.runtime.control.world import World
from unlocked.runtime.engines.processes.roll_call import RollCall
from unlocked.runtime.schedules.schedule import stage_actions
from unlocked.runtime.schedules.stream import StreamPlan

pytestmark = pytest.mark.alone

ENDLESS = [str(PIPELINE), "--num-epochs", "100000", "--plain"]
SECONDS = 20  # in which everybody must be gone


def await_line(process: "subprocess.Popen[str]", pattern: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if re.search(pattern, line):
            return
    pytest.fail(f"rank 0 ended before it printed {pattern!r}")


def error_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.startswith("error")), "")


def test_a_killed_run_resumes_with_another_number_of_processes(tmp_path: Path) -> None:
    flags = ["--plain", "--dropout", "0.2", "--num-epochs", "4", "--batch-size", "100", "--snapshot-every", "7"]
    flags += ["--optimizer", "AdamW", "--training-mode", "LLS_M"]

    def folder(name: str) -> list[str]:
        return ["--save-path", str(tmp_path), "--experiment-name", name, "--summary", str(tmp_path / f"{name}.json")]

    assert main([*flags, *folder("whole")]) == 0
    with ranks(3, [str(PIPELINE), *flags, "--num-epochs", "100000", *folder("cut")]) as started:
        await_line(started[0], "^epoch 1/")
        started[2].kill()
        for process in started:
            process.communicate(timeout=SECONDS)
    kept = sorted(path.parent.name for path in (tmp_path / "cut" / "snapshots").glob("*/manifest.json"))
    assert kept
    # It may have run on beyond the whole run's end before the kill, so an early snapshot is taken.
    resume = ["--resume", str(tmp_path / "cut" / "snapshots" / kept[0])]
    with ranks(2, [str(PIPELINE), *flags, *folder("cut"), *resume]) as started:
        texts = [process.communicate(timeout=60)[1] for process in started]
        assert [process.returncode for process in started] == [0, 0], texts
    whole, resumed = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "cut"))
    assert len(resumed["stages"]) == 2
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert resumed["epoch_results"] == whole["epoch_results"][-len(resumed["epoch_results"]) :]
    assert resumed["steps"] == whole["steps"] == 60
    assert resumed["epochs"] == whole["epochs"] == 4
    assert resumed["first_step"] == int(kept[0].removeprefix("step-"))
    assert resumed["threads"] == [1, 1]
    assert not any("threads" in text for text in texts), texts


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_frozen_worker_is_named_by_all_and_ends_when_it_wakes(victim: int) -> None:
    """Also by those whose own neighbour only waits for it."""
    with ranks(3, [*ENDLESS, "--timeout", "6"]) as started:
        await_line(started[0], "^epoch 1/")
        began = time.monotonic()
        started[victim].send_signal(signal.SIGSTOP)
        others = [process for rank, process in enumerate(started) if rank != victim]
        texts = [process.communicate(timeout=2 * SECONDS)[1] for process in others]
        assert time.monotonic() - began < 2 * SECONDS
        assert all(process.returncode == 1 for process in others), texts
        named = [line for text in texts for line in text.splitlines() if line.startswith("error")]
        assert named, texts
        assert all(f"stage {victim} (rank {victim}: " in line for line in named), texts
        assert all("for 3 s" in line for line in named), texts
        started[victim].send_signal(signal.SIGCONT)
        woken = started[victim].communicate(timeout=SECONDS)[1]
        assert started[victim].returncode != 0
        assert f"stage {victim} (rank {victim}: " in error_line(woken)


def test_other_flags_in_one_rank_end_all(tmp_path: Path) -> None:
    other = ["--batch-size", "32", "--lr", "0.5", "--training-mode", "DRTP", "--optimizer", "SGD", "--milestone", "3"]
    with ranks(2, [str(PIPELINE), "--plain"], extra={1: other}) as started:
        texts = [process.communicate(timeout=60)[1] for process in started]
    assert all(process.returncode not in (0, None) for process in started), texts
    line = error_line(texts[0])
    assert "batch_size is 32 in rank 1 and 64 in rank 0" in line
    assert "rule is 'DRTP' in rank 1 and \"LLS(" in line
    assert "optimizer is 'SGD(" in line
    assert "learning rate is [0.5] in rank 1 and [0.01] in rank 0" in line
    assert "learning-rate schedule is 'MultiStepLR(milestones=(3,), gamma=" in line
    assert not any("Traceback" in text for text in texts), texts


def test_a_damaged_snapshot_ends_the_rank_that_does_not_read_it_too(tmp_path: Path) -> None:
    flags = ["--plain", "--max-steps", "4", "--snapshot-every", "2", "--save-path", str(tmp_path)]
    assert main([*flags, "--experiment-name", "one"]) == 0
    (tmp_path / "one" / "snapshots" / "step-00000002" / "layer-004-output.pt").write_bytes(b"no weights")
    resume = ["--resume", str(tmp_path / "one" / "snapshots" / "step-00000002"), "--experiment-name", "two"]
    with ranks(2, [str(PIPELINE), *flags, *resume]) as started:
        texts = [process.communicate(timeout=60)[1] for process in started]
    assert all(process.returncode not in (0, None) for process in started), texts
    assert all("layer-004-output.pt is damaged" in error_line(text) for text in texts), texts
    assert not any("Traceback" in text for text in texts), texts


def test_files_of_a_run_of_processes(tmp_path: Path) -> None:
    flags = ["--plain", "--max-steps", "30", "--stages", "0-2,3-4", "--save-path", str(tmp_path), "--save-best-model"]
    files = ["--experiment-name", "one", "--summary", str(tmp_path / "s.json"), "--trace", str(tmp_path / "t.json")]
    with ranks(2, [str(PIPELINE), *flags, *files]) as started:
        texts = [process.communicate(timeout=60)[1] for process in started]
        assert [process.returncode for process in started] == [0, 0], texts
    summary = json.loads((tmp_path / "s.json").read_text())
    assert summary["stages"] == [["conv1", "conv2", "conv3"], ["linear1", "output"]]
    assert (summary["steps"], summary["epochs"], len(summary["busy_fraction"])) == (30, 2, 2)
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["tid"] for event in spans} == {0, 1}
    assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in spans)
    train, test = load_dataset("digits")
    plan = StreamPlan(
        epochs=10, train_size=len(train), batch_size=64, eval_size=len(test), eval_batch_size=128, max_steps=30
    )
    for k in (0, 1):  # one row per stage with the schedule's actions, and a busy fraction of the same times
        mine = [event for event in spans if event["tid"] == k]
        assert [event["name"] for event in mine] == [str(a) for a in stage_actions(k, 2, plan.items())]
        busy = 1e-6 * sum(event["dur"] for event in mine if event["cat"] not in ("RECV", "SEND"))
        # `train_seconds` is the slower stage's; a stage's own share is of its own time.
        assert busy / summary["train_seconds"] <= 1.001 * summary["busy_fraction"][k] <= 1.001
    for name in ("train.log", "metrics.csv", "config.json", "model_final.pt", "best/model_best.pt"):
        assert (tmp_path / "one" / name).is_file(), name
    assert evaluate.main([str(tmp_path / "one" / "best" / "model_best.pt"), "--summary", str(tmp_path / "b.json")]) == 0
    scored, best = json.loads((tmp_path / "b.json").read_text()), max(summary["epoch_results"], key=_accuracy)
    assert (scored["test_acc1"], scored["test_loss"]) == (best["test_acc1"], best["test_loss"])


def _accuracy(epoch: dict) -> float:
    return float(epoch["test_acc1"])


def test_a_signal_to_torchrun_ends_all_in_order(tmp_path: Path) -> None:
    summary = tmp_path / "s.json"
    with torchrun(2, [*ENDLESS, "--summary", str(summary)]) as process:
        await_line(process, "^epoch 1/")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SECONDS)
        assert process.returncode != 0
        assert is_gone(process)
    assert json.loads(summary.read_text())["stopped_by"] is not None


def test_a_worker_killed_under_torchrun_is_named() -> None:
    victim = 1
    with torchrun(2, ENDLESS) as process:
        await_line(process, "^epoch 1/")
        os.kill(worker_pid(process.pid, victim), signal.SIGKILL)
        text = process.communicate(timeout=SECONDS)[1]
        assert process.returncode != 0
        assert is_gone(process)
    assert f"stage {victim} (rank {victim}: " in error_line(text), text


def worker_pid(launcher: int, rank: int) -> int:
    children = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    mine = [int(pid) for pid, parent in map(str.split, children.splitlines()) if int(parent) == launcher]
    return sorted(mine)[rank]  # the agent starts its workers in the order of their ranks


def is_gone(launcher: subprocess.Popen[str]) -> bool:
    """The launcher has ended, and all that it has started ends with it."""
    return sys.platform != "linux" or Tree(mark_of(launcher)).is_gone(2)


def test_the_roll_call_notices_a_death_and_ignores_strangers() -> None:
    import socket

    port = free_port()
    world = World(rank=0, size=2, local_rank=0, local_size=2, master_address="127.0.0.1", master_port=port)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
    lost: queue.Queue[Verdict] = queue.Queue()
    roll_call = RollCall(store, world, lost.put)
    place = json.loads(store.get("roll-call"))
    where = (place["host"], place["port"])
    with socket.create_connection(where) as stranger:
        stranger.sendall(bytes(20))
    strangers = [socket.create_connection(where, timeout=SECONDS) for _ in range(60)]
    assert strangers[0].recv(1) == b"", "the eldest of too many silent strangers has to go"
    code = f"""
import torch.distributed as dist
from unlocked.runtime.control.world import World
from unlocked.runtime.engines.processes.roll_call import answer_roll_call
store = dist.TCPStore("127.0.0.1", {port}, 2, is_master=False, wait_for_workers=False)
held = answer_roll_call(store, World(1, 2, 1, 2, "127.0.0.1", {port}), 20.0)
print("here", flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "here\n"
        assert lost.empty()
        child.kill()
    assert lost.get(timeout=SECONDS) == lost_in_set_up(1)
    for one in strangers:
        one.close()
    roll_call.release()
