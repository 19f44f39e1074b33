"""Scaled dot-product attention and its gradients, over the C++ kernels.

No other backend has it: where one does not say `Abilities.attention`, the local step takes the library's."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from unlocked.kernels.cpp.bindings import load_kernels

__all__ = ["attention_backward", "attention_forward", "takes_attention"]

_FEWEST_KEYS = 32  # with fewer, what is copied and padded costs more than it saves
_MOST_KEYS = 1024  # with more, a thread's copies of a head leave its second cache
_MOST_KEYS_OF_PRODUCTS = 256  # up to here bfloat16's own products are faster than any that are made in float32


def takes_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these are for the kernels: [B, heads, T, d] and [B, heads, S, d], one type and one width for all, S of 32
    to 1,024, in bfloat16 above 256, on a processor that multiplies and adds sixteen numbers at once."""
    plain = q.dim() == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3] and k.shape == v.shape
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.bfloat16):
        return False
    fewest = _FEWEST_KEYS if q.dtype == torch.float32 else _MOST_KEYS_OF_PRODUCTS + 1
    return plain and fewest <= k.shape[2] <= _MOST_KEYS and q.numel() > 0 and _pays()


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """(softmax(s q kT) v, the rows' log-sum-exp [B, heads, T] float32).

    Args:
        q: [B, heads, T, d], float32 or bfloat16.
        k: [B, heads, S, d], like it.
        v: [B, heads, S, d].
        causal: query i sees the keys up to i alone.
        scale: s; None: 1 / sqrt(d).

    Returns:
        The result is [B, heads, T, d], with a position's heads side by side in memory.
    """
    q, k, v = (_in_rows(x) for x in (q, k, v))
    batch, heads, queries, d = q.shape
    y = torch.empty(batch, queries, heads, d, dtype=q.dtype).transpose(1, 2)
    sums = torch.empty(batch, heads, queries)
    strides, threads = _strides([q, k, v, y]), torch.get_num_threads()
    scratch = _scratch(k.shape[2], d, threads)
    load_kernels().unlocked_attention_forward(
        int(q.dtype == torch.bfloat16),
        *(x.data_ptr() for x in (q, k, v)),
        *(batch, heads, queries, k.shape[2], d, int(causal), d**-0.5 if scale is None else scale),
        y.data_ptr(),
        ctypes.addressof(strides),
        sums.data_ptr(),
        scratch.data_ptr(),
        threads,
    )
    return y, sums


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor, out: Sequence[Tensor], *,
    causal: bool = False, scale: float | None = None,
) -> None:  # fmt: skip
    """Writes the gradients at q, k and v.

    Args:
        grad: that of the result, [B, heads, T, d].
        q: as `attention_forward` had it, and so are `k` and `v`.
        y: the result.
        sums: what came with it.
        out: where they go, in the shapes and the type of q, k and v.
    """
    grad, q, k, v = (_in_rows(x) for x in (grad.to(q.dtype), q, k, v))
    batch, heads, queries, d = q.shape
    places = [x if x.stride(-1) == 1 else torch.empty(x.shape, dtype=x.dtype) for x in out]
    strides, threads = _strides([grad, q, k, v, y, *places]), torch.get_num_threads()
    scratch = _scratch(k.shape[2], d, threads)
    load_kernels().unlocked_attention_backward(
        int(q.dtype == torch.bfloat16),
        *(x.data_ptr() for x in (grad, q, k, v, y, sums)),
        *(batch, heads, queries, k.shape[2], d, int(causal), d**-0.5 if scale is None else scale),
        *(x.data_ptr() for x in places),
        ctypes.addressof(strides),
        scratch.data_ptr(),
        threads,
    )
    for place, x in zip(places, out, strict=True):
        if place is not x:
            x.copy_(place)


@lru_cache
def _pays() -> bool:
    pays = ctypes.c_int()
    load_kernels().unlocked_attention_pays(ctypes.addressof(pays))
    return bool(pays.value)


def _in_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(tensors: Sequence[Tensor]) -> "ctypes.Array[ctypes.c_int64]":
    values = [stride for x in tensors for stride in x.stride()[:3]]
    return (ctypes.c_int64 * len(values))(*values)


def _scratch(keys: int, d: int, threads: int) -> Tensor:
    size = ctypes.c_int64()
    load_kernels().unlocked_attention_scratch(keys, d, ctypes.addressof(size))
    return torch.empty(threads * size.value)
