"""Compiles the CUDA sources beside this file into one shared library, once per machine, version and architecture.

The library has a plain C interface, so it also builds where torch is a CPU build. See ../native.py for the cache.
"""

import os
import shutil
from pathlib import Path

from unlocked.kernels.native import build_once

__all__ = [
    "CHUNK",
    "HEAD_THREADS",
    "OLDEST",
    "REDUCE_THREADS",
    "THREADS",
    "architecture",
    "build_library",
    "find_compiler",
]

OLDEST = (7, 5)  # compute capability; nvcc 13 has given up those before it

# Launch constants that both sides need; the sources get them as macros.
THREADS = 256  # per block, kernels that write full tensors: three or two blocks per SM at 80 to 120 registers
REDUCE_THREADS = 512  # per block, kernels that only reduce: one block per SM keeps 64 KiB of loads in flight
HEAD_THREADS = 512  # per block of the local head
CHUNK = 32  # channels per block in channels-last memory: one 128-byte line of float32

_SOURCES = Path(__file__).parent
_USUAL_PLACE = Path("/usr/local/cuda/bin/nvcc")
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-Xptxas=-v",  # registers and spills go to the log beside the library
    "-Xcompiler=-fPIC",
    "-shared",
    "--threads=0",  # as many as there are cores
    f"-DUNLOCKED_THREADS={THREADS}",
    f"-DUNLOCKED_REDUCE_THREADS={REDUCE_THREADS}",
    f"-DUNLOCKED_HEAD_THREADS={HEAD_THREADS}",
    f"-DUNLOCKED_CHUNK={CHUNK}",
)


def find_compiler() -> Path | None:
    """nvcc in $CUDA_HOME/bin, on PATH, or in /usr/local/cuda/bin; None if it is nowhere."""
    home = os.environ.get("CUDA_HOME")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(_USUAL_PLACE)
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def architecture(capability: tuple[int, int]) -> str:
    """nvcc's name of a compute capability: "90a" for Hopper (with its own instructions), else "80", "86", ..."""
    major, minor = capability
    return "90a" if (major, minor) == (9, 0) else f"{major}{minor}"


def build_library(arch: str) -> Path:
    """The library for nvcc's architecture `arch`, compiled unless it is in the cache. The log beside it (suffix .log)
    has every kernel's registers and spills.

    Raises:
        ValueError: no compiler is found.
        RuntimeError: the compiler fails; the text ends with what it said.
    """
    compiler = find_compiler()
    if compiler is None:
        raise ValueError("the CUDA kernels need nvcc, found in none of $CUDA_HOME/bin, PATH, /usr/local/cuda/bin")
    flags = (*_FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}")
    return build_once(f"cuda-sm_{arch}", compiler, flags, sorted(_SOURCES.glob("*.cu")), _SOURCES.glob("*.cuh"))
