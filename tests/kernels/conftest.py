"""Kernel tests run on the GPU where there is one, otherwise in Triton's interpreter on the CPU."""

import os

import pytest
import torch

# Triton reads the variable when a kernel is decorated, hence before any import of the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def kernel_device() -> str:
    """The device that kernels under test run on."""
    return "cuda" if torch.cuda.is_available() else "cpu"
