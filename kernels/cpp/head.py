"""The local head: `local_head` of reference.py over the C++ kernel, where the head is small."""

import torch
from torch import Tensor

from unlocked.kernels import reference
from unlocked.kernels.cpp.bindings import load_kernels
from unlocked.kernels.reference import HeadResult

__all__ = ["local_head"]

_HEAD_LIMIT = 1 << 23  # multiply-adds from which BLAS wins over one thread's plain loops


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
    """See `kernels.reference.local_head`: one call, where the head is small enough for one thread."""
    batch, dim = latents.shape
    rows = dim if basis is None else basis.shape[0]
    fits = (
        latents.dtype in (torch.float32, torch.bfloat16)
        and latents.is_contiguous()
        and (basis is None or basis.is_contiguous())
    )
    if not fits or batch * rows * (dim if basis is not None else 1) > _HEAD_LIMIT:
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
    kind = 0 if modulation is None else modulation.dim()
    classes = rows if modulation is None else modulation.shape[-1]
    given, latents = latents.dtype, latents.float()  # small beside what made them
    latents_grad = torch.empty_like(latents)
    modulation_grad = None if modulation is None else latents.new_zeros(modulation.shape)
    basis_grad = torch.zeros_like(basis) if basis_gradient and basis is not None else None
    sums = torch.empty(3, dtype=torch.float64)
    strides = (0, 0) if modulation is None else (0, *modulation.stride())[-2:]
    load_kernels().unlocked_local_head(
        latents.data_ptr(),
        labels.contiguous().data_ptr(),
        None if basis is None else basis.data_ptr(),
        None if modulation is None else modulation.data_ptr(),
        kind,
        *strides,
        batch,
        dim,
        rows,
        classes,
        int(normalize),
        temperature,
        label_smoothing,
        latents_grad.data_ptr(),
        None if modulation_grad is None else modulation_grad.data_ptr(),
        None if basis_grad is None else basis_grad.data_ptr(),
        sums.data_ptr(),
    )
    if totals is not None:
        totals += sums[: totals.shape[0]]
    return HeadResult(sums[0].float(), sums[1].long(), latents_grad.to(given), modulation_grad, basis_grad)
