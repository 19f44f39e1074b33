"""Finds a C++ compiler, builds the library beside this file, and declares its functions to ctypes."""

import ctypes
import hashlib
import os
import platform
import shutil
import sys
from functools import lru_cache
from pathlib import Path

import torch

from unlocked.kernels.native import build_once

__all__ = ["build_library", "find_compiler", "load_kernels", "unavailable"]

_SOURCES = Path(__file__).parent
_BUILD_SECONDS = 100.0  # about ten on an idle machine; the other processes of a run wait no longer than two minutes
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=off",  # no fused multiply-adds but those that are written: the same bits from every compiler
    "-fno-math-errno",
    "-fno-trapping-math",  # lets a comparison become a blend
    "-fPIC",
    "-shared",
)


def find_compiler() -> Path | None:
    """$CXX, c++, g++ or clang++, whichever is found first."""
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return next((Path(found) for name in names if name and (found := shutil.which(name))), None)


@lru_cache
def unavailable(device: torch.device | str) -> str:
    """Why this backend can't run on `device`; empty if it can. The first call builds the library."""
    if torch.device(device).type != "cpu":
        return "the C++ kernels are for the CPU"
    try:
        load_kernels()
    except (ValueError, RuntimeError, OSError) as error:
        return str(error)
    return ""


@lru_cache
def load_kernels() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        ValueError: no compiler is found.
        RuntimeError: the compiler fails, or what it wrote can't be loaded.
    """
    path = build_library()
    try:
        loaded = ctypes.CDLL(str(path))
        for name in dir(_Signatures):
            if not name.startswith("_"):
                function = getattr(loaded, f"unlocked_{name}")
                function.argtypes, function.restype = getattr(_Signatures, name), None
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"the compiled kernels can't be used: {error}") from error
    return loaded


def build_library() -> Path:
    """The compiled kernels' file, made unless it is in the cache. Raises as `load_kernels`."""
    compiler = find_compiler()
    if compiler is None:
        raise ValueError("the C++ kernels need a compiler, found none of $CXX, c++, g++, clang++; install g++ or clang")
    # Machines that share a home may differ in their instructions, which -march=native is about.
    flags = [*_FLAGS, *_threading(), f"-DUNLOCKED_MACHINE=0x{_processor()}"]
    headers = sorted(_SOURCES.glob("*.h"))
    return build_once("cpu", compiler, flags, sorted(_SOURCES.glob("*.cpp")), headers, timeout=_BUILD_SECONDS)


_P, _I, _F, _D, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_double, ctypes.c_int


class _Signatures:
    """Argument types in the order of the sources."""

    batch_statistics = (_N, _P, _I, _I, _I, _I, _P, _P, _P, _F, _F, _P, _P, _P, _N)
    norm_act_forward = (
        *(_N, _P, _I, _I, _I, _I, _P, _P, _P, _P, _F, _I, _N, _I),
        *(_P, _P, _P, _P, _I, _I, _I, _I, _P, _N),
    )
    norm_act_backward = (_N, _P, _P, _I, _I, _I, _I, _P, _P, _P, _P, _P, _P, _F, _I, _P, _P, _P, _P, _N)
    norm_act_backward_full = (_N, _P, _P, _I, _I, _I, _I, _P, _P, _P, _P, _F, _P, _P, _P, _P, _N)
    local_head = (_P, _P, _P, _P, _N, _I, _I, _I, _I, _I, _I, _N, _F, _F, _P, _P, _P, _P)
    gelu_forward = (_N, _P, _I, _P, _P, _N)
    silu_forward = (_N, _P, _I, _P, _P, _N)
    gelu_backward = (_N, _P, _P, _I, _I, _I, _P, _P, _P, _N)
    attention_pays = (_P,)
    attention_scratch = (_I, _I, _P)
    attention_forward = (_N, _P, _P, _P, _I, _I, _I, _I, _I, _N, _F, _P, _P, _P, _P, _N)
    attention_backward = (_N, *(_P,) * 6, _I, _I, _I, _I, _I, _N, _F, _P, _P, _P, _P, _P, _N)
    sum_act_forward = (_N, _P, _P, _I, _I, _I, _I, _I, _F, _P, _P, _N)
    sum_act_backward = (_N, _P, _P, _I, _I, _I, _I, _I, _F, _P, _N)
    group_act_forward = (_N, _P, _I, _I, _I, _I, _I, _P, _P, _F, _N, _F, _I, _P, _P, _P, _P, _N)
    group_act_backward = (_N, _P, _P, _I, _I, _I, _I, _I, _P, _P, _P, _P, _N, _F, _I, _P, _P, _P, _N)
    max_pool_forward = (_N, _P, _I, _I, _I, _I, _P, _P, _N)
    max_pool_backward = (_N, _P, _P, _I, _I, _I, _I, _P, _N)
    transpose = (_N, _P, _I, _I, _I, _P, _N)
    score_gradients = (_N, _P, _P, _I, _I, _P, _I, _P, _F, _F, _P, _P)
    adam = (_N, _P, _P, _P, _P, _P, _P, _D, _D, _D, _D, _D, _N, _N)
    adamw_sf = (_N, _P, _P, _P, _P, _P, _D, _D, _D, _D, _D, _D, _N)
    sgd = (_N, _P, _P, _P, _P, _D, _D, _D, _N, _N, _N)
    winograd_pays = (_P,)
    winograd_rows = (_I, _I, _N, _P)
    winograd_kernel = (_P, _I, _I, _I, _I, _I, _I, _N, _P, _N)
    winograd_forward = (_P, _I, _I, _I, _I, _I, _I, _P, _P, _P, _P, _I, _N)
    winograd_kernel_grad = (_P, _P, _I, _I, _I, _I, _I, _I, _P, _I, _I, _I, _I, _P, _N)


def _threading() -> list[str]:
    """OpenMP, against the very runtime that torch has loaded: two of them would fight over the cores."""
    if sys.platform == "darwin":
        return []  # Apple's compiler has no OpenMP: one thread
    root = Path(torch.__file__).parent
    bundled = [*root.glob("lib/libgomp*.so*"), *root.parent.glob("torch.libs/libgomp*.so*")]
    return ["-fopenmp", *map(str, sorted(bundled)[:1])]


def _processor() -> str:
    """Eight hexadecimal digits that name this machine's kind of processor."""
    text = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        text += "".join(next((line for line in lines if line.startswith(key)), "") for key in ("flags", "Features"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]
