# mypy: allow-untyped-defs, allow-incomplete-defs
"""The device side of the local head: one kernel from z to dz and to everything summed over the batch.

[Note: one kernel] A program takes one row (a few at large batches), so that a batch of 64 is spread over 64 SMs. The
basis comes from L2; if it fits, it stays in registers between the way forward and the way back. What is summed over
the batch goes through `scratch`: each program writes its rows' share, then counts itself in `arrivals`; whoever
arrives last sums all shares in the order of the rows. Which program that is depends on the race, the sum does not.
The last one also sets the counter back to zero for the next launch.

[Note: other programs' stores] The last program reads what others wrote on other SMs, whose stores its first-level cache
does not see. What makes that right is the order alone: every program's barrier and release come before its count, and
the acquire of the last one, which forgets the lines of L1 (CCTL.IVALL), and the barrier behind it come before its
loads. The loads' `.cg` is a hint that the memory model knows nothing of, and the pipeliner drops it: in a loop with
tl.dot the loads become cp.async.ca, which go through L1 (cp.async.cg moves 16 bytes and no less). They still come after
the barrier. tests/kernels/test_triton_compiled.py looks for all of this in the binary.

`scratch` (float32) is laid out as losses [B], hits [B] (1 for a row that counts as correct, and 2 more for a label
among the first five scores), then, where asked for, weight rows [B, N], raw scores [B, R], gradients of the raw scores
[B, R] and features [B, D].
"""

import triton
import triton.language as tl

from unlocked.kernels.triton.pieces import label_rank, place, take

__all__ = ["batch_product_kernel", "head_kernel"]

_SUM_CHUNK = tl.constexpr(1024)  # losses summed per step: one step up to batch 1024
_VECTOR_CHUNK = tl.constexpr(4096)  # elements of the weight rows summed per step
_PRODUCT_CHUNK = tl.constexpr(32)  # rows of the batch per step of a product over the batch


@triton.jit(do_not_specialize=["num_rows"])
def head_kernel(
    latents, labels, basis, modulation, latents_grad, loss_sum, correct_sum, modulation_grad, totals, scratch, arrivals,
    num_rows, latents_row_stride, latents_stride, basis_row_stride, basis_stride, modulation_row_stride,
    modulation_stride, temperature, label_smoothing,
    LATENTS: tl.constexpr, LATENTS_BACKWARD: tl.constexpr, SCORES: tl.constexpr, SCORES_BACKWARD: tl.constexpr,
    LOSS: tl.constexpr, DIM: tl.constexpr, CLASSES: tl.constexpr,
    ROWS: tl.constexpr,  # of the basis
    BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
    TILE: tl.constexpr,  # rows of the basis held at once
    ROWS_PER_PROGRAM: tl.constexpr,
    MODULATION_DIMS: tl.constexpr,  # 0 (none), 1, 2 (gradient made here) or 3 (a matrix whose gradient is made later)
    KEEP_FEATURES: tl.constexpr,  # for the gradient of the basis, which is made later
    COUNT_FIVE: tl.constexpr,  # totals has a third entry, the rows whose label is among the first five
):  # fmt: skip
    """Grid: ceil(B / ROWS_PER_PROGRAM). See [Note: one kernel]."""
    wide_rows = num_rows.to(tl.int64)
    weight_rows = scratch + 2 * wide_rows
    raw_rows = weight_rows + (wide_rows * CLASSES if MODULATION_DIMS > 0 else 0)
    raw_grad_rows = raw_rows + (wide_rows * ROWS if MODULATION_DIMS > 1 else 0)
    feature_rows = raw_grad_rows + wide_rows * ROWS

    dims, basis_rows, classes = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_CLASSES)
    in_dim, in_basis, in_classes = dims < DIM, basis_rows < ROWS, classes < CLASSES
    kept = None
    if basis is not None and TILE == BLOCK_ROWS:
        kept = _basis_tile(basis, 0, basis_row_stride, basis_stride, DIM, ROWS, BLOCK_DIM, TILE)
    for step in range(ROWS_PER_PROGRAM):
        row = tl.program_id(0).to(tl.int64) * ROWS_PER_PROGRAM + step
        if row < num_rows:
            z = tl.load(latents + row * latents_row_stride + dims * latents_stride, mask=in_dim, other=0.0)
            z = z.to(tl.float32)
            label = tl.load(labels + row)
            features, saved = LATENTS(z, in_dim)
            features = tl.where(in_dim, features, 0.0)
            if basis is None:
                raw = features
            else:
                raw = _project(
                    features, kept, basis, basis_row_stride, basis_stride, DIM, ROWS, BLOCK_DIM, BLOCK_ROWS, TILE
                )
            scores = SCORES(raw, modulation, modulation_row_stride, modulation_stride, ROWS, CLASSES, BLOCK_CLASSES)
            loss, scores_grad, correct = LOSS(scores, label, in_classes, CLASSES, temperature, label_smoothing)
            scores_grad = tl.where(in_classes, scores_grad / num_rows, 0.0)
            raw_grad, weight_row = SCORES_BACKWARD(
                scores_grad, raw, modulation, modulation_row_stride, modulation_stride, ROWS, CLASSES, BLOCK_CLASSES
            )
            raw_grad = tl.where(in_basis, raw_grad, 0.0)
            if basis is None:
                features_grad = raw_grad
            else:
                features_grad = _project_back(
                    raw_grad, kept, basis, basis_row_stride, basis_stride, DIM, ROWS, BLOCK_DIM, BLOCK_ROWS, TILE
                )
            z_grad = LATENTS_BACKWARD(features_grad, features, saved, z, in_dim)
            tl.store(latents_grad + row * DIM + dims, z_grad.to(latents_grad.dtype.element_ty), mask=in_dim)
            tl.store(scratch + row, loss)
            finite = tl.abs(loss) < float("inf")  # what is not a number is never a hit
            hits = (correct & finite).to(tl.int32)
            if COUNT_FIVE:
                hits += 2 * (finite & (label_rank(scores, label, in_classes) < 5)).to(tl.int32)
            tl.store(scratch + wide_rows + row, hits.to(tl.float32))
            if MODULATION_DIMS > 0:
                tl.store(weight_rows + row * CLASSES + classes, weight_row, mask=in_classes)
            if MODULATION_DIMS > 1:
                tl.store(raw_rows + row * ROWS + basis_rows, raw, mask=in_basis)
            if KEEP_FEATURES:
                tl.store(raw_grad_rows + row * ROWS + basis_rows, raw_grad, mask=in_basis)
                tl.store(feature_rows + row * DIM + dims, features, mask=in_dim)

    # All threads' stores come before the one thread's release; the last arrival's acquire comes before its loads.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals, 1, sem="acq_rel")
    if arrived == tl.num_programs(0) - 1:
        tl.debug_barrier()
        _sum_losses(scratch, num_rows, loss_sum, correct_sum, totals, COUNT_FIVE)
        _sum_modulation(
            modulation_grad, weight_rows, raw_rows, num_rows,
            ROWS, CLASSES, BLOCK_ROWS, BLOCK_CLASSES, MODULATION_DIMS,
        )  # fmt: skip
        tl.store(arrivals, 0)


@triton.jit(do_not_specialize=["num_rows"])
def batch_product_kernel(
    left,
    right,
    product,
    num_rows,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    TILE_LEFT: tl.constexpr,
    TILE_RIGHT: tl.constexpr,
):
    """product [LEFT, RIGHT] = leftᵀ right, for left [B, LEFT] and right [B, RIGHT]; one tile per program.

    The gradients of a matrix modulation too large for one tile, and of the basis. Sums in the order of the rows.
    """
    start_left, start_right = tl.program_id(0) * TILE_LEFT, tl.program_id(1) * TILE_RIGHT
    tile = _batch_product(left, right, num_rows, LEFT, RIGHT, start_left, start_right, TILE_LEFT, TILE_RIGHT)
    rows, columns = start_left + tl.arange(0, TILE_LEFT), start_right + tl.arange(0, TILE_RIGHT)
    inside = (rows < LEFT)[:, None] & (columns < RIGHT)[None, :]
    tl.store(product + rows[:, None].to(tl.int64) * RIGHT + columns[None, :], tile, mask=inside)


@triton.jit
def _basis_tile(
    basis,
    start,
    row_stride,
    stride,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Rows start .. start + TILE of the basis, zero outside of it."""
    rows, dims = start + tl.arange(0, TILE), tl.arange(0, BLOCK_DIM)
    inside = (rows < ROWS)[:, None] & (dims < DIM)[None, :]
    offsets = rows[:, None].to(tl.int64) * row_stride + dims[None, :] * stride
    return tl.load(basis + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _project(
    features,
    kept,
    basis,
    row_stride,
    stride,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """features · basisᵀ [BLOCK_ROWS]."""
    if kept is not None:
        raw = tl.sum(kept * features[None, :], axis=1)
    else:
        raw = tl.zeros([BLOCK_ROWS], tl.float32)
        for start in range(0, ROWS, TILE):
            tile = _basis_tile(basis, start, row_stride, stride, DIM, ROWS, BLOCK_DIM, TILE)
            raw += place(tl.sum(tile * features[None, :], axis=1), start, BLOCK_ROWS)
    return raw


@triton.jit
def _project_back(
    raw_grad,
    kept,
    basis,
    row_stride,
    stride,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """raw_grad · basis [BLOCK_DIM]."""
    if kept is not None:
        grad = tl.sum(kept * raw_grad[:, None], axis=0)
    else:
        grad = tl.zeros([BLOCK_DIM], tl.float32)
        for start in range(0, ROWS, TILE):
            tile = _basis_tile(basis, start, row_stride, stride, DIM, ROWS, BLOCK_DIM, TILE)
            grad += tl.sum(tile * take(raw_grad, start, TILE)[:, None], axis=0)
    return grad


@triton.jit
def _sum_losses(scratch, num_rows, loss_sum, correct_sum, totals, COUNT_FIVE: tl.constexpr):
    """The last program's sums of losses and hits. See [Note: other programs' stores]."""
    index = tl.arange(0, _SUM_CHUNK)
    losses = tl.zeros([_SUM_CHUNK], tl.float32)
    corrects, fives = tl.zeros([_SUM_CHUNK], tl.int32), tl.zeros([_SUM_CHUNK], tl.int32)
    for start in range(0, num_rows, _SUM_CHUNK):
        inside = start + index < num_rows
        losses += tl.load(scratch + start + index, mask=inside, other=0.0, cache_modifier=".cg")
        hits = tl.load(scratch + num_rows + start + index, mask=inside, other=0.0, cache_modifier=".cg").to(tl.int32)
        corrects += hits & 1
        fives += hits >> 1
    loss, correct = tl.sum(losses, axis=0), tl.sum(corrects, axis=0)
    tl.store(loss_sum, loss)
    tl.store(correct_sum, correct.to(tl.int64))
    if totals is not None:
        tl.store(totals, tl.load(totals) + loss.to(tl.float64))
        tl.store(totals + 1, tl.load(totals + 1) + correct.to(tl.float64))
        if COUNT_FIVE:
            tl.store(totals + 2, tl.load(totals + 2) + tl.sum(fives, axis=0).to(tl.float64))


@triton.jit
def _sum_modulation(
    modulation_grad, weight_rows, raw_rows, num_rows,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
    MODULATION_DIMS: tl.constexpr,
):  # fmt: skip
    """The last program's gradient of a modulation [N], or of a matrix [R, N] that is one tile."""
    basis_rows, classes = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_CLASSES)
    if MODULATION_DIMS == 1:
        total = _sum_rows(weight_rows, num_rows, CLASSES, BLOCK_CLASSES)
        tl.store(modulation_grad + classes, total, mask=classes < CLASSES)
    if MODULATION_DIMS == 2:
        product = _batch_product(raw_rows, weight_rows, num_rows, ROWS, CLASSES, 0, 0, BLOCK_ROWS, BLOCK_CLASSES)
        inside = (basis_rows < ROWS)[:, None] & (classes < CLASSES)[None, :]
        tl.store(modulation_grad + basis_rows[:, None] * CLASSES + classes[None, :], product, mask=inside)


@triton.jit
def _sum_rows(matrix, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The column sums of matrix [B, WIDTH]."""
    CHUNK: tl.constexpr = _VECTOR_CHUNK // BLOCK if BLOCK < _VECTOR_CHUNK else 1
    rows, columns = tl.arange(0, CHUNK), tl.arange(0, BLOCK)
    sums = tl.zeros([CHUNK, BLOCK], tl.float32)
    for start in range(0, num_rows, CHUNK):
        inside = (start + rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
        offsets = (start + rows)[:, None].to(tl.int64) * WIDTH + columns[None, :]
        sums += tl.load(matrix + offsets, mask=inside, other=0.0, cache_modifier=".cg")
    return tl.sum(sums, axis=0)


@triton.jit
def _batch_product(
    left,
    right,
    num_rows,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    start_left,
    start_right,
    TILE_LEFT: tl.constexpr,
    TILE_RIGHT: tl.constexpr,
):
    """One tile of leftᵀ right, summed over the batch in exact float32 products (no tf32).

    See [Note: other programs' stores] for what the compiler makes of the loads.
    """
    steps = tl.arange(0, _PRODUCT_CHUNK)
    left_index, right_index = start_left + tl.arange(0, TILE_LEFT), start_right + tl.arange(0, TILE_RIGHT)
    tile = tl.zeros([TILE_LEFT, TILE_RIGHT], tl.float32)
    for start in range(0, num_rows, _PRODUCT_CHUNK):
        rows = start + steps
        in_batch = rows < num_rows
        left_offsets = rows[None, :].to(tl.int64) * LEFT + left_index[:, None]
        right_offsets = rows[:, None].to(tl.int64) * RIGHT + right_index[None, :]
        left_inside = in_batch[None, :] & (left_index < LEFT)[:, None]
        right_inside = in_batch[:, None] & (right_index < RIGHT)[None, :]
        left_tile = tl.load(left + left_offsets, mask=left_inside, other=0.0, cache_modifier=".cg")
        right_tile = tl.load(right + right_offsets, mask=right_inside, other=0.0, cache_modifier=".cg")
        tile += tl.dot(left_tile, right_tile, input_precision="ieee")
    return tile
