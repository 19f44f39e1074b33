"""The numerics: plain PyTorch references, Triton, CUDA C++ and C++ twins, one dispatch. Knows tensors only."""

from typing import Literal

BackendName = Literal["auto", "torch", "triton", "cuda", "cpp", "triton_joined", "cpp_winograd"]

__all__ = ["BackendName"]
