"""Busy and waiting time."""

from unlocked.workers.actions import Action, ActionKind
from unlocked.workers.stopwatch import Recorder

BUSY = {ActionKind.F, ActionKind.U, ActionKind.E, ActionKind.SNAP}


def test_every_kind_counts_as_busy_or_as_waiting() -> None:
    recorder = Recorder()
    for i, kind in enumerate(ActionKind):
        recorder.add(Action(0, kind, 0), 10.0, 10.0 + 2**i)
    expected = sum(2**i for i, kind in enumerate(ActionKind) if kind in BUSY)
    assert recorder.busy == expected
    assert recorder.waiting == 2 ** len(ActionKind) - 1 - expected
    assert recorder.spans == []  # only kept if asked for


def test_a_step_is_forward_and_update_of_training_micro_batches() -> None:
    """What a partition predicts: neither waiting, nor evaluation, nor the forward passes of statistics."""
    recorder = Recorder()
    assert recorder.seconds_per_step() == 0.0
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
        recorder.add(Action(0, kind, 0), 0.0, seconds, trains=trains)
    assert recorder.seconds_per_step() == 4.0
    recorder.restart()
    assert recorder.seconds_per_step() == 0.0


def test_a_restart_forgets_what_was_before() -> None:
    recorder = Recorder(keep=True)
    recorder.add(Action(0, ActionKind.F, 0), 0.0, 5.0)
    before = recorder.started
    recorder.restart()
    assert (recorder.busy, recorder.waiting, recorder.spans) == (0.0, 0.0, [])
    assert recorder.started >= before
