"""Training with `AdamWSF` against golden trajectories of the authors' code with the optimizer that they bundle.

Weights in training and averaged weights, from which the prediction in evaluation is made. The library's newest
schedule-free AdamW is seen to be another one.
"""

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_golden
import torch
from golden import SCHEDULE_FREE_DIR, Golden, golden_files, load_golden
from test_golden import Trajectory, check_parameters, check_steps, distance, run

from unlocked.kernels import cpp, reference
from unlocked.workers.fused import fused_step
from unlocked.workers.layer import StepFactory

schedulefree = pytest.importorskip("schedulefree")

FILES = golden_files(folder=SCHEDULE_FREE_DIR)
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def check(golden: Golden, found: Trajectory) -> None:
    check_steps(golden, found)
    check_parameters(golden, found)
    assert len(golden.averages) == len(golden.samples)
    check_parameters(replace(golden, samples=golden.averages), replace(found, parameters=found.averages))
    assert distance(found.average_logits, golden.eval_logits) < test_golden.ADAM.evaluation


def autograd(index: int) -> StepFactory | None:
    return None


@each_file
@pytest.mark.parametrize("backend", ["autograd", "torch", "cpp"])
def test_training_follows_the_authors_trajectory(backend: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # else the optimizer would be Triton's
    if backend == "cpp" and (problem := cpp.unavailable("cpu")):
        pytest.skip(problem)
    module = reference if backend == "torch" else cpp
    golden = load_golden(path)
    found = run(golden, autograd if backend == "autograd" else lambda index: fused_step(module))
    kinds = {type(layer.optimizer).__name__ for layer in found.layers}
    assert kinds == {"NativeOptimizer" if backend == "cpp" else "AdamWSF"}
    check(golden, found)


@each_file
def test_the_librarys_newest_is_seen_to_be_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def newest(meta: dict[str, Any]) -> Callable[[Any], Any]:
        return partial(schedulefree.AdamWScheduleFree, lr=meta["lr"], weight_decay=meta["weight_decay"])

    monkeypatch.setattr(test_golden, "_optimizer", newest)
    golden = load_golden(path)
    found = run(golden)
    with pytest.raises(AssertionError):
        check_parameters(golden, found)
    with pytest.raises(AssertionError):
        check_parameters(replace(golden, samples=golden.averages), replace(found, parameters=found.averages))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is chosen where there is no GPU")
def test_tritons_optimizer_follows_the_authors_trajectory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused optimizer alone, behind steps by autograd: the kernels of the step have tests of their own."""
    if not FILES:
        pytest.skip("no golden files beside the checkout")
    optim = pytest.importorskip("unlocked.kernels.triton.optim")
    chosen = test_golden._optimizer

    def fused(meta: dict[str, Any]) -> Callable[[Any], Any]:
        return lambda parameters: optim.from_torch(chosen(meta)(parameters))

    monkeypatch.setattr(test_golden, "_optimizer", fused)
    golden = load_golden(FILES[0])
    found = run(golden)
    triton = importlib.import_module("unlocked.kernels.triton.optim")
    assert all(isinstance(layer.optimizer, triton.FusedOptimizer) for layer in found.layers)
    check(golden, found)
