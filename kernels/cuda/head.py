"""The local head: `local_head` of reference.py over the CUDA kernels."""

from functools import lru_cache

import torch
from torch import Tensor

from unlocked.kernels import reference
from unlocked.kernels.cuda.bindings import DTYPES, device_limits, floats, launch, pointer, require, require_cuda
from unlocked.kernels.cuda.build import HEAD_THREADS
from unlocked.kernels.reference import HeadResult

__all__ = ["local_head"]

_STATIC_SHARED = 4096  # bytes to leave for the kernel's own variables


def local_head(
    latents: Tensor,
    labels: Tensor,
    basis: Tensor | None,
    modulation: Tensor | None = None,
    *,
    normalize: bool = True,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    basis_gradient: bool = False,
    totals: Tensor | None = None,
) -> HeadResult:
    """As `unlocked.kernels.reference.local_head`, which says what the arguments mean, in two launches (three with a
    basis gradient). A label outside of [0, N) makes the loss NaN. A head whose row does not fit into a multiprocessor's
    shared memory is the reference's.

    Raises:
        ValueError: a shape, dtype, device or option does not fit.
        RuntimeError: CUDA refuses a launch, or the first call can't compile the kernels.
    """
    batch, dim, rows, classes, strides = _check(latents, labels, basis, modulation, temperature, totals)
    device, kinds = latents.device, 0 if modulation is None else modulation.dim()
    sms, shared_limit = device_limits(device.index)
    rows_per_block, shared_bytes = _block(batch, dim, rows, classes, kinds == 2, sms, shared_limit)
    if not rows_per_block:
        return reference.local_head(
            latents,
            labels,
            basis,
            modulation,
            normalize=normalize,
            temperature=temperature,
            label_smoothing=label_smoothing,
            basis_gradient=basis_gradient,
            totals=totals,
        )
    latents = latents.contiguous()
    basis = None if basis is None else basis.contiguous()

    grad = torch.empty_like(latents)
    loss_sum, correct = floats((), latents), torch.empty((), dtype=torch.int64, device=device)
    modulation_grad = None if modulation is None else floats(modulation.shape, latents)
    basis_grad = floats((rows, dim), latents) if basis_gradient else None
    # One allocation for what passes between the kernels: losses, hits, raw, score_grad, raw_grad, inverse norms.
    summed, based = batch * bool(kinds), batch * basis_gradient
    sizes = (batch, batch, summed * rows, summed * classes, based * rows, based)
    scratch = floats((sum(sizes),), latents)
    address, pieces = scratch.data_ptr(), []
    for size in sizes:
        pieces.append(address if size else None)
        address += 4 * size

    wide = int(dim % 4 == 0 and (basis is None or basis.data_ptr() % 16 == 0))
    launch(
        "unlocked_head",
        device,
        *(DTYPES[latents.dtype], rows_per_block, shared_bytes, batch, dim, rows, classes),
        *(kinds, *strides, int(normalize), wide, int(totals is not None and totals.shape[0] == 3)),
        *(latents.data_ptr(), labels.data_ptr(), pointer(basis), pointer(modulation), grad.data_ptr(), *pieces),
        *(loss_sum.data_ptr(), correct.data_ptr(), pointer(totals), pointer(modulation_grad), pointer(basis_grad)),
        *(1.0 / temperature, label_smoothing, 1.0 / (batch * temperature)),
    )
    return HeadResult(loss_sum, correct, grad, modulation_grad, basis_grad)


def _check(
    latents: Tensor,
    labels: Tensor,
    basis: Tensor | None,
    modulation: Tensor | None,
    temperature: float,
    totals: Tensor | None,
) -> tuple[int, int, int, int, tuple[int, int]]:
    """(B, D, R, N, the modulation's strides over rows and classes)."""
    if latents.dim() != 2 or latents.dtype not in DTYPES or latents.numel() == 0:
        raise ValueError(
            f"latents must be non-empty float32, bfloat16 or float16 [B, D], got {latents.dtype} {list(latents.shape)}"
        )
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    batch, dim = latents.shape
    require("labels", labels, (batch,), torch.int64, latents)
    rows = dim
    if basis is not None:
        rows = basis.shape[0]
        if basis.dtype != torch.float32 or basis.dim() != 2 or basis.shape[1] != dim or basis.device != latents.device:
            raise ValueError(
                f"basis must be float32 [R, {dim}] on {latents.device}, got {basis.dtype} {list(basis.shape)} on "
                f"{basis.device}"
            )
    classes, strides = rows, (0, 0)
    if modulation is not None:
        fits = modulation.dim() in (1, 2) and modulation.shape[0] == rows
        if not fits or modulation.dtype != torch.float32 or modulation.device != latents.device:
            raise ValueError(
                f"modulation must be float32 [{rows}] or [{rows}, N] on {latents.device}, got {modulation.dtype} "
                f"{list(modulation.shape)} on {modulation.device}"
            )
        classes = modulation.shape[-1]
        strides = (modulation.stride(0), modulation.stride(-1)) if modulation.dim() == 2 else (0, modulation.stride(0))
    if totals is not None:
        require("totals", totals, (3,) if totals.shape == (3,) else (2,), torch.float64, latents)
    require_cuda("latents", latents)
    return batch, dim, rows, classes, strides


@lru_cache(maxsize=1024)
def _block(batch: int, dim: int, rows: int, classes: int, matrix: bool, sms: int, shared_limit: int) -> tuple[int, int]:
    """(images per block, bytes of shared memory): four images share each read of the basis once every SM has some; none
    if there is no room for one."""
    per_image = 4 * (-(-dim // 4) * 4 + 2 * rows + classes + (HEAD_THREADS if matrix else 0))
    limit = shared_limit - _STATIC_SHARED
    if per_image > limit:
        return 0, 0
    images = 4 if batch >= 4 * sms and 4 * per_image <= limit else 1
    return images, images * per_image
