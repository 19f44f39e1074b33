"""The numerics: plain PyTorch references, Triton and CUDA C++ twins, one dispatch. Knows tensors only."""

from typing import Literal

BackendName = Literal["auto", "torch", "triton", "cuda"]

__all__ = ["BackendName"]
