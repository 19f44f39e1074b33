"""The dashboard: fits every screen, reads well as plain lines, and can't hurt the run."""

import io
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from unlocked.runtime.metrics.dashboard import Dashboard
from unlocked.runtime.metrics.dashboard_view import StageView, View, bar, render, time_text
from unlocked.runtime.metrics.records import EpochResult, Meters, Rates, RunInfo, StageProgress, StepResult

TIMEOUT = 5.0


def info(stages: int, layers: int = 2) -> RunInfo:
    return RunInfo(
        model="SmallConv",
        dataset="digits",
        engine="processes",
        rule="LLS",
        stages=tuple(tuple(f"layer{s}.{i}" for i in range(layers)) for s in range(stages)),
        total=1000,
        epochs=5,
        steps_per_epoch=180,
        batch_size=64,
    )


def progress(stage: int, position: int, seconds: float = 1.0) -> StageProgress:
    return StageProgress(
        stage=stage,
        position=position,
        epoch=1,
        images=64 * position,
        busy_seconds=seconds / 2,
        wait_seconds=seconds / 2,
        seconds=seconds,
        queue_fill=0.5,
        local_losses=((f"layer{stage}.0", 1.875), (f"layer{stage}.1", float("nan"))),
    )


def epoch(number: int) -> EpochResult:
    return EpochResult(
        epoch=number,
        train_loss=0.5,
        train_acc1=81.25,
        train_acc5=99.0,
        eval_loss=0.75,
        eval_acc1=77.5,
        eval_acc5=97.5,
        local_losses=(("layer0.0", 1.5),),
        seconds=2.25,
    )


def frame(view: View, width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)
    console.print(render(view, view.began + 10.0, width=width, height=height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip("\n").split("\n")


def full_view(stages: int, layers: int, epochs: int) -> View:
    rates = Rates(images_per_second=123456.0, positions_per_second=10.0, busy=0.5)
    view = View(info(stages, layers), began=0.0, epochs=[epoch(i) for i in range(epochs)])
    view.stages = [StageView(progress(s, 500), rates) for s in range(stages)]
    return view


@settings(max_examples=40, deadline=None)
@given(
    stages=st.integers(1, 60),
    layers=st.integers(1, 4),
    epochs=st.integers(0, 6),
    width=st.integers(50, 200),
    height=st.integers(12, 60),
)
def test_every_frame_fits_its_screen(stages: int, layers: int, epochs: int, width: int, height: int) -> None:
    lines = frame(full_view(stages, layers, epochs), width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert any(line.startswith("stage") for line in lines)
    assert any(line.lstrip().startswith(f"{stages - 1} ") for line in lines), "the last stage must be in sight"


@settings(max_examples=10, deadline=None)
@given(stages=st.integers(1, 30), width=st.integers(50, 200), height=st.integers(12, 60))
def test_accuracies_of_layers_fit_too(stages: int, width: int, height: int) -> None:
    view = full_view(stages, 2, 1)
    view.accuracies = {layer: 98.76 for layers in view.info.stages for layer in layers}
    lines = frame(view, width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert any("98.8" in line for line in lines) == (width >= 90)


def test_small_terminal_shows_all_that_matters() -> None:
    text = "\n".join(frame(full_view(3, 2, 2), 80, 24))
    for part in ("SmallConv on digits", "LLS", "50%", "epoch 2/5", "123,456", "0:10 left", "layer1.0", "1.875"):
        assert part in text, part
    for part in ("81.25", "77.50", "2/5"):
        assert part in text, part


def test_stages_that_do_not_fit_are_counted() -> None:
    lines = frame(full_view(40, 1, 0), 80, 23)
    hidden = next(line for line in lines if "more stages" in line)
    shown = sum(line.lstrip().split(" ")[0].isdigit() for line in lines)
    assert shown + int(hidden.split()[1]) == 40


def test_view_before_any_progress() -> None:
    text = "\n".join(frame(View(info(2), began=0.0), 80, 24))
    assert "waiting" in text
    assert "--:-- left" in text


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "    "), (1.0, "████"), (0.5, "██  "), (7.0, "████"), (float("nan"), "    ")]
)
def test_bar(share: float, text: str) -> None:
    assert bar(share, 4) == text


def test_bar_has_eighths() -> None:
    assert bar(1 / 32, 4) == "▏   "


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (65.4, "1:05"), (3723, "1:02:03"), (float("inf"), "--:--"), (59.7, "1:00")]
)
def test_time_text(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


def play(dashboard: Dashboard) -> None:
    dashboard.on_start(info(2))
    for stage in range(2):
        dashboard.on_progress(progress(stage, 100, 1.0))
        dashboard.on_progress(progress(stage, 300, 2.0))
    meters = Meters(time=0.1, data=0.0, loss=1.25, acc1=60.0, acc5=90.0)
    dashboard.on_step(StepResult(epoch=0, step=1, steps=10, recent=meters, mean=meters))
    dashboard.on_message("stopping after position 300 [not markup]")
    dashboard.on_epoch(epoch(0))


def test_plain_lines() -> None:
    out = io.StringIO()
    dashboard = Dashboard(Console(file=out, width=80), plain_seconds=0.0)
    play(dashboard)
    deadline = time.monotonic() + TIMEOUT
    while not any("loss 1.2500" in line and " left" in line for line in out.getvalue().splitlines()):
        assert time.monotonic() < deadline, out.getvalue()
        time.sleep(0.01)
    dashboard.on_finish({"images_per_second": 1234.5})
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("SmallConv on digits | LLS | engine processes")
    assert "  stage 1: layer1.0, layer1.1" in lines
    assert "stopping after position 300 [not markup]" in lines
    assert any(line.startswith(" 30% | epoch 2/5 | 12,800 images/s | loss 1.2500 | acc1 60.00 |") for line in lines)
    expected = "epoch 1/5 | train loss 0.5000 acc1 81.25 acc5 99.00 | test loss 0.7500 acc1 77.50 acc5 97.50 | 2.25 s"
    assert any(line.startswith(expected) for line in lines)
    assert lines[-1] == "finished: 1,234 images/s over the run"
    assert "\x1b" not in out.getvalue()


def test_live_view_gives_the_terminal_back() -> None:
    out = io.StringIO()
    dashboard = Dashboard(Console(file=out, force_terminal=True, width=80, height=24))
    play(dashboard)
    dashboard.close()
    dashboard.close()
    text = out.getvalue()
    assert text.index("\x1b[?25l") < text.rindex("\x1b[?25h"), "the cursor must be shown again"
    assert "12,800" in text
    assert not dashboard.off


class BrokenTerminal(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError("terminal went away")


@pytest.mark.parametrize("terminal", [True, False])
def test_broken_terminal_turns_the_dashboard_off_once(terminal: bool, capsys: pytest.CaptureFixture[str]) -> None:
    dashboard = Dashboard(Console(file=BrokenTerminal(), force_terminal=terminal, width=80, height=24))
    play(dashboard)
    dashboard._thread.join(TIMEOUT)
    assert dashboard.off
    play_on = [lambda: dashboard.on_epoch(epoch(1)), lambda: dashboard.on_finish({"images_per_second": 1.0})]
    for call in play_on:
        call()
    assert capsys.readouterr().err.count("dashboard: off after OSError: terminal went away") == 1


class StuckTerminal(io.StringIO):
    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go_on = threading.Event(), threading.Event()

    def write(self, text: str) -> int:
        self.entered.set()
        self.go_on.wait()
        return super().write(text)


def test_stuck_terminal_does_not_hold_up_the_run() -> None:
    terminal = StuckTerminal()
    dashboard = Dashboard(Console(file=terminal, width=80))
    play(dashboard)
    assert terminal.entered.wait(TIMEOUT)
    done = threading.Event()

    def go_on() -> None:
        for position in range(1000):
            dashboard.on_progress(progress(0, position, 3.0 + position))
            dashboard.on_message("text")
        dashboard.close(timeout=0.05)
        done.set()

    threading.Thread(target=go_on, daemon=True).start()
    try:
        assert done.wait(TIMEOUT), "the sink waits for the terminal"
    finally:
        terminal.go_on.set()
        dashboard.close()


def test_the_demo_plays() -> None:
    command = [sys.executable, "-m", "unlocked.runtime.metrics.dashboard_demo", "--plain", "--stages", "2"]
    done = subprocess.run([*command, "--seconds", "0.5"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "2 stages" in done.stdout
    assert "epoch 5/5" in done.stdout
    assert "RuntimeWarning" not in done.stderr
