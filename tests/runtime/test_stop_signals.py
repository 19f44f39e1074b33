"""Signals that ask for an orderly stop, and a launcher's that comes while a failure is about to be told."""

import signal
import threading

import pytest

from unlocked.runtime.signals import StopSignals


def test_a_launchers_signal_does_not_cut_off_the_word_of_a_failure() -> None:
    came = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        with pytest.raises(RuntimeError, match="lost"), StopSignals():
            raise RuntimeError("lost")
        signal.raise_signal(signal.SIGTERM)
        assert not came.is_set()
        assert came.wait(10), "it is put off, not lost"
    finally:
        signal.signal(signal.SIGTERM, before)
