"""The digest and the wire form of a run's weights."""

import hashlib
import struct
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unlocked.runtime.metrics.records import EpochResult
from unlocked.runtime.result import RunResult
from unlocked.runtime.tensors import pack_tensors, unpack_tensors, weights_digest

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def test_digest_is_over_names_and_little_endian_bytes() -> None:
    tensors = [("a.weight", torch.tensor([[1.0, -2.5], [0.0, 3.0]])), ("a.count", torch.tensor(7))]
    plain = b"a.weight" + struct.pack("<4f", 1.0, -2.5, 0.0, 3.0) + b"a.count" + struct.pack("<q", 7)
    assert weights_digest(tensors) == hashlib.sha256(plain).hexdigest()


def test_digest_does_not_depend_on_the_memory_format() -> None:
    value = torch.randn(2, 3, 4, 5)
    other = value.contiguous(memory_format=torch.channels_last)
    assert other.stride() != value.stride()
    assert weights_digest([("w", value)]) == weights_digest([("w", other)])


@pytest.mark.parametrize("change", [("v", 0.0), ("w", 1e-7)])
def test_digest_sees_every_change(change: tuple[str, float]) -> None:
    name, step = change
    value = torch.linspace(-1, 1, 5)
    assert weights_digest([("w", value)]) != weights_digest([(name, value + step)])


@given(shape=st.lists(st.integers(0, 4), max_size=4), dtype=st.sampled_from(DTYPES), channels_last=st.booleans())
def test_tensors_survive_the_wire(shape: list[int], dtype: torch.dtype, channels_last: bool) -> None:
    value = (10 * torch.randn(shape)).to(dtype)
    if channels_last and len(shape) == 4:
        value = value.contiguous(memory_format=torch.channels_last)
    packed = msgpack.unpackb(msgpack.packb(pack_tensors([("layer.weight", value)])))
    found = unpack_tensors(packed)
    assert list(found) == ["layer.weight"]
    assert found["layer.weight"].dtype == dtype
    assert found["layer.weight"].shape == value.shape
    assert torch.equal(found["layer.weight"], value)


def test_a_parameter_on_the_tape_can_be_packed() -> None:
    parameter: Tensor = torch.nn.Parameter(torch.ones(3))
    assert torch.equal(unpack_tensors(pack_tensors([("p", parameter)]))["p"], torch.ones(3))


def _epoch(epoch: int, **evaluation: Any) -> EpochResult:
    scores: dict[str, Any] = {"eval_loss": None, "eval_acc1": None, "eval_acc5": None, **evaluation}
    losses = (("conv1", 2.0 - epoch), ("output", 1.0))
    return EpochResult(
        epoch=epoch, train_loss=1.0, train_acc1=50.0, train_acc5=90.0, local_losses=losses, seconds=1.0, **scores
    )


def test_last_figures() -> None:
    epochs = [_epoch(0, eval_acc1=80.0, eval_loss=0.5), _epoch(1)]
    result = RunResult(engine="sequential", stages=[["conv1", "output"]], epochs=epochs)
    assert (result.test_acc1, result.test_loss) == (80.0, 0.5)  # of the last epoch that was evaluated
    assert result.local_losses == {"conv1": 1.0, "output": 1.0}


def test_a_run_without_epochs_has_no_figures() -> None:
    result = RunResult(engine="sequential", stages=[])
    assert (result.test_acc1, result.test_loss, result.local_losses) == (None, None, {})
