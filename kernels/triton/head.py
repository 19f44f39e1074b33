"""The local head in Triton: `local_head`, as the reference has it, and `make_head` for a rule of one's own pieces.

One launch does everything from the latents to their gradient and to the gradient of the modulation. A second, tiny
launch follows only for the gradient of the basis (LocalLosses) and for that of a matrix modulation beyond 32 x 32.
Nothing waits for the device, so a call can be captured in a CUDA graph; equal inputs give equal bits.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from unlocked.kernels import reference
from unlocked.kernels.reference import HeadResult
from unlocked.kernels.triton.aot_spec import AotSpec
from unlocked.kernels.triton.arrivals import arrival_counter
from unlocked.kernels.triton.head_kernels import batch_product_kernel, head_kernel
from unlocked.kernels.triton.pieces import (
    LLS_MATRIX,
    LLS_PLAIN,
    LLS_VECTOR,
    HeadPieces,
    identity,
    identity_backward,
)

__all__ = ["AOT_SPECS", "MAX_SIZE", "HeadPieces", "head_spec", "local_head", "make_head"]

MAX_SIZE = 8192  # latents, basis rows and classes: a row of each is held in registers
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BASIS_ELEMENTS = 8192  # of the basis in registers: 64 per thread at 4 warps
_MANY_ROWS = 2048  # from this batch on, a program takes four rows and loads the basis once for them
_PRODUCT_TILE = 32  # side of the largest matrix modulation whose gradient the head kernel makes itself


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
    """The LLS family's local head; arguments and result as `unlocked.kernels.reference.local_head`, which runs itself
    where there are more latents, basis rows or classes than `MAX_SIZE`.

    Raises:
        ValueError: a shape, dtype or device does not fit. Labels are checked on the CPU only: on a GPU the check would
            wait for the device. There, a label out of range matches no class.
    """
    if _is_too_large(latents, basis, modulation):
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
    pieces = LLS_PLAIN if modulation is None else LLS_VECTOR if modulation.dim() == 1 else LLS_MATRIX
    return _run(
        pieces, latents, labels, basis, modulation, normalize, temperature, label_smoothing, basis_gradient, totals
    )


def _is_too_large(latents: Tensor, basis: Tensor | None, modulation: Tensor | None) -> bool:
    shapes = (latents.shape[1:], *(one.shape for one in (basis, modulation) if one is not None))
    return any(size > MAX_SIZE for shape in shapes for size in shape)


def make_head(pieces: HeadPieces) -> Callable[..., HeadResult]:
    """A head with the signature of `local_head` that computes with `pieces`.

    `normalize=False` leaves the pieces' latent map out. `temperature` and `label_smoothing` reach the loss as they
    are, and it may read them as it likes (a margin, say). `modulation` [N] or [R, N] is the rule's learned tensor:
    see `unlocked.kernels.triton.pieces` for what its gradient is. A size beyond `MAX_SIZE` is refused (ValueError).
    """

    def head(
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
        return _run(
            pieces, latents, labels, basis, modulation, normalize, temperature, label_smoothing, basis_gradient, totals
        )

    return head


class _Geometry(NamedTuple):
    """What a launch depends on besides its tensors, worked out once per shape."""

    constants: dict[str, Any]  # constexprs of head_kernel, and num_warps
    rows_per_program: int
    scratch_width: int  # float32 of scratch per row of the batch
    raw_at: int  # where each row's raw scores, their gradients and the features begin, in units of the batch
    raw_grad_at: int
    features_at: int


def _run(
    pieces: HeadPieces,
    latents: Tensor,
    labels: Tensor,
    basis: Tensor | None,
    modulation: Tensor | None,
    normalize: bool,
    temperature: float,
    label_smoothing: float,
    basis_gradient: bool,
    totals: Tensor | None,
) -> HeadResult:
    batch, dim, rows, classes = _sizes(latents, labels, basis, modulation, temperature, basis_gradient, totals)
    modulation_dims = 0 if modulation is None else modulation.dim()
    geometry = _geometry(
        pieces, normalize, dim, rows, classes, modulation_dims, basis is not None, basis_gradient, batch
    )
    device = latents.device
    latents_grad = torch.empty((batch, dim), dtype=latents.dtype, device=device)
    loss_sum = torch.empty((), dtype=torch.float32, device=device)
    correct = torch.empty((), dtype=torch.int64, device=device)
    scratch = torch.empty(batch * geometry.scratch_width, dtype=torch.float32, device=device)
    modulation_grad = None
    if modulation is not None:
        modulation_grad = torch.empty(modulation.shape, dtype=torch.float32, device=device)
    with _device_of(latents):
        head_kernel[(triton.cdiv(batch, geometry.rows_per_program),)](
            latents,
            labels.contiguous(),
            basis,
            modulation,
            latents_grad,
            loss_sum,
            correct,
            modulation_grad,
            totals,
            scratch,
            arrival_counter(device),
            batch,
            *_row_and_element_stride(latents),
            *_row_and_element_stride(basis),
            *_row_and_element_stride(modulation),
            float(temperature),
            float(label_smoothing),
            COUNT_FIVE=totals is not None and totals.shape[0] == 3,
            **geometry.constants,
        )
        if modulation_grad is not None and geometry.constants["MODULATION_DIMS"] == 3:
            _batch_product(scratch[geometry.raw_at * batch :], scratch[2 * batch :], modulation_grad, batch)
        basis_grad = None
        if basis is not None and basis_gradient:
            basis_grad = torch.empty((rows, dim), dtype=torch.float32, device=device)
            features = scratch[geometry.features_at * batch :]
            _batch_product(scratch[geometry.raw_grad_at * batch :], features, basis_grad, batch)
    return HeadResult(loss_sum, correct, latents_grad, modulation_grad, basis_grad)


@lru_cache(maxsize=1024)
def _geometry(
    pieces: HeadPieces,
    normalize: bool,
    dim: int,
    rows: int,
    classes: int,
    modulation_dims: int,
    has_basis: bool,
    basis_gradient: bool,
    batch: int,
) -> _Geometry:
    block_dim, block_rows, block_classes = (_block(size) for size in (dim, rows, classes))
    if modulation_dims == 2 and max(block_rows, block_classes) > _PRODUCT_TILE:
        modulation_dims = 3
    widest = max(block_dim, block_rows, block_classes)
    warps = 4 if widest <= 1024 else 8 if widest <= 2048 else 16
    budget = _BASIS_ELEMENTS if warps == 4 else 2 * _BASIS_ELEMENTS
    tile = block_rows
    if has_basis and block_rows * block_dim > budget:
        # So few rows that neither a tile nor the selection of its rows out of a vector spills.
        tile = max(1, min(block_rows, budget // max(block_dim, block_rows)))
    keep = has_basis and basis_gradient
    raw_at = 2 + (classes if modulation_dims else 0)
    raw_grad_at = raw_at + (rows if modulation_dims > 1 else 0)
    features_at = raw_grad_at + rows
    # One row per program keeps all SMs busy at small batches; at large ones it would only reload the basis.
    rows_per_program = 4 if batch >= _MANY_ROWS else 1
    if rows_per_program > 1 and modulation_dims == 2 and has_basis and tile == block_rows:
        warps = max(warps, 8)  # over four rows, the basis and a matrix's tiles are too much for four warps' registers
    constants = {
        "LATENTS": pieces.latents if normalize else identity,
        "LATENTS_BACKWARD": pieces.latents_backward if normalize else identity_backward,
        "SCORES": pieces.scores,
        "SCORES_BACKWARD": pieces.scores_backward,
        "LOSS": pieces.loss,
        "DIM": dim,
        "ROWS": rows,
        "CLASSES": classes,
        "BLOCK_DIM": block_dim,
        "BLOCK_ROWS": block_rows,
        "BLOCK_CLASSES": block_classes,
        "TILE": tile,
        "ROWS_PER_PROGRAM": rows_per_program,
        "MODULATION_DIMS": modulation_dims,
        "KEEP_FEATURES": keep,
        "num_warps": warps,
    }
    width = features_at + dim if keep else raw_grad_at
    return _Geometry(constants, rows_per_program, width, raw_at, raw_grad_at, features_at)


def _batch_product(left: Tensor, right: Tensor, product: Tensor, batch: int) -> None:
    """product [L, R] = leftᵀ right for the [B, L] and [B, R] that `left` and `right` begin with."""
    num_left, num_right = product.shape
    tiles = min(_block(num_left), _PRODUCT_TILE), min(_block(num_right), _PRODUCT_TILE)
    grid = (triton.cdiv(num_left, tiles[0]), triton.cdiv(num_right, tiles[1]))
    batch_product_kernel[grid](left, right, product, batch, num_left, num_right, *tiles, num_warps=4)


def _block(size: int) -> int:
    """The power of two that holds `size`; at least the 16 that tl.dot needs."""
    return int(max(16, triton.next_power_of_2(size)))


def _row_and_element_stride(tensor: Tensor | None) -> tuple[int, int]:
    """The strides of a matrix; a vector or nothing has no row stride."""
    strides = (0, 0) if tensor is None else (0, *tensor.stride())
    return strides[-2], strides[-1]


def _device_of(tensor: Tensor) -> torch.cuda.device:
    """A context in which `tensor`'s device is the current one, which is where Triton launches."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def _sizes(
    latents: Tensor,
    labels: Tensor,
    basis: Tensor | None,
    modulation: Tensor | None,
    temperature: float,
    basis_gradient: bool,
    totals: Tensor | None,
) -> tuple[int, int, int, int]:
    """(batch, latents, rows of the basis, classes), after checking that everything fits."""
    if latents.dim() != 2 or latents.dtype not in _DTYPES or latents.shape[0] == 0:
        raise ValueError(
            f"latents must be [B, D] with B > 0, of float32, bfloat16 or float16, got {tuple(latents.shape)} "
            f"{latents.dtype}; convert them, or use the torch kernels for float64"
        )
    batch, dim = latents.shape
    if labels.shape != (batch,) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [{batch}], like the latents' rows, got {_describe(labels)}")
    rows = dim
    if basis is not None:
        if basis.dim() != 2 or basis.shape[1] != dim or not basis.is_floating_point():
            raise ValueError(f"the basis must be a float [R, {dim}], like the latents' columns, got {_describe(basis)}")
        rows = basis.shape[0]
    elif basis_gradient:
        raise ValueError("basis_gradient needs a basis, got None")
    classes = rows
    if modulation is not None:
        if modulation.dim() not in (1, 2) or modulation.shape[0] != rows or not modulation.is_floating_point():
            raise ValueError(f"the modulation must be a float [{rows}] or [{rows}, N], got {_describe(modulation)}")
        classes = modulation.shape[-1]
    if max(dim, rows, classes) > MAX_SIZE:
        raise ValueError(
            f"the Triton head holds at most {MAX_SIZE} latents, basis rows and classes, got {dim}, {rows} and "
            f"{classes}; use fewer latents or the torch kernels"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if totals is not None and (
        totals.shape not in ((2,), (3,)) or totals.dtype != torch.float64 or totals.stride() != (1,)
    ):
        raise ValueError(f"totals must be contiguous float64 [2] or [3], got {_describe(totals)}")
    for name, tensor in (("labels", labels), ("basis", basis), ("modulation", modulation), ("totals", totals)):
        if tensor is not None and tensor.device != latents.device:
            raise ValueError(f"{name} must be on the latents' device {latents.device}, got {tensor.device}; move one")
    if labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must be in 0 .. {classes - 1}, got {int(labels.min())} .. {int(labels.max())}")
    return batch, dim, rows, classes


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def head_spec(
    name: str, pieces: HeadPieces, dim: int, rows: int, classes: int, dims: int = 0, dtype: str = "fp32", **options: Any
) -> AotSpec:
    """A specialisation of the head kernel as a call compiles it; `batch` is 64 unless given, `normalize` whether there
    is a basis."""
    has_basis, trained_basis = options.get("has_basis", True), options.get("trained_basis", False)
    batch = options.get("batch", 64)
    normalize = options.get("normalize", has_basis)
    constants = dict(_geometry(pieces, normalize, dim, rows, classes, dims, has_basis, trained_basis, batch).constants)
    warps = constants.pop("num_warps")
    constants["COUNT_FIVE"] = not has_basis  # as the output layer's totals
    float_pointers = ("basis", "modulation", "loss_sum", "modulation_grad", "scratch")
    types = {
        **dict.fromkeys(float_pointers, "*fp32"),
        **dict.fromkeys(("latents", "latents_grad"), f"*{dtype}"),
        **dict.fromkeys(("labels", "correct_sum"), "*i64"),
        "totals": "*fp64",
        "arrivals": "*i32",
        "num_rows": "i32",
        **dict.fromkeys(("temperature", "label_smoothing"), "fp32"),
        **dict.fromkeys(("latents_row_stride", "basis_row_stride"), "i32:16"),
        "modulation_row_stride": "i32",
    }
    constants.update(dict.fromkeys(("latents_stride", "basis_stride", "modulation_stride"), 1))
    absent = [] if has_basis else ["basis"]
    absent += [] if dims else ["modulation", "modulation_grad"]
    constants.update(dict.fromkeys(absent))
    return AotSpec(f"local_head {name}", head_kernel, types, constants, warps)


_PRODUCT_TYPES = dict.fromkeys(("left", "right", "product"), "*fp32") | {"num_rows": "i32"}
_PRODUCT_SIZES = {"LEFT": 10, "RIGHT": 512, "TILE_LEFT": 16, "TILE_RIGHT": _PRODUCT_TILE}

# SmallConv's heads at batch 64 (512 and 256 latents, 10 classes), its output layer, and the largest head.
AOT_SPECS = [
    head_spec("SmallConv LLS 512", LLS_PLAIN, 512, 10, 10),
    head_spec("SmallConv LLS_M 256 bf16", LLS_VECTOR, 256, 10, 10, 1, "bf16"),
    head_spec("SmallConv LLS_MxM_reduced 512", LLS_MATRIX, 512, 20, 10, 2),
    head_spec("SmallConv LLS_MxM 512 at batch 2048", LLS_MATRIX, 512, 10, 10, 2, batch=2048),
    head_spec("SmallConv LocalLosses 512", LLS_PLAIN, 512, 10, 10, trained_basis=True),
    head_spec("SmallConv output layer", LLS_PLAIN, 10, 10, 10, has_basis=False),
    AotSpec("batch_product SmallConv basis", batch_product_kernel, _PRODUCT_TYPES, _PRODUCT_SIZES),
    head_spec("1000 classes, 8192 latents", LLS_MATRIX, 8192, 1000, 1000, 2),
]
