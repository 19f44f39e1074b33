"""Kernel tests run on the GPU where there is one, otherwise in Triton's interpreter on the CPU."""

import pytest
import torch


@pytest.fixture(scope="session")
def kernel_device() -> str:
    """The device that kernels under test run on."""
    return "cuda" if torch.cuda.is_available() else "cpu"
