"""The numeric precision of a run: `fp32`, `tf32` or `bf16`.

What is what, in every engine:

- `fp32`: every product and every sum in float32.
- `tf32`: tensors are float32; convolutions and matrix products of the library round their inputs to 10 bits of mantissa
  on the way into the tensor cores and add up in float32. A CUDA device's choice: a CPU has no such unit.
- `bf16`: convolutions and linear maps take bfloat16 and give bfloat16 (added up in float32 inside). What passes from
  layer to layer is bfloat16, in one stage as between two, so that no placement changes a number. Float32 stay: the
  weights that the optimizer changes (a cast of them is made for each step), their gradients when they reach the
  optimizer, the optimizer's state, BatchNorm's parameters and statistics, everything inside the local head, losses and
  sums, and the whole output layer (10 columns are not worth three casts).
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

__all__ = ["PRECISIONS", "check_precision", "float32_products", "repeatable_kernels", "storage_dtype"]

PRECISIONS = ("fp32", "tf32", "bf16")


def check_precision(precision: str, device: torch.device) -> None:
    """Raises a ValueError if `precision` is not known or `device` can't compute with it."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not known; valid: {', '.join(PRECISIONS)}")
    if precision == "tf32" and device.type != "cuda":
        raise ValueError("precision 'tf32' is for the tensor cores of a CUDA device, not for the CPU; use fp32 or bf16")
    if precision != "fp32" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            raise ValueError(
                f"precision {precision!r} needs compute capability 8.0 or newer, the device has "
                f"{capability[0]}.{capability[1]}; use fp32"
            )


def storage_dtype(precision: str) -> torch.dtype:
    """What activations are stored in between two layers."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Inside, the library's float32 convolutions and products run in tf32 if `precision` is tf32, else in float32.

    Both must be said: by default torch takes tf32 for convolutions and float32 for matrix products. And both of torch's
    ways to say it: who reads by the older one (torch.compile does) raises where only the newer was told.
    """
    before, tf32 = _Flags.read(), precision == "tf32"
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        for place in _places():
            place.fp32_precision = "tf32" if tf32 else "ieee"
        yield
    finally:
        before.write()


@contextlib.contextmanager
def repeatable_kernels(device: torch.device | str) -> Iterator[None]:
    """Inside, cuDNN's and cuBLAS's kernels on a CUDA device give the same bits in every run. Elsewhere nothing changes:
    a CPU's do with equal numbers of threads. Torch's own kernels that add by chance, such as those of `index_add_`,
    are left to `torch.use_deterministic_algorithms`.

    Set CUBLAS_WORKSPACE_CONFIG=:4096:8 yourself where this process has multiplied on the device before: cuBLAS looks
    at it once.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


class _Flags(NamedTuple):
    """Torch's switches for tf32, by its older ways to say it and by the newer."""

    convolutions: bool | None  # None: at odds with the newer one, so that it can't be read
    products: str | None
    newer: tuple[str, ...]

    @classmethod
    def read(cls) -> "_Flags":
        convolutions = products = None
        with contextlib.suppress(RuntimeError):
            convolutions = torch.backends.cudnn.allow_tf32
        with contextlib.suppress(RuntimeError):
            products = torch.get_float32_matmul_precision()
        return cls(convolutions, products, tuple(place.fp32_precision for place in _places()))

    def write(self) -> None:
        # The older ones also write the newer, so they come first.
        if self.convolutions is not None:
            torch.backends.cudnn.allow_tf32 = self.convolutions
        if self.products is not None and self.products != torch.get_float32_matmul_precision():
            torch.set_float32_matmul_precision(self.products)
        for place, word in zip(_places(), self.newer, strict=True):
            place.fp32_precision = word


def _places() -> tuple[Any, ...]:
    """Where the newer way says it: for products, convolutions and recurrent layers."""
    cudnn: Any = torch.backends.cudnn
    return torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn
