"""Schedules as pure functions against torch's schedulers, which keep a state instead."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unlocked.runtime.learning_rate import LR_SCHEDULES, LearningRate, ReduceLROnPlateau, constant, lr_schedule

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


LOSSES = st.lists(st.sampled_from([3.0, 2.0, 1.0, 0.99995, 0.9, 0.5, math.nan, math.inf, 0.0, -1.0]), max_size=20)


@given(
    losses=LOSSES,
    factor=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    patience=st.integers(0, 4),
    cooldown=st.integers(0, 3),
    threshold=st.sampled_from([0.0, 1e-4, 0.2]),
    least=st.sampled_from([0.0, 0.05]),
    lr=st.sampled_from([1.0, 0.01, 1e-7]),
)
def test_plateau_is_torchs(
    losses: list[float], factor: float, patience: int, cooldown: int, threshold: float, least: float, lr: float
) -> None:
    """After every epoch, for losses of all kinds."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=factor, patience=patience, threshold=threshold, cooldown=cooldown, min_lr=least * lr
    )
    ours = ReduceLROnPlateau(
        factor=factor, patience=patience, threshold=threshold, cooldown=cooldown, min_factor=least, eps=1e-8 / lr
    )
    for i, loss in enumerate(losses):
        torchs.step(loss)
        assert lr * ours(losses[: i + 1]) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=0)


def test_plateau_by_name_has_torchs_defaults() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1)
    ours = lr_schedule("ReduceLROnPlateau", epochs=9, milestones=[], gamma=0.1, lr=1e-3)
    assert isinstance(ours, ReduceLROnPlateau)
    losses = [1.0] * 80  # down to where a reduction is too small to be made
    rates = []
    for i, loss in enumerate(losses):
        torchs.step(loss)
        rates.append(optimizer.param_groups[0]["lr"])
        assert 1e-3 * ours(losses[: i + 1]) == pytest.approx(rates[-1], rel=1e-12)
    assert len(set(rates)) == 6


def test_a_rate_keeps_the_losses_of_its_run() -> None:
    rate = LearningRate(ReduceLROnPlateau(factor=0.5, patience=0), {0: 1.0, 1: 2.0})
    assert rate.needs_losses
    assert [rate(epoch) for epoch in range(3)] == [1.0, 1.0, 0.5]
    assert rate.observe(2, 0.5) is None
    assert "after epoch 4 the rate is 0.25" in str(rate.observe(3, 0.7))
    assert rate.losses_before(3) == [(0, 1.0), (1, 2.0), (2, 0.5)]
    resumed = LearningRate(rate.schedule, dict(rate.losses_before(4)))
    assert resumed(4) == rate(4) == 0.25
    plain = LearningRate(constant)
    assert plain.observe(0, 1.0) is None
    assert not plain.needs_losses
    assert plain.losses_before(9) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 1.0}, r"factor of ReduceLROnPlateau is 1.0; it must lie in \[0, 1\)"),
        ({"patience": -1}, "patience -1 and cooldown 0"),
    ],
)
def test_bad_values_of_the_plateau(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReduceLROnPlateau(**options)


def test_none_is_constant() -> None:
    schedule = lr_schedule("none", epochs=3, milestones=[1], gamma=0.1)
    assert [schedule(epoch) for epoch in range(3)] == [constant(epoch) for epoch in range(3)] == [1.0] * 3


def test_unknown_names_list_the_valid() -> None:
    with pytest.raises(ValueError, match=f"'StepLR' is not known; valid: {', '.join(LR_SCHEDULES)}"):
        lr_schedule("StepLR", epochs=3, milestones=[], gamma=0.1)


def test_milestones_before_the_first_epoch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"milestones are epochs from 0, got \[-1, 2\]"):
        lr_schedule("MultiStepLR", epochs=3, milestones=[-1, 2], gamma=0.1)
