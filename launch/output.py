"""What an entry point prints to: it may be closed, or be closed by its reader, and the work goes on all the same."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

__all__ = ["lasting_output"]


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, standard output and error are there, and a pipe whose reader has left (`| head -1`) takes whatever is
    printed and forgets it: who trains for hours must not fail over a line that nobody reads. A warning is one line.
    """
    _open_closed()
    streams, told = (sys.stdout, sys.stderr), warnings.formatwarning
    sys.stdout, sys.stderr = (_Lasting(stream) for stream in streams)
    warnings.formatwarning = _one_line
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # what is left in a buffer would fail at the interpreter's end, where nobody can help it
        (sys.stdout, sys.stderr), warnings.formatwarning = streams, told


def _open_closed() -> None:
    """A process that is started without one of its three standard descriptors gives the number to the next file that
    it opens, and whatever prints would write into that file."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the rest of the process


class _Lasting:
    """A text stream that never breaks; otherwise the stream that it is made of."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except BrokenPipeError:
            self._forget()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._forget()

    def _forget(self) -> None:
        """Whatever is in the buffer, and whatever comes, goes nowhere; also what native code prints."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"warning: {' '.join(str(message).split())}\n"
