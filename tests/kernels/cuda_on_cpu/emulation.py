"""The CUDA kernels on the CPU: their sources compiled by a plain C++ compiler, every thread run, every access watched.

`emulated` puts them in the place of the compiled library: inside it, the functions of `unlocked.kernels.cuda` take
tensors of the CPU. What emulator.cpp finds wrong is the RuntimeError of a failed launch.
"""

import ctypes
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from unlocked.kernels.cpp.bindings import find_compiler
from unlocked.kernels.cuda import bindings, build, head, images, norm_act, weight_grad
from unlocked.kernels.native import build_once

__all__ = ["build_kernels", "emulated", "kernel_sources", "load", "unavailable"]

_HERE = Path(__file__).parent
# Contracted as nvcc contracts, where the machine has the instruction.
_INFO = Path("/proc/cpuinfo")
_FUSED = ("-mfma",) if _INFO.exists() and re.search(r"^flags\b.* fma ", _INFO.read_text(), re.M) else ()
_WATCHED = (
    *("-xc++", "-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-w"),
    *("-ffp-contract=fast", *_FUSED, "-fsanitize=thread"),
    "-fsanitize=alignment,bounds,integer-divide-by-zero,shift,signed-integer-overflow",
    *(flag for flag in build._FLAGS if flag.startswith("-D")),
)
# Where shared memory is: all that the kernels' library holds in static variables. And what tests of the emulator call.
_ALSO = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
extern char __bss_start[] __attribute__((visibility("hidden"))), _end[] __attribute__((visibility("hidden")));
extern "C" char* shared_begin() { return __bss_start; }
extern "C" char* shared_end() { return _end; }
static void empty() {}
extern "C" int launch_empty(int shared_bytes, int asked_for) {
  if (asked_for) cudaFuncSetAttribute(empty, cudaFuncAttributeMaxDynamicSharedMemorySize, asked_for);
  ::emulator::launch_kernel("empty", &empty, 1, 1, shared_bytes, nullptr);
  return cudaGetLastError();
}
extern "C" float half_to_float(int bits) { return __half2float(__ushort_as_half(bits)); }
extern "C" int float_to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }
extern "C" float bfloat16_to_float(int bits) { return __bfloat162float({static_cast<unsigned short>(bits)}); }
extern "C" int float_to_bfloat16(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
"""


def unavailable() -> str:
    """Why the kernels can't be run here; "" if they can."""
    if sys.platform != "linux":
        return "the emulator is made for Linux"
    return "" if find_compiler() else "needs a C++ compiler"


def kernel_sources() -> dict[str, str]:
    """The text of every file of kernels/cuda/, by its name."""
    folder = Path(build.__file__).parent
    return {path.name: path.read_text() for path in sorted(folder.glob("*.cu*"))}


@contextmanager
def emulated(multiprocessors: int, *, seed: int = 0, kernels: Path | None = None) -> Iterator[None]:
    """The functions of `unlocked.kernels.cuda` on the CPU, as on a device with so many multiprocessors.

    Args:
        seed: of the order in which blocks and threads run.
        kernels: what `build_kernels` gave, default: of the sources as they are.
    """
    library, emulator = load(kernels or _kernels_as_they_are())

    def launch(name: str, device: torch.device, *arguments: object) -> None:
        error = getattr(library, name)(0, None, *arguments)
        if error:
            raise RuntimeError(f"CUDA kernel launch {name} failed: {library.unlocked_error_text(error).decode()}")

    emulator.emulator_reset(multiprocessors, seed, library.shared_begin(), library.shared_end())
    limits = library.unlocked_multiprocessors(0), library.unlocked_shared_memory(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what nobody has written with NaN
    try:
        with pytest.MonkeyPatch.context() as patch, _Watching(emulator):
            for module in (head, images, norm_act, weight_grad):
                patch.setattr(module, "launch", launch)
                patch.setattr(module, "require_cuda", lambda name, tensor: None)
                if hasattr(module, "device_limits"):
                    patch.setattr(module, "device_limits", lambda index: limits)
            yield
    finally:
        torch.use_deterministic_algorithms(before)


class _Watching(TorchFunctionMode):
    """Tells the emulator of every tensor whose address is asked for, and keeps it, so that no other takes its place."""

    def __init__(self, emulator: ctypes.CDLL) -> None:
        super().__init__()
        self._emulator, self._kept = emulator, list[torch.Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.data_ptr and args[0].numel():
            tensor = args[0]
            self._kept.append(tensor)
            elements = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            self._emulator.emulator_tensor(result, elements * tensor.element_size())
        return result


def build_kernels(sources: Mapping[str, str] | None = None) -> Path:
    """The library of these sources (default: those of kernels/cuda/), compiled unless it is in the cache.

    Raises:
        RuntimeError: the compiler fails.
    """
    compiler = find_compiler()
    assert compiler is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shim in (_HERE / "shim").iterdir():
            (folder / shim.name).write_text(shim.read_text())
        for file, text in {**(sources or kernel_sources()), "also.cu": _ALSO}.items():
            (folder / file).write_text(_translate(text))
        headers = [*folder.glob("*.cuh"), *folder.glob("*.h")]

        def compile_unit(unit: Path) -> Path:  # to an object file, whatever its suffix says
            return build_once(f"emulated-{unit.stem}", compiler, (*_WATCHED, "-c"), [unit], headers)

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_unit, sorted(folder.glob("*.cu"))))
    # A library of its own for the emulator: what it keeps must not lie in the kernels' shared memory.
    return build_once("emulated-kernels", compiler, ("-shared",), [*objects, _emulator(compiler)])


@lru_cache
def _kernels_as_they_are() -> Path:
    return build_kernels()


@lru_cache
def _emulator(compiler: Path) -> Path:
    flags = ("-std=c++17", "-O2", "-fPIC", "-shared")
    return build_once("emulator", compiler, flags, [_HERE / "emulator.cpp"], (_HERE / "shim").iterdir())


@lru_cache
def load(path: Path) -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """(the kernels that `build_kernels` gave, the emulator)."""
    compiler = find_compiler()
    assert compiler is not None
    emulator = ctypes.CDLL(str(_emulator(compiler)), mode=ctypes.RTLD_GLOBAL)
    emulator.emulator_tensor.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    emulator.emulator_reset.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p]
    library = bindings.load_library(str(path))
    library.shared_begin.restype = library.shared_end.restype = ctypes.c_void_p
    return library, emulator


def _translate(text: str) -> str:
    """CUDA's two pieces of syntax that C++ does not have: launches, and shared memory sized by the launch."""
    text = re.sub(
        r"extern __shared__ (\w+) (\w+)\[\];", r"\1* const \2 = static_cast<\1*>(::emulator::dynamic_shared());", text
    )
    text = re.sub(r"#include <(cuda\w*\.h)>", r'#include "\1"', text)
    while (at := text.find("<<<")) >= 0:
        begin, middle = _callee(text, at), text.index(">>>", at)
        opening = text.index("(", middle)
        name, shape = text[begin:at].strip(), text[at + 3 : middle]
        call = f'::emulator::launch_kernel("{name.split("<")[0]}", &{name}, {shape}, '
        text = text[:begin] + call + text[opening + 1 :]
    return text


def _callee(text: str, end: int) -> int:
    """Where the name before `end` begins, template arguments included."""
    end = len(text[:end].rstrip())
    depth = 0
    while depth or text[end - 1] in "<>_" or text[end - 1].isalnum():
        end -= 1
        depth += {">": 1, "<": -1}.get(text[end], 0)
    return end
