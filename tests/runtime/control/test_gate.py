"""Where a learning rate waits for the test loss: nobody is granted a position of the next epoch before it is known."""

from queue import Queue
from threading import Barrier, Event

from coordination import LAYERS, TIMEOUT, Sink, in_threads, make_client

from unlocked.runtime.control.coordinator import Coordinator
from unlocked.runtime.control.messages import Files
from unlocked.runtime.control.windows import EpochGate
from unlocked.runtime.learning_rate import LearningRate, ReduceLROnPlateau
from unlocked.runtime.metrics.records import EpochPart, EpochResult, Scores

ENDS = [17, 41, 50]  # no multiples of a window, so that whoever does not stop there is seen
LOSSES = [1.0, 2.0, 0.5]  # the second one is no better than the first


def _gate(epoch: int = 0) -> EpochGate:
    return EpochGate(LearningRate(ReduceLROnPlateau(factor=0.5, patience=0)), ENDS.__getitem__, len(ENDS), epoch)


def test_all_stages_wait_and_get_the_rate_with_the_epoch() -> None:
    told: list[int] = []
    sink = Sink()
    messages: list[str] = []
    at_the_end = Barrier(3)
    sink.on_message = messages.append  # type: ignore[method-assign]

    with Coordinator(LAYERS, 50, gate=_gate(), sink=sink) as coordinator:

        def work(stage: int) -> list[tuple[int, int, float]]:
            seen = []
            with make_client(coordinator.address, stage) as client:
                for window in client.windows(TIMEOUT):
                    epoch = sum(window.start >= end for end in ENDS)
                    assert window.stop <= ENDS[epoch]
                    assert len(told) >= epoch, "granted before the loss of the epoch before was known"
                    seen.append((window.start, window.stop, client.lr_factor))
                    if window.stop != ENDS[epoch]:
                        continue
                    # The last stage can't be done with an epoch before the others are, so no grant passes its end.
                    at_the_end.wait(TIMEOUT)
                    scores = None
                    if stage == 2:
                        told.append(epoch)
                        scores = Scores(loss=LOSSES[epoch], acc1=0.0, acc5=0.0)
                    client.epoch(
                        EpochPart(
                            stage=stage, epoch=epoch, local_losses=(), seconds=0.0, train=scores, evaluation=scores
                        )
                    )
                client.finish({})
            return seen

        for windows in in_threads(work):
            assert [start for start, _, _ in windows] == [0, *(stop for _, stop, _ in windows[:-1])]
            assert windows[-1][1] == 50
            assert {sum(start >= end for end in ENDS): rate for start, _, rate in windows} == {0: 1.0, 1: 1.0, 2: 0.5}
        coordinator.results(TIMEOUT)
        assert [epoch.epoch for epoch in sink.epochs] == [0, 1, 2]
        assert ["after epoch 2 the rate is 0.5" in text for text in messages] == [True]


def test_a_resumed_gate_begins_with_its_epoch() -> None:
    rate = LearningRate(ReduceLROnPlateau(factor=0.5, patience=0), {0: 1.0, 1: 2.0})
    gate = EpochGate(rate, ENDS.__getitem__, len(ENDS), 2)
    assert (gate.limit, gate.factor) == (50, 0.5)
    assert gate.observe(2, 0.1) is None
    gate.let_pass(2)
    assert gate.limit == 50  # the last one's end is the run's


def test_a_snapshot_behind_an_epoch_has_its_loss_however_slow_a_sink_is() -> None:
    """The run is stopped amid its first epoch, and all stages are done before a sink that it waits for has heard."""
    rate = LearningRate(ReduceLROnPlateau(factor=0.5, patience=0))
    gate = EpochGate(rate, ENDS.__getitem__, len(ENDS), 0, for_sinks=True)
    sink, all_done, saved = Sink(), Event(), Queue()  # type: ignore[var-annotated]
    heard = sink.on_epoch

    def on_epoch(result: EpochResult) -> None:
        assert all_done.wait(TIMEOUT)
        heard(result)

    sink.on_epoch = on_epoch  # type: ignore[method-assign]

    def on_snapshot(position: int, files: Files) -> None:
        saved.put((position, rate.losses_before(1)))

    with Coordinator(LAYERS, 50, gate=gate, sink=sink, on_snapshot=on_snapshot, stop_at=lambda _: 17) as coordinator:
        coordinator.request_stop(15)
        at_the_end = Barrier(3, all_done.set)

        def work(stage: int) -> int:
            with make_client(coordinator.address, stage) as client:
                position = [window.stop for window in client.windows(TIMEOUT)][-1]
                scores = Scores(loss=LOSSES[0], acc1=0.0, acc5=0.0) if stage == 2 else None
                part = EpochPart(stage=stage, epoch=0, local_losses=(), seconds=0.0, train=scores, evaluation=scores)
                client.epoch(part)
                client.snapshot_done(position, {})
                assert client.await_news(lambda: client.saved == position, TIMEOUT)
                at_the_end.wait(TIMEOUT)
                client.finish({})
            return position

        assert in_threads(work) == [17] * 3
        coordinator.results(TIMEOUT)
    assert saved.get(timeout=TIMEOUT) == (17, [(0, LOSSES[0])])
    assert [epoch.epoch for epoch in sink.epochs] == [0]
