"""A stage's own snapshot survives whoever writes it, at any moment; errors come from a worker as what they are."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from unlocked.runtime.engines.processes import supervised
from unlocked.runtime.engines.processes.carried_errors import pack_error, unpack_error
from unlocked.runtime.engines.processes.memory_snapshot import MemorySnapshot
from unlocked.runtime.saving.whole_file import DiskFullError
from unlocked.workers.errors import CalledExitError, NonFiniteLossError, StageError


def state(factor: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(4, 3, 5, 5, generator=generator)
    return {
        "channels last": (factor * image).to(memory_format=torch.channels_last),
        "transposed": (factor * image[0, 0]).t(),
        "scalar": torch.tensor(factor, dtype=torch.float64),
        "nothing": torch.empty(0),
        "half": (factor * image).bfloat16(),
        "deep": [{"step": torch.tensor(3)}, ("text", 2.5, None)],
    }


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
        assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def in_child(work: Any) -> int:
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_what_a_dead_process_has_written_is_read_by_the_next() -> None:
    memory = MemorySnapshot()
    assert memory.read() is None

    def write() -> None:
        for factor in (1.0, 2.0, 3.0):
            memory.write(state(factor))
            memory.reached = int(factor)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(write) == -signal.SIGKILL
    found = memory.read()
    assert_same(found, state(3.0))
    assert memory.reached == 3
    assert found is not None
    found["channels last"].zero_()
    assert_same(memory.read(), state(3.0))


class _Deadly(torch.Tensor):
    """Kills whoever copies it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_death_amid_writing_leaves_the_snapshot_before() -> None:
    memory = MemorySnapshot()
    memory.write(state(1.0))
    memory.write(state(2.0))
    torn = {"big": torch.full((1000,), 9.0), "last": torch.zeros(1).as_subclass(_Deadly)}
    assert in_child(lambda: memory.write(torn)) == -signal.SIGKILL
    assert_same(memory.read(), state(2.0))
    memory.write(state(4.0))
    assert_same(memory.read(), state(4.0))


class _OwnError(RuntimeError):
    def __init__(self, *, needed: str) -> None:
        super().__init__(f"needs {needed}")
        self.callback = lambda: None  # which no pickle takes


def local_error() -> ValueError:
    class LocalError(ValueError):
        pass

    return LocalError("of a function")


ERRORS: list[BaseException] = [
    StageError(rank=1, stage=1, layers="conv", action="1F3", cause=NonFiniteLossError("conv", float("nan"))),
    StageError(rank=0, stage=0, layers="conv", action="0U1", cause=local_error()),
    DiskFullError(Path("/some/file")),
    FileNotFoundError(2, "No such file", "/other/file"),
    CalledExitError(3),
    KeyError("key"),
    _OwnError(needed="this"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_comes_over_with_its_class_its_text_and_its_cause(error: BaseException) -> None:
    try:
        raise error
    except BaseException as raised:
        found = unpack_error(pack_error(raised))
    assert type(found) is type(error)
    assert str(found) == str(error)
    if isinstance(error, StageError):
        assert isinstance(found, StageError)
        assert isinstance(found.cause, ValueError)
        assert str(found.cause) == str(error.cause)
    assert "test_memory_snapshot.py" in str(found.__cause__)


def test_an_error_of_a_class_that_nobody_else_knows_comes_as_its_nearest_known_one() -> None:
    found = unpack_error(pack_error(local_error()))
    assert type(found) is ValueError
    assert str(found) == "of a function"


def test_what_a_worker_leaves_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read gives no more than it likes: the system's limit is 2 GiB, less a page."""
    monkeypatch.setattr(supervised, "PIECE", 7)
    file = os.memfd_create("test")
    try:
        os.write(file, bytes(range(100)))
        assert supervised.read_all(file, 100) == bytes(range(100))
        assert supervised.read_all(file, 0) == b""
        with pytest.raises(OSError, match="ends after 100 of 101 bytes"):
            supervised.read_all(file, 101)
    finally:
        os.close(file)
