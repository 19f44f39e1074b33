"""The compiled library in Python: its C functions, their arguments, their errors, and the checks of tensors."""

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from unlocked.kernels.cuda import build

__all__ = [
    "DTYPES",
    "Geometry",
    "device_limits",
    "floats",
    "launch",
    "load_library",
    "pointer",
    "require",
    "require_cuda",
    "unavailable",
]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DataType in common.cuh


class Geometry(ctypes.Structure):
    """`Geometry` of common.cuh, which says what the fields mean."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("batch", "channels", "height", "width"),
            *("grid_h", "grid_w", "window_h", "window_w", "cell_h", "cell_w", "out_h", "out_w"),
            *("splits", "blocks", "groups", "group_rows", "channels_last", "wide"),
        )
    ]


# Arguments after (device, stream): p pointer, i int, l int64_t, f float, g const Geometry*.
_SIGNATURES = {
    "unlocked_moments": "i g pp",
    "unlocked_apply": "ii g pp ppp pp pp pp pp fff",
    "unlocked_backward": "iii g pp pppp pp p ppp f",
    "unlocked_backward_full": "i g pp pppp p ppp f",
    "unlocked_weight_grad": "ii p pp pppp pp p pp pp f",
    "unlocked_head": "iii l iii i ll iii pppp p pp pppp ppp pp fff",
    "unlocked_load_batch": "lll iii ppp pp pp p i pp l iii f",
}
_TYPES = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int,
    "l": ctypes.c_int64,
    "f": ctypes.c_float,
    "g": ctypes.POINTER(Geometry),
}


def unavailable(device: torch.device | str) -> str:
    """Why the kernels can't run on `device`; "" if they can. They need a CUDA device of compute capability 7.5 or
    newer, the oldest that nvcc 13 compiles for, and, to be compiled on first use, nvcc.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return f"CUDA kernels need a CUDA device, not {device.type}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if device.index is not None and device.index >= torch.cuda.device_count():
        return f"there are {torch.cuda.device_count()} CUDA devices"
    capability = torch.cuda.get_device_capability(device)
    if capability < build.OLDEST:
        needed, has = (f"{major}.{minor}" for major, minor in (build.OLDEST, capability))
        return f"CUDA kernels need compute capability {needed} or newer, the device has {has}"
    if build.find_compiler() is None:
        return "nvcc is found in none of $CUDA_HOME/bin, PATH, /usr/local/cuda/bin; install the CUDA toolkit"
    return ""


def launch(name: str, device: torch.device, *arguments: object) -> None:
    """Calls the C function `name` on the current stream of `device`.

    Raises:
        RuntimeError: CUDA refuses the launch.
    """
    index = device.index
    if torch.cuda.current_device() != index:
        with torch.cuda.device(index):
            return launch(name, device, *arguments)
    library = _library(index)
    error = getattr(library, name)(index, torch.cuda.current_stream().cuda_stream, *arguments)
    if error:
        title, text = library.unlocked_error_name(error).decode(), library.unlocked_error_text(error).decode()
        raise RuntimeError(f"CUDA kernel launch {name} failed on {device}: {title} ({text})")
    return None


@lru_cache
def device_limits(index: int) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory that one block may ask for) of a CUDA device."""
    library = _library(index)
    return library.unlocked_multiprocessors(index), library.unlocked_shared_memory(index)


def floats(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uninitialised float32 on the device of `like`."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def require_cuda(name: str, tensor: Tensor) -> None:
    if not tensor.is_cuda:
        raise ValueError(
            f"{name} must be on a CUDA device for the cuda kernels, it is on {tensor.device}; move it there or choose "
            "the torch kernels"
        )


def require(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> None:
    """ValueError unless `tensor` is contiguous, has this shape and dtype, and is on the device of `like`."""
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device != like.device:
        raise ValueError(
            f"{name} must be {dtype} {list(shape)} on {like.device}, got {tensor.dtype} {list(tensor.shape)} on "
            f"{tensor.device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, it has strides {tensor.stride()}; call .contiguous()")


@lru_cache
def _library(index: int) -> ctypes.CDLL:
    return load_library(str(build.build_library(build.architecture(torch.cuda.get_device_capability(index)))))


@lru_cache
def load_library(path: str) -> ctypes.CDLL:
    """The library at `path` with its functions' argument types set."""
    library = ctypes.CDLL(path)
    for name, letters in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = [ctypes.c_int, ctypes.c_void_p, *(_TYPES[letter] for letter in letters.replace(" ", ""))]
        function.restype = ctypes.c_int
    for name in ("unlocked_error_name", "unlocked_error_text"):
        getattr(library, name).argtypes = [ctypes.c_int]
        getattr(library, name).restype = ctypes.c_char_p
    sizes = ("unlocked_geometry_bytes", "unlocked_convolution_bytes")
    for name in ("unlocked_multiprocessors", "unlocked_shared_memory", *sizes):
        getattr(library, name).argtypes = [ctypes.c_int]
        getattr(library, name).restype = ctypes.c_int
    return library
