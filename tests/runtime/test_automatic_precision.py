"""`precision="auto"`, and the warning where bfloat16 is asked for and does not pay."""

import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from unlocked.kernels import trial
from unlocked.rules import LLS
from unlocked.runtime import Trainer
from unlocked.runtime.settings import Settings


def set_gain(monkeypatch: pytest.MonkeyPatch, gain: float) -> None:
    """What a processor of another kind would show."""
    for place in ("unlocked.kernels.trial", "unlocked.runtime.before_run"):
        monkeypatch.setattr(f"{place}.bfloat16_gain", lambda device: gain)


def trainer(**options: str) -> Trainer:
    model = [nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)]
    return Trainer(model, rule=LLS(), optimizer=partial(torch.optim.SGD, lr=0.1), **options)


def test_the_trial_times_this_processor() -> None:
    gain = trial.bfloat16_gain("cpu")
    assert gain > 0
    assert math.isfinite(gain)


@pytest.mark.parametrize(("gain", "chosen"), [(0.3, "fp32"), (1.1, "fp32"), (1.3, "bf16"), (2.1, "bf16")])
def test_auto_goes_by_the_trial_and_says_so(
    gain: float, chosen: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_gain(monkeypatch, gain)
    assert Settings(precision="auto").precision == chosen
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"precision auto is {chosen}" in told
    assert f"{gain:.2f} times" in told
    assert trainer(precision="auto").settings.precision == chosen
    monkeypatch.setenv("RANK", "1")
    capsys.readouterr()
    assert Settings(precision="auto").precision == chosen
    assert capsys.readouterr().err == ""


def test_a_device_that_is_not_there_is_refused_as_ever() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda"):
            trainer(precision="auto", device="cuda")


def test_bfloat16_that_does_not_pay_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    set_gain(monkeypatch, 0.25)
    with pytest.warns(UserWarning, match=r"slower than fp32 on this processor.* 4\.0 times as long"):
        trainer(precision="bf16")
    set_gain(monkeypatch, 1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(precision="bf16")
        trainer(precision="fp32")
