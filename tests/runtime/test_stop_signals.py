"""Signals that ask for an orderly stop, and a launcher's that comes while a failure is about to be told."""

import signal

import pytest

from unlocked.runtime.signals import StopSignals


def test_a_launchers_signal_does_not_cut_off_the_word_of_a_failure() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(RuntimeError, match="lost"), StopSignals():
            raise RuntimeError("lost")
        signal.raise_signal(signal.SIGTERM)  # this process is still here
    finally:
        signal.signal(signal.SIGTERM, before)
