"""The live view of a run: a table on a terminal or in a notebook's cell, plain lines elsewhere.

It only watches. Records are stored under a short lock; one thread of its own draws, at most four times a second. If
drawing fails, the dashboard says so once and turns itself off. `python -m unlocked.runtime.metrics.dashboard_demo`
shows it.
"""

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping

from rich.console import Console
from rich.live import Live

from unlocked.runtime.metrics.dashboard_view import StageView, View, render, time_text
from unlocked.runtime.metrics.notebook import NotebookFrame, in_notebook
from unlocked.runtime.metrics.records import EpochResult, RunInfo, StageProgress, StepResult, rates_between
from unlocked.runtime.metrics.sinks import MetricsSink

__all__ = ["Dashboard"]

_FRAME_SECONDS = 0.25
_WINDOW_SECONDS = 3.0
"""Speeds are means over about this long."""


class Dashboard(MetricsSink):
    """A metrics sink for human eyes.

    Args:
        console: where to draw; default: standard output.
        plain: lines instead of a live table; default: unless the console is a terminal, or there is a notebook.
        plain_seconds: time between progress lines.
    """

    def __init__(
        self, console: Console | None = None, *, plain: bool | None = None, plain_seconds: float = 5.0
    ) -> None:
        self._in_notebook = console is None and in_notebook()
        self._console = console or Console(force_jupyter=False)
        self._plain = not (self._in_notebook or self._console.is_terminal) if plain is None else plain
        self._plain_seconds = plain_seconds
        self._lock = threading.Lock()
        self._lines: deque[str] = deque(maxlen=1000)  # of no use to anyone once drawing is off
        self._view: View | None = None
        self._history: dict[int, deque[StageProgress]] = {}
        self._last_line = ""
        self._closing = threading.Event()
        self._off = False
        self._thread: threading.Thread | None = None

    @property
    def off(self) -> bool:
        """True once drawing has failed and was given up."""
        return self._off

    def on_start(self, info: RunInfo) -> None:
        self.close()  # of a run before
        with self._lock:
            self._view = View(info, time.monotonic())
            self._history.clear()
        self._last_line = ""
        self._closing = threading.Event()
        if self._plain:
            self._lines.append(
                f"{info.model} on {info.dataset}{info.task_told} | {info.rule} | "
                f"engine {info.engine} on {info.device} | "
                f"{len(info.stages)} stages | {info.epochs} epochs of {info.steps_per_epoch} steps"
            )
            self._lines.extend(f"  stage {i}: {', '.join(layers)}" for i, layers in enumerate(info.stages))
            if info.start:
                self._lines.append(f"  resumed after {info.start / info.total:.0%} of the run")
        self._thread = threading.Thread(target=self._run, name="dashboard", daemon=True)
        self._thread.start()

    def on_progress(self, progress: StageProgress) -> None:
        with self._lock:
            if self._view is None or not 0 <= progress.stage < len(self._view.stages):
                return
            history = self._history.setdefault(progress.stage, deque())
            history.append(progress)
            while len(history) > 2 and progress.seconds - history[1].seconds >= _WINDOW_SECONDS:
                history.popleft()
            rates = rates_between(history[0], progress) if len(history) > 1 else None
            self._view.stages[progress.stage] = StageView(progress, rates)

    def on_step(self, step: StepResult) -> None:
        with self._lock:
            if self._view is not None:
                self._view.step = step

    def on_epoch(self, result: EpochResult) -> None:
        with self._lock:
            if self._view is None:
                return
            self._view.epochs = [*self._view.epochs[-49:], result]
            self._view.losses.update(result.local_losses)
            self._view.accuracies.update(result.layer_acc1)
            epochs = self._view.info.epochs
            self._view.complete = result.epoch + 1 >= epochs
        if self._plain:
            self._lines.append(_epoch_line(result, epochs))

    def on_message(self, text: str) -> None:
        self._lines.append(text)

    def on_finish(self, summary: Mapping[str, object]) -> None:
        speed = summary.get("images_per_second")
        if isinstance(speed, int | float):
            part = "since the resume" if summary.get("first_step") else "over the run"
            self._last_line = f"finished: {speed:,.0f} images/s {part}"
        self.close()

    def close(self, timeout: float = 2.0) -> None:
        """Draws a last time and gives the terminal back. Idempotent; call it before ending the process by force."""
        self._closing.set()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(timeout)

    # --- the drawing thread

    def _run(self) -> None:
        try:
            self._print_lines() if self._plain else self._draw_live()
        except Exception as error:  # a terminal can fail in any way; the run must not notice
            self._off = True
            with contextlib.suppress(Exception):
                print(f"dashboard: off after {type(error).__name__}: {error}", file=sys.stderr)

    def _draw_live(self) -> None:
        canvas = NotebookFrame() if self._in_notebook else Live(console=self._console, auto_refresh=False)
        with canvas as live:
            closing = False
            while not closing:
                closing = self._closing.wait(_FRAME_SECONDS)
                self._print_waiting()
                view = self._copy()
                width, height = NotebookFrame.size if self._in_notebook else self._console.size
                live.update(render(view, time.monotonic(), width=width, height=height - 1), refresh=True)
        self._print_last()

    def _print_lines(self) -> None:
        next_progress = time.monotonic() + self._plain_seconds
        closing = False
        while not closing:
            closing = self._closing.wait(_FRAME_SECONDS)
            self._print_waiting()
            now = time.monotonic()
            if now >= next_progress and not closing:
                next_progress = now + self._plain_seconds
                view = self._copy()
                if view.position > view.info.start:
                    self._print(_progress_line(view, now))
        self._print_last()

    def _copy(self) -> View:
        with self._lock:
            assert self._view is not None
            return self._view.copy()

    def _print_last(self) -> None:
        if self._last_line:
            self._print(self._last_line)

    def _print_waiting(self) -> None:
        while self._lines:
            self._print(self._lines.popleft())

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _progress_line(view: View, now: float) -> str:
    stage = view.stages[-1] or next(stage for stage in view.stages if stage is not None)
    parts = [
        f"{view.done:4.0%}",
        f"epoch {stage.progress.epoch + 1}/{view.info.epochs}",
        f"{view.images_per_second:,.0f} images/s",
    ]
    if view.step is not None:
        parts.append(f"loss {view.step.mean.loss:.4f}")
        if view.step.mean.acc1 is not None:
            parts.append(f"acc1 {view.step.mean.acc1:.2f}")
    parts.append(f"{time_text(view.seconds_left(now))} left")
    return " | ".join(parts)


def _epoch_line(result: EpochResult, epochs: int) -> str:
    parts = [
        f"epoch {result.epoch + 1}/{epochs}",
        f"train loss {result.train_loss:.4f}{_accuracies(result.train_acc1, result.train_acc5)}",
    ]
    if result.eval_loss is not None:
        figures = "".join(f" {name} {value:.4g}" for name, value in result.eval_figures)
        accuracies = _accuracies(result.eval_acc1, result.eval_acc5)
        parts.append(f"test loss {result.eval_loss:.4f}{accuracies}{figures}")
    parts.append(f"{result.seconds:.2f} s")
    if result.local_losses:
        parts.append("local " + " ".join(f"{layer} {value:.3f}" for layer, value in result.local_losses))
    if len(result.layer_acc1) > 1:
        parts.append("test acc1 of layers " + " ".join(f"{layer} {value:.1f}" for layer, value in result.layer_acc1))
    return " | ".join(parts)


def _accuracies(first: float | None, fifth: float | None) -> str:
    return "".join(f" {name} {value:.2f}" for name, value in (("acc1", first), ("acc5", fifth)) if value is not None)
