"""The C++ backend with 3 x 3 convolutions by Winograd's minimal filtering F(2x2, 3x3): `kernels="cpp_winograd"`.

Sixteen multiplications in the place of 36, forward, for the kernel's gradient and for the input's (A. Lavin and S.
Gray, arXiv 1509.09308; `winograd.h` has the formulas). A name of its own, because the sums are other ones than the
library's: about as far from the exact ones (docs/performance.md), but not the same bits.
"""

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from unlocked.kernels import cpp
from unlocked.kernels.cpp import (
    attention_backward,
    attention_forward,
    gelu_backward,
    gelu_forward,
    group_act_backward,
    group_act_forward,
    load_batch,
    local_head,
    max_pool_backward,
    max_pool_forward,
    norm_act_backward,
    norm_act_backward_full,
    norm_act_forward,
    score_gradients,
    silu_forward,
    sum_act_backward,
    sum_act_forward,
    takes_attention,
    transposed,
)
from unlocked.kernels.cpp.bindings import load_kernels

__all__ = [
    "ABILITIES",
    "attention_backward",
    "attention_forward",
    "convolution",
    "convolution_backward",
    "gelu_backward",
    "gelu_forward",
    "group_act_backward",
    "group_act_forward",
    "load_batch",
    "local_head",
    "max_pool_backward",
    "max_pool_forward",
    "norm_act_backward",
    "norm_act_backward_full",
    "norm_act_forward",
    "score_gradients",
    "silu_forward",
    "sum_act_backward",
    "sum_act_forward",
    "takes_attention",
    "takes_convolution",
    "transposed",
    "unavailable",
]

ABILITIES = replace(cpp.ABILITIES, convolutions=True)

_POINTS = 16  # products of matrices that stand for a convolution
_LANES, _COLUMNS = 16, 32  # channels of the input and of the output come in groups of these
_SUMMED_TILES = 128  # winograd.cpp: kSummedTiles
_own = threading.local()


def unavailable(device: torch.device | str) -> str:
    """Why this backend can't run on `device`; empty if it can."""
    if problem := cpp.unavailable(device):
        return problem
    pays = ctypes.c_int()
    load_kernels().unlocked_winograd_pays(ctypes.addressof(pays))
    return "" if pays.value else "it needs a processor with AVX-512; --kernels cpp runs on this one"


def takes_convolution(
    channels: int, outputs: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> bool:  # fmt: skip
    """Whether such a convolution is made by filtering, going forward; others go to the library.

    Args:
        channels: of the input; a multiple of 16.
        outputs: channels of the result; a multiple of 32.
        kernel: 3 x 3, at stride and dilation 1, of one group, padded alike in both directions by at most 2.
    """
    plain = tuple(kernel) == (3, 3) and all(tuple(size) == (1, 1) for size in (stride, dilation)) and groups == 1
    return plain and channels % _LANES == 0 and outputs % _COLUMNS == 0 and padding[0] == padding[1] <= 2


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """As `torch.nn.functional.conv2d`: [B, C, H, W] -> [B, K, H', W'].

    Args:
        x: float32 in channels-last memory, or the library takes it.
        weight: [K, C, 3, 3] or of another size, then the library takes it.
    """
    if not _takes(x, weight, stride, padding, dilation, groups):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return _filtered(x, weight, bias, padding[0], adjoint=False)


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    asked: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients at x, of the kernel (like `weight`) and of the bias, as far as they are asked for, from `grad`
    [B, K, H', W']."""
    options = (stride, padding, dilation, False, [0, 0], groups)
    sizes = [weight.shape[0]]
    if not _takes(x, weight, stride, padding, dilation, groups):
        result: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
            grad, x, weight, sizes, *options, list(asked)
        )
        return result
    grad = grad.contiguous(memory_format=torch.channels_last)
    of_input = of_kernel = None
    if asked[0] and weight.shape[0] % _LANES == 0 and weight.shape[1] % _COLUMNS == 0:
        of_input = _filtered(grad, weight, None, 2 - padding[0], adjoint=True)
    elif asked[0]:
        masks = [True, False, False]
        of_input = torch.ops.aten.convolution_backward(grad, x, weight, sizes, *options, masks)[0]
    if asked[1]:
        of_kernel = _kernel_gradient(grad, x, weight, padding[0])
    return of_input, of_kernel, grad.sum((0, 2, 3)) if asked[2] else None


def _takes(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> bool:
    outputs, channels, *kernel = weight.shape
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if not takes_convolution(channels, outputs, kernel, stride, padding, dilation, groups):
        return False
    small = min(x.shape[2:]) + 2 * padding[0] < 3
    return not small and x.numel() > 0 and x.is_contiguous(memory_format=torch.channels_last)


def _filtered(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, *, adjoint: bool) -> Tensor:
    """The convolution of x with the kernel, or with its adjoint, which takes outputs to inputs."""
    compiled, threads = load_kernels(), torch.get_num_threads()
    batch, channels, height, width = x.shape
    of_outputs, of_channels, *taps = weight.stride()
    outputs = weight.shape[1 if adjoint else 0]
    if adjoint:
        of_outputs, of_channels = of_channels, of_outputs
    out_height, out_width = height + 2 * padding - 2, width + 2 * padding - 2
    tiles = batch * -(-out_height // 2) * -(-out_width // 2)
    rows = ctypes.c_int64()
    compiled.unlocked_winograd_rows(channels, tiles, threads, ctypes.addressof(rows))
    of_panels = _POINTS * channels * outputs
    scratch = _scratch(of_panels + threads * _POINTS * rows.value * (channels + _COLUMNS))
    panels, rest = scratch.data_ptr(), scratch[of_panels:].data_ptr()
    compiled.unlocked_winograd_kernel(
        weight.data_ptr(), outputs, channels, of_outputs, of_channels, *taps, int(adjoint), panels, threads
    )
    sizes = (batch, outputs, out_height, out_width)
    result = torch.empty(sizes, memory_format=torch.channels_last)
    added = None if bias is None else bias.contiguous()
    compiled.unlocked_winograd_forward(
        x.data_ptr(),
        *(batch, channels, height, width, padding, outputs),
        panels,
        None if added is None else added.data_ptr(),
        *(result.data_ptr(), rest, rows.value, threads),
    )
    return result


def _kernel_gradient(grad: Tensor, x: Tensor, weight: Tensor, padding: int) -> Tensor:
    batch, channels, height, width = x.shape
    outputs = weight.shape[0]
    scratch = _scratch(_POINTS * (_SUMMED_TILES * (channels + outputs) + channels * outputs))
    result = torch.empty_like(weight)
    load_kernels().unlocked_winograd_kernel_grad(
        *(grad.data_ptr(), x.data_ptr()),
        *(batch, channels, height, width, padding, outputs),
        result.data_ptr(),
        *result.stride(),
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return result


def _scratch(size: int) -> Tensor:
    """`size` floats of this thread's own, which the next call uses again: fresh memory would cost a page fault for
    every 4 KiB."""
    kept: Tensor | None = getattr(_own, "scratch", None)
    if kept is None or kept.numel() < size:
        kept = _own.scratch = torch.empty(size)
    return kept
