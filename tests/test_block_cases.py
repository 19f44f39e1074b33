"""A block's kernels among the cases of benchmarks/kernels.py: all contenders agree, and a wrong one is found."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from unlocked.kernels import cpp, cuda

pytestmark = pytest.mark.skipif(bool(cpp.unavailable("cpu")), reason="no C++ backend")

IMAGES, TOKENS = ((20, 8, 2), (3, 6, 3)), ((5, 24),)


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[str], Any]]:
    """Imports modules of benchmarks/."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    sys.modules.pop("kernels", None)  # the folder of that name, which something may have taken for a package
    yield importlib.import_module
    sys.path.remove(str(Path(__file__).parents[1] / "benchmarks"))


def cases(load: Callable[[str], Any], module: Any, dtype: torch.dtype = torch.float32) -> list[Any]:
    context = load("kernel_cases").Context(torch.device("cpu"), {"cpp": module}, False)
    return list(load("block_cases").block_cases(2, context, IMAGES, TOKENS, dtype))


def wrong(load: Callable[[str], Any], found: list[Any]) -> set[str]:
    """Operations with a contender beyond its tolerance."""
    kernels = load("kernels")
    errors = [(case.operation, kernels.check(case, list(case.makers)[1:])) for case in found]
    return {name for name, each in errors if any(off > kernels.tolerance(who) for who, off in each.items())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_blocks_kernels_agree_with_the_library(load: Callable[[str], Any], dtype: torch.dtype) -> None:
    found = cases(load, cpp, dtype)
    assert len(found) == 10
    word = " bf16" if dtype == torch.bfloat16 else ""
    assert all(list(case.makers) == ["reference", f"cpp{word}", f"eager{word}"] for case in found)
    assert not wrong(load, found)


def test_a_backend_without_an_operation_takes_no_part(load: Callable[[str], Any]) -> None:
    assert all(list(case.makers) == ["reference", "eager"] for case in cases(load, cuda))


def test_a_call_reads_what_the_last_one_read(load: Callable[[str], Any]) -> None:
    """Or times would be those of other and other values, at last of none that are finite. GELU's way back changes signs
    in place: every second call reads the same."""
    for case in cases(load, cpp):
        call = case.makers["cpp"](0)
        first = [t.abs().sum().item() for t in call()]
        again = [[t.abs().sum().item() for t in call()] for _ in range(2)]
        assert again[1] == pytest.approx(first, rel=1e-5), case.operation


def _broken(**operations: Callable[..., Any]) -> Any:
    return SimpleNamespace(**{**vars(cpp), **operations})


def _wrong_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    y, slope = cpp.gelu_forward(x)
    return y, slope * 1.01


def _wrong_places(x: Tensor) -> tuple[Tensor, Tensor]:
    y, places = cpp.max_pool_forward(x)
    return y, 3 - places


def _wrong_sides(grad: Tensor, y: Tensor, side: int, slope: float) -> Tensor:
    return cpp.sum_act_backward(grad, -y, side, slope)


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (_broken(gelu_forward=_wrong_slope), {"gelu_backward"}),
        (_broken(max_pool_forward=_wrong_places), {"max_pool_backward"}),
        (_broken(sum_act_backward=_wrong_sides), {"sum_act_backward"}),
    ],
)
def test_what_is_kept_for_the_way_back_is_checked(
    load: Callable[[str], Any], module: ModuleType, found: set[str]
) -> None:
    assert wrong(load, cases(load, module)) == found
