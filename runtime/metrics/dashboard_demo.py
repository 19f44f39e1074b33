"""A synthetic run for the dashboard.

`python -m unlocked.runtime.metrics.dashboard_demo [--stages N] [--seconds S] [--plain]` shows it.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from unlocked.runtime.fields import LONGEST_WAIT, LineParser, add_flags, check, setting
from unlocked.runtime.metrics.dashboard import Dashboard
from unlocked.runtime.metrics.records import EpochResult, Meters, RunInfo, StageProgress, StepResult

__all__ = ["main", "play"]


def play(dashboard: Dashboard, *, stages: int, seconds: float) -> None:
    """Feeds made-up records of a run with `stages` stages for `seconds`; nothing is trained."""
    epochs, steps, batch = 5, 782, 64
    convolutions = [(f"conv{2 * s + 1}", f"conv{2 * s + 2}") for s in range(stages - 1)]
    names = (*convolutions, ("linear1", "output"))
    total = epochs * (steps + 157)
    dashboard.on_start(
        RunInfo(
            model="SmallConv",
            dataset="a synthetic run",
            engine="processes",
            rule="LLS",
            stages=names,
            total=total,
            epochs=epochs,
            steps_per_epoch=steps,
            batch_size=batch,
            device="cpu",
        )
    )
    began = time.monotonic()
    reported = 0
    while (elapsed := time.monotonic() - began) < seconds:
        done = elapsed / seconds
        epoch = min(int(done * epochs), epochs - 1)
        for stage, layers in enumerate(names):
            dashboard.on_progress(
                StageProgress(
                    stage=stage,
                    position=int(total * max(0.0, done - 0.002 * stage)),
                    epoch=epoch,
                    images=int(done * epochs * steps * batch),
                    busy_seconds=elapsed * (0.35 + 0.6 / (1 + stage)),
                    wait_seconds=elapsed * (0.65 - 0.6 / (1 + stage)),
                    seconds=elapsed,
                    queue_fill=0.5 + 0.4 * math.sin(3 * elapsed + stage),
                    local_losses=tuple((layer, 2.3 * math.exp(-2 * done) + 0.05 * i) for i, layer in enumerate(layers)),
                )
            )
        meters = Meters(
            time=0.002, data=0.0, loss=2.3 * math.exp(-2 * done), acc1=80 * done + 10, acc5=min(100.0, 60 * done + 50)
        )
        step = int(done * epochs * steps) % steps
        dashboard.on_step(StepResult(epoch=epoch, step=step, steps=steps, recent=meters, mean=meters))
        if epoch > reported:
            dashboard.on_epoch(_epoch(reported, names, seconds / epochs))
            reported = epoch
        time.sleep(0.05)
    dashboard.on_epoch(_epoch(epochs - 1, names, seconds / epochs))
    dashboard.on_finish({"images_per_second": epochs * steps * batch / seconds})


def _epoch(epoch: int, names: tuple[tuple[str, ...], ...], seconds: float) -> EpochResult:
    return EpochResult(
        epoch=epoch,
        train_loss=2.0 / (epoch + 1),
        train_acc1=90 - 50 / (epoch + 1),
        train_acc5=99 - 10 / (epoch + 1),
        eval_loss=2.1 / (epoch + 1),
        eval_acc1=85 - 50 / (epoch + 1),
        eval_acc5=98 - 10 / (epoch + 1),
        local_losses=tuple((layer, 2.0 / (epoch + 1)) for layers in names for layer in layers),
        seconds=seconds,
    )


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What the demo shows."""

    stages: int = setting(3, "of the made-up pipeline", at_least=1, at_most=1024)
    seconds: float = setting(6.0, "that the demo takes", above=0, at_most=LONGEST_WAIT)
    plain: bool = setting(False, "lines instead of a live table")

    def __post_init__(self) -> None:
        check(self)


def main(arguments: Sequence[str] | None = None) -> int:
    """Plays the demo on standard output. A mistake is one line and exit code 2."""
    parser = LineParser(description="Shows the dashboard with made-up numbers.")
    add_flags(parser.add_argument_group("what is shown"), DemoOptions)
    try:
        options = DemoOptions(**vars(parser.parse_args(arguments)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    play(Dashboard(plain=options.plain or None, plain_seconds=1.0), stages=options.stages, seconds=options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
