"""The choice of a backend and of its optimizer: by what backends say of themselves, not by what they are called."""

import importlib
import warnings
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from unlocked.kernels import cpp, cuda, dispatch, reference, triton
from unlocked.kernels.abilities import Abilities
from unlocked.kernels.cpp import winograd
from unlocked.kernels.dispatch import BACKENDS, fuse_optimizer, get_backend

CPU = torch.device("cpu")
OPERATIONS = ("load_batch", "local_head", "norm_act_backward", "norm_act_backward_full", "norm_act_forward")


@pytest.mark.parametrize("backend", [reference, cpp, cuda, triton, winograd])
def test_every_backend_has_every_operation_and_says_what_it_can_do(backend: ModuleType) -> None:
    assert isinstance(backend.ABILITIES, Abilities)
    names = ("ABILITIES", "unavailable", *OPERATIONS)
    assert {name for name in names if name not in backend.__all__} == set()
    if backend is triton and importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    assert all(callable(getattr(backend, name)) for name in OPERATIONS)
    assert isinstance(backend.unavailable(CPU), str)


@pytest.mark.parametrize("backend", [cpp, reference])
def test_who_writes_in_place_takes_a_place(backend: ModuleType) -> None:
    assert backend.ABILITIES.in_place
    for name in ("norm_act_backward", "norm_act_backward_full"):
        assert "out" in getattr(backend, name).__kwdefaults__


def test_automatic_takes_what_is_made_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "unavailable", lambda device: "")
    monkeypatch.setattr(triton, "unavailable", lambda device: "")
    assert get_backend("auto", "cpu") is cpp
    assert get_backend("auto", "cuda") is triton
    assert get_backend("torch", "cpu") is reference


def test_automatic_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(cpp, "unavailable", lambda device: "no compiler")
    with pytest.warns(UserWarning, match="falling back to plain PyTorch: no compiler"):
        assert get_backend("auto", "cpu") is reference
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get_backend("auto", "cpu") is reference
    with pytest.warns(UserWarning, match="no fused kernels for meta"):
        assert get_backend("auto", "meta") is reference


def test_names_that_are_not_known_or_can_not_run() -> None:
    with pytest.raises(ValueError, match=f"'fast' is not known; valid: {', '.join(BACKENDS)}"):
        get_backend("fast", "cpu")
    with pytest.raises(ValueError, match="kernels 'cuda' can't run on cpu"):
        get_backend("cuda", "cpu")


def test_optimizers_follow_the_backends_abilities(monkeypatch: pytest.MonkeyPatch) -> None:
    if cpp.unavailable(CPU):
        pytest.skip(cpp.unavailable(CPU))
    weight = torch.nn.Parameter(torch.ones(3))
    library = torch.optim.Adam([weight], lr=0.1, fused=True)

    def fused(backend: Any, *, every_gradient: bool) -> Any:
        return fuse_optimizer(backend, library, CPU, every_gradient=every_gradient)

    assert fused(cpp, every_gradient=True) is not library
    assert fused(cpp, every_gradient=False) is library  # its kernel wants a gradient for every parameter
    assert fused(reference, every_gradient=True) is library
    lenient = SimpleNamespace(ABILITIES=replace(cpp.ABILITIES, partial_gradients=True))
    assert fused(lenient, every_gradient=False) is not library
    monkeypatch.setattr(cpp, "unavailable", lambda device: "no compiler")
    assert fused(cpp, every_gradient=True) is library
