"""Compiles the CUDA sources beside this file into one shared library, once per machine and version.

The library has a plain C interface: no torch header is compiled, so a build takes seconds, works where torch is a CPU
build, and stays valid across torch versions. It is kept in `cache_directory()` under a name that hashes the sources,
the flags, the compiler's version and the architecture.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

__all__ = [
    "CHUNK",
    "HEAD_THREADS",
    "REDUCE_THREADS",
    "THREADS",
    "architecture",
    "build_library",
    "cache_directory",
    "find_compiler",
]

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


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/unlocked, or ~/.cache/unlocked."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "unlocked"


def build_library(arch: str) -> Path:
    """The library for nvcc's architecture `arch`, compiled unless it is in the cache.

    Several processes may call this at once: one compiles, the others wait for it. A log with the compiler's report
    (registers, spills) lies beside the library, with the suffix .log.

    Raises:
        ValueError: no compiler is found.
        RuntimeError: the compiler fails; the text ends with what it said.
    """
    compiler = find_compiler()
    if compiler is None:
        raise ValueError("the CUDA kernels need nvcc, found in none of $CUDA_HOME/bin, PATH, /usr/local/cuda/bin")
    target = cache_directory() / f"kernels-{_key(compiler, arch)}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_suffix(".lock")):
        if not target.exists():
            _compile(compiler, arch, target)
    return target


def _compile(compiler: Path, arch: str, target: Path) -> None:
    sources = sorted(_SOURCES.glob("*.cu"))
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
        built = Path(folder) / target.name
        command = [
            str(compiler),
            *_FLAGS,
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            f"--threads={min(len(sources), os.cpu_count() or 1)}",
            "-o",
            str(built),
            *map(str, sources),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        log = result.stdout + result.stderr
        if result.returncode or not built.exists():
            raise RuntimeError(f"{compiler} failed (exit status {result.returncode}) for sm_{arch}:\n{log[-4000:]}")
        report = built.with_suffix(".log")
        report.write_text(log)
        # A rename within one directory is atomic: whoever sees the library sees all of it.
        report.replace(target.with_suffix(".log"))
        built.replace(target)


def _key(compiler: Path, arch: str) -> str:
    digest = hashlib.sha256()
    for path in sorted([*_SOURCES.glob("*.cu"), *_SOURCES.glob("*.cuh")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for text in (*_FLAGS, arch, _compiler_version(compiler)):
        digest.update(text.encode() + b"\0")
    return f"{digest.hexdigest()[:20]}-sm_{arch}"


@lru_cache
def _compiler_version(compiler: Path) -> str:
    return subprocess.run([str(compiler), "--version"], capture_output=True, text=True, check=True).stdout


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time. Where the file system has no locks, all build, and the last rename wins."""
    with path.open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
