"""GroupNorm by autograd, where torch ends the process unless its input's gradient is asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unlocked.workers.group_norms import GroupNormGuard

TESTS = Path(__file__).parent.parent


def test_blocks_that_begin_with_one_train() -> None:
    script = Path(__file__).with_name("group_norm_steps.py")
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, script], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, (run.returncode, run.stdout, run.stderr)
    assert len(run.stdout.splitlines()) == 6 * 6 + 2


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((2, 1, 3, 3), (9, 1, 3, 1)), ((2, 4, 1, 1), (4, 1, 4, 4)), ((2, 1, 3, 3, 3), (27, 1, 9, 3, 1))],
)
def test_what_may_be_taken_for_channels_last_is_asked_for(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    x, asked = torch.empty_strided(shape, strides).zero_(), list[torch.Tensor]()
    assert x.is_contiguous()
    with GroupNormGuard("cpu").active(asked):
        torch.group_norm(x, 1)
    assert [one.data_ptr() for one in asked] == [x.data_ptr()]


def test_a_block_without_one_pays_for_one_pass_alone() -> None:
    guard = GroupNormGuard("cpu")
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    for is_first in (True, False):
        with guard.active():
            assert (torch.overrides._get_current_function_mode() is not None) is is_first
            torch.relu(x)
    other = GroupNormGuard("cpu")
    for _ in range(3):
        asked: list[torch.Tensor] = []
        with other.active(asked):
            torch.group_norm(x, 2)
        assert [one.data_ptr() for one in asked] == [x.data_ptr()]


def test_what_has_a_gradient_or_lies_in_plain_order_is_left_alone() -> None:
    guard, asked = GroupNormGuard("cpu"), list[torch.Tensor]()
    x = torch.randn(2, 4, 3, 3)
    with guard.active(asked):
        torch.group_norm(x, 2)
        torch.group_norm(x.contiguous(memory_format=torch.channels_last).requires_grad_(), 2)
        with torch.no_grad():
            torch.group_norm(x.contiguous(memory_format=torch.channels_last), 2)
    assert not asked
