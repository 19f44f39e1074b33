"""Schedules as functions of the epoch against torch's schedulers, which keep a state instead."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unlocked.runtime.learning_rate import LR_SCHEDULES, constant, lr_schedule

EPOCHS = 12


def _library(make: Callable[[torch.optim.Optimizer], Any]) -> list[float]:
    """The rates that a torch scheduler gives to the first epochs, from an initial rate of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, rates = make(optimizer), []
    for _ in range(EPOCHS):
        rates.append(optimizer.param_groups[0]["lr"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there is no optimizer step here
            scheduler.step()
    return rates


@given(
    milestones=st.lists(st.integers(1, EPOCHS), max_size=4, unique=True), gamma=st.sampled_from([0.1, 0.2, 0.5, 1.0])
)
def test_multi_step_is_torchs(milestones: list[int], gamma: float) -> None:
    schedule = lr_schedule("MultiStepLR", epochs=EPOCHS, milestones=milestones, gamma=gamma)
    expected = _library(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, sorted(milestones), gamma))
    assert [schedule(epoch) for epoch in range(EPOCHS)] == pytest.approx(expected, rel=1e-12)


@given(epochs=st.integers(1, EPOCHS))
def test_cosine_is_torchs(epochs: int) -> None:
    schedule = lr_schedule("CosineAnnealingLR", epochs=epochs, milestones=[], gamma=0.1)
    expected = _library(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, epochs))
    assert [schedule(epoch) for epoch in range(epochs)] == pytest.approx(expected[:epochs], abs=1e-12)


def test_none_is_constant() -> None:
    schedule = lr_schedule("none", epochs=3, milestones=[1], gamma=0.1)
    assert [schedule(epoch) for epoch in range(3)] == [constant(epoch) for epoch in range(3)] == [1.0] * 3


def test_unknown_names_list_the_valid() -> None:
    with pytest.raises(ValueError, match=f"'StepLR' is not known; valid: {', '.join(LR_SCHEDULES)}"):
        lr_schedule("StepLR", epochs=3, milestones=[], gamma=0.1)


def test_milestones_before_the_first_epoch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"milestones are epochs from 0, got \[-1, 2\]"):
        lr_schedule("MultiStepLR", epochs=3, milestones=[-1, 2], gamma=0.1)
