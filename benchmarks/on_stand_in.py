"""A benchmark's own code on the stand-in for a GPU that the engine's tests use: what can be tried of it without a GPU.

Everything runs in the order in which it is issued, on tensors of the CPU, through the streams engine's device side:
streams, events, captures, launches of graphs. What is ordered by no wait raises. No time means anything.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["STAND_IN", "on_stand_in"]

STAND_IN = "stand-in"
"""The name of the device on a command line."""


@contextlib.contextmanager
def on_stand_in() -> Iterator[dict[str, Any]]:
    """Inside, `device="cuda"` is the stand-in. Yields a `Trainer`'s options that go with it: kernels that run there,
    and an optimizer with all of its state on the device, as a capture needs."""
    tests = Path(__file__).resolve().parent.parent / "tests"
    for folder in (tests, tests / "engines"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    from cuda_stand_in.install import cuda_stand_in
    from stand_in_runs import DeviceMomentum, closed_form

    with cuda_stand_in(strict=True), closed_form():
        yield {"device": "cuda", "kernels": "torch", "optimizer": DeviceMomentum}
