"""pytest fixtures for faults on purpose. In a conftest.py: `pytest_plugins = ["unlocked.runtime.fault_fixtures"]`."""

import os
from typing import Protocol

import pytest

from unlocked.runtime.faults import VARIABLE, Fault
from unlocked.runtime.faults import fail_at as make_fault

__all__ = ["FailAt", "fail_at"]


class FailAt(Protocol):
    """Arms a fault for the runs that a test starts; see `unlocked.runtime.faults.fail_at`."""

    def __call__(
        self, stage: int, action: str, position: int = 0, kind: str = "kill", incarnation: int = 0
    ) -> Fault: ...


@pytest.fixture
def fail_at(monkeypatch: pytest.MonkeyPatch) -> FailAt:
    """`fail_at(1, "SEND", 17)`: whatever run is started in this test, its stage 1 is killed before it sends micro-batch
    17. Several calls arm several faults; none outlives the test."""

    def arm(stage: int, action: str, position: int = 0, kind: str = "kill", incarnation: int = 0) -> Fault:
        fault = make_fault(stage, action, position, kind, incarnation)
        armed = os.environ.get(VARIABLE)
        monkeypatch.setenv(VARIABLE, f"{armed},{fault}" if armed else str(fault))
        return fault

    return arm
