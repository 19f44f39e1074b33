"""For all tests: modules beside this file are importable, one thread, a fixed seed, no deadlines.

Property tests search anew in every run, save in CI: there the same examples tell whether a change is to blame.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import register_random, settings

sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parent / "launch"),
    str(Path(__file__).parent / "comparison"),
    str(Path(__file__).parent / "engines"),
]

# Triton reads the variable when a kernel is decorated, hence before any import of the kernels, whoever comes first.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Commands save their runs below the working folder; tests that are not about that leave nothing there.
os.environ.setdefault("UNLOCKED_SAVE_PATH", "")

torch.set_num_threads(1)
settings.register_profile("project", deadline=None, print_blob=True, derandomize=bool(os.environ.get("CI")))
settings.load_profile("project")


class _TorchNumbers:
    """torch's generator, for Hypothesis: every example begins alike, so that one that fails fails when repeated."""

    def seed(self, number: int = 0) -> None:
        torch.manual_seed(number)

    def getstate(self) -> bytes:
        return bytes(torch.get_rng_state().tolist())

    def setstate(self, state: bytes) -> None:
        torch.set_rng_state(torch.tensor(list(state), dtype=torch.uint8))


_numbers = _TorchNumbers()  # which Hypothesis refers to weakly
register_random(_numbers)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def load() -> Iterator[Any]:
    """Imports modules of benchmarks/ when a test asks (triton has to be imported after tests/kernels/conftest.py)."""
    benchmarks = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, benchmarks)
    sys.modules.pop("kernels", None)  # the folder of that name, which something may have taken for a package
    yield importlib.import_module
    sys.path.remove(benchmarks)
