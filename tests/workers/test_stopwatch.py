"""Busy and waiting time."""

from unlocked.workers.actions import Action, ActionKind
from unlocked.workers.stopwatch import Stopwatch

BUSY = {ActionKind.F, ActionKind.U, ActionKind.E, ActionKind.SNAP}


def test_every_kind_counts_as_busy_or_as_waiting() -> None:
    stopwatch = Stopwatch()
    for i, kind in enumerate(ActionKind):
        stopwatch.add(Action(0, kind, 0), 10.0, 10.0 + 2**i)
    expected = sum(2**i for i, kind in enumerate(ActionKind) if kind in BUSY)
    assert stopwatch.busy == expected
    assert stopwatch.waiting == 2 ** len(ActionKind) - 1 - expected
    assert stopwatch.timed == []  # only kept if asked for


def test_a_step_is_forward_and_update_of_training_micro_batches() -> None:
    """What a partition predicts: neither waiting, nor evaluation, nor the forward passes of statistics."""
    stopwatch = Stopwatch()
    assert stopwatch.seconds_per_step() == 0.0
    for kind, seconds, trains in [
        (ActionKind.RECV, 50.0, True),
        (ActionKind.F, 1.0, True),
        (ActionKind.U, 2.0, True),
        (ActionKind.SEND, 50.0, True),
        (ActionKind.F, 1.5, True),
        (ActionKind.U, 3.5, True),
        (ActionKind.F, 9.0, False),
        (ActionKind.E, 9.0, False),
    ]:
        stopwatch.add(Action(0, kind, 0), 0.0, seconds, trains=trains)
    assert stopwatch.seconds_per_step() == 4.0
    stopwatch.restart()
    assert stopwatch.seconds_per_step() == 0.0


def test_a_restart_forgets_what_was_before() -> None:
    stopwatch = Stopwatch(keep=True)
    stopwatch.add(Action(0, ActionKind.F, 0), 0.0, 5.0)
    before = stopwatch.started
    stopwatch.restart()
    assert (stopwatch.busy, stopwatch.waiting, stopwatch.timed) == (0.0, 0.0, [])
    assert stopwatch.started >= before
