"""A convolution's weight gradient in CUDA C++ with the way back through BatchNorm and LeakyReLU inside.

A contender in plain float32, which needs no tensor cores: no local step takes it.
"""

import ctypes
from ctypes import byref

import torch
from torch import Tensor

from unlocked.kernels.cuda.bindings import DTYPES, floats, launch, require, require_cuda
from unlocked.kernels.cuda.build import CHUNK

__all__ = ["Convolution", "norm_act_weight_grad"]

Pair = tuple[int, int]

_STEP_PIXELS, _TILE_COLUMNS = 32, 64  # of weight_grad.cu
_BLOCKS = 264  # two on each multiprocessor of an H100; the same everywhere, as the order of the sums depends on it
_MOST_BLOCKS = 65535  # of a grid's second and third side


class Convolution(ctypes.Structure):
    """`Convolution` of weight_grad.cu, which says what the fields mean."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                *("batch", "channels", "height", "width", "source_channels", "source_height", "source_width"),
                *("kernel_h", "kernel_w", "step_h", "step_w", "pad_h", "pad_w", "dilation_h", "dilation_w"),
                *("side", "splits", "split_pixels"),
            )
        ),
        *((name, ctypes.c_int64 * 4) for name in ("conv_stride", "source_stride", "kernel_stride")),
    ]


def norm_act_weight_grad(
    latents_grad: Tensor,
    conv: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask_sums: Tensor,
    mask_xhat_sums: Tensor,
    source: Tensor,
    kernel: Tensor,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    latent_size: int,
    negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `unlocked.kernels.triton.norm_act_weight_grad`, in plain float32 whatever torch's convolutions take.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        RuntimeError: CUDA refuses a launch.
    """
    c = _convolution(conv, source, kernel, stride, padding, dilation, latent_size)
    for name, vector in (("mean", mean), ("rstd", rstd), ("weight", weight), ("bias", bias)):
        require(name, vector, (c.channels,), torch.float32, conv)
    columns = (c.batch, c.channels * latent_size**2)
    require("mask_sums", mask_sums, columns, torch.float32, conv)
    require("mask_xhat_sums", mask_xhat_sums, columns, torch.float32, conv)
    latents_grad = latents_grad.contiguous()
    is_float = latents_grad.dtype == torch.float32
    require("latents_grad", latents_grad, columns, torch.float32 if is_float else conv.dtype, conv)
    require_cuda("conv", conv)
    kernel_grad = torch.empty_like(kernel)
    c.kernel_stride[:] = kernel_grad.stride()
    weight_grad, bias_grad = floats((2, c.channels), conv).unbind()
    partials = floats((c.splits, kernel.numel()), conv)
    launch(
        "unlocked_weight_grad",
        conv.device,
        *(DTYPES[conv.dtype], int(is_float), byref(c), latents_grad.data_ptr(), conv.data_ptr()),
        *(mean.data_ptr(), rstd.data_ptr(), weight.data_ptr(), bias.data_ptr()),
        *(mask_sums.data_ptr(), mask_xhat_sums.data_ptr(), source.data_ptr(), partials.data_ptr()),
        *(kernel_grad.data_ptr(), weight_grad.data_ptr(), bias_grad.data_ptr(), negative_slope),
    )
    return kernel_grad, weight_grad, bias_grad


def _convolution(
    conv: Tensor, source: Tensor, kernel: Tensor, stride: Pair, padding: Pair, dilation: Pair, latent_size: int
) -> Convolution:
    """Checked: `conv` can be the output of `source` and `kernel`."""
    for name, tensor in {"conv": conv, "source": source, "kernel": kernel}.items():
        if tensor.dim() != 4 or tensor.dtype not in DTYPES or tensor.numel() == 0:
            raise ValueError(
                f"{name} must be non-empty float32, bfloat16 or float16 with four dimensions, got {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
        if tensor.dtype != conv.dtype or tensor.device != conv.device:
            raise ValueError(f"{name} must be {conv.dtype} on {conv.device} like conv, got {tensor.dtype}")
    batch, channels, height, width = conv.shape
    sizes = zip(source.shape[2:], kernel.shape[2:], stride, padding, dilation, strict=True)
    sides = [(size + 2 * pad - spread * (taps - 1) - 1) // step + 1 for size, taps, step, pad, spread in sizes]
    if [source.shape[0], *kernel.shape[:2], *sides] != [batch, channels, source.shape[1], height, width]:
        raise ValueError(
            f"no convolution of one group with stride {stride}, padding {padding} and dilation {dilation} makes conv "
            f"{list(conv.shape)} of source {list(source.shape)} and kernel {list(kernel.shape)}"
        )
    if latent_size < 1 or height % latent_size or width % latent_size:
        raise ValueError(f"latent pooling to {latent_size} does not tile {height} x {width} pixels")
    chunks = -(-channels // CHUNK)
    if chunks > _MOST_BLOCKS:
        raise ValueError(f"the CUDA kernels take at most {_MOST_BLOCKS * CHUNK} channels, got {channels}")
    pixels, tiles = batch * height * width, -(-kernel[0].numel() // _TILE_COLUMNS) * chunks
    steps = -(-pixels // _STEP_PIXELS)
    split_steps = -(-steps // max(1, _BLOCKS // tiles))
    c = Convolution(batch=batch, channels=channels, height=height, width=width, side=latent_size)
    c.source_channels, c.source_height, c.source_width = source.shape[1:]
    c.kernel_h, c.kernel_w = kernel.shape[2:]
    (c.step_h, c.step_w), (c.pad_h, c.pad_w), (c.dilation_h, c.dilation_w) = stride, padding, dilation
    c.splits, c.split_pixels = -(-steps // split_steps), split_steps * _STEP_PIXELS
    c.conv_stride[:], c.source_stride[:] = conv.stride(), source.stride()
    return c
