"""Kernel tests run on the GPU where there is one; otherwise Triton's in its interpreter, and CUDA's emulated."""

from collections.abc import Iterator

import pytest
import torch
from cuda_on_cpu import emulation


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, what runs on it is a test that needs it; those that draw shapes compile for too long."""
    if torch.cuda.is_available():
        for item in items:
            draws = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
            if "kernel_device" in getattr(item, "fixturenames", ()) and not draws:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def kernel_device() -> str:
    """The device that kernels under test run on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=[pytest.param("gpu", marks=pytest.mark.gpu), "2 multiprocessors", "132 multiprocessors"])
def cuda_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the tensors of the CUDA kernels lie: on the GPU, or on the CPU, where devices of two sizes are emulated."""
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        yield "cuda"
        return
    if reason := emulation.unavailable():
        pytest.skip(reason)
    with emulation.emulated(int(request.param.split()[0])):
        yield "cpu"
