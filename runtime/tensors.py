"""Named tensors as plain bytes, for a digest and for the way from one process to another; and their strides."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["give_strides", "pack_tensors", "tensor_bytes", "unpack_tensors", "weights_digest"]


def weights_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names and little-endian bytes of all parameters and buffers, in layer order."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def pack_tensors(tensors: Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """Plain data that msgpack can carry from a stage to rank 0."""
    return [
        {"name": n, "shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), "data": tensor_bytes(t)}
        for n, t in tensors
    ]


def unpack_tensors(packed: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
    """The inverse of `pack_tensors`."""
    result = {}
    for entry in packed:
        dtype = getattr(torch, entry["dtype"])
        flat = torch.frombuffer(bytearray(entry["data"]), dtype=dtype) if entry["data"] else torch.empty(0, dtype=dtype)
        result[entry["name"]] = flat.reshape(entry["shape"])
    return result


def tensor_bytes(tensor: Tensor) -> bytes:
    """The values in logical order, little-endian."""
    array = tensor.detach().cpu().contiguous()
    if array.dtype in (torch.bfloat16, torch.float16):
        array = array.view(torch.int16)
    values = array.numpy()
    return np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).tobytes()


def give_strides(value: Tensor, strides: tuple[int, ...]) -> None:
    """Lays the same values out anew, in place: a network computes other bits from weights with other strides."""
    if value.stride() != strides:
        laid_out = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
        value.data = laid_out.copy_(value.detach())
