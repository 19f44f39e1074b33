"""Faults on purpose hit the worker, the action and the incarnation that they name, and nobody else."""

import os
import signal
from collections.abc import Callable

import pytest

from unlocked.runtime.faults import (
    FAULTS,
    VARIABLE,
    InjectedError,
    fail_at,
    faults_from_environment,
    parse_faults,
    trigger,
)
from unlocked.workers.actions import Action


def test_faults_print_as_they_are_read() -> None:
    text = "kill@1SEND17,stop@0F3#2,error@2E40"
    faults = parse_faults(f" {text.replace(',', ' , ')} ,")
    assert ",".join(map(str, faults)) == text
    assert faults[1] == fail_at(0, "F", 3, "stop", 2)
    assert parse_faults("") == []


@pytest.mark.parametrize("text", ["kill", "kill@", "kill@1X3", "maim@1F3", "kill@1F3#", "kill@1F3#-1", "kill@1F3;"])
def test_what_is_no_fault_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ValueError, match=r"UNLOCKED_FAULTS: .*(is not a fault|is not an action)"):
        faults_from_environment()


def test_a_point_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="'X' is no action; valid: RECV, F"):
        fail_at(0, "X", 1)
    with pytest.raises(ValueError, match="'maim' is no kind of fault; valid: kill, stop"):
        fail_at(0, "F", 1, "maim")


def test_a_fault_is_one_workers_alone() -> None:
    faults = parse_faults("error@1F3,error@1F5#1")
    assert trigger(faults, 0, 0) is None
    assert trigger(faults, 1, 2) is None
    first, second = trigger(faults, 1, 0), trigger(faults, 1, 1)
    assert first is not None
    assert second is not None
    first(Action.parse("1F5"))
    second(Action.parse("1F3"))
    with pytest.raises(InjectedError, match="error@1F3"):
        first(Action.parse("1F3"))
    with pytest.raises(InjectedError, match="error@1F5#1"):
        second(Action.parse("1F5"))


def status_of(act: Callable[[str], None]) -> int:
    """How a child ends that does this to itself."""
    child = os.fork()
    if not child:
        try:
            act("")
        finally:
            os._exit(0)
    found, status = os.waitpid(child, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        os.kill(found, signal.SIGKILL)
        os.waitpid(found, 0)
        return -os.WSTOPSIG(status)
    return os.waitstatus_to_exitcode(status)


def test_each_kind_ends_a_process_in_its_way() -> None:
    ends = {kind: status_of(FAULTS[kind]) for kind in ("kill", "stop", "segv", "abort", "vanish")}
    assert ends == {
        "kill": -signal.SIGKILL,
        "stop": -signal.SIGSTOP,
        "segv": -signal.SIGSEGV,
        "abort": -signal.SIGABRT,
        "vanish": 9,
    }
