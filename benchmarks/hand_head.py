# mypy: allow-untyped-defs, allow-incomplete-defs
"""The LLS head written by hand for LLS alone: what `unlocked.kernels.triton.head`, which is built of pieces, is
compared with. Same algorithm, without strides, padding of the latents, modulation or exchangeable pieces.

    TRITON_INTERPRET=1 python benchmarks/hand_head.py    # compares it with the reference, without a GPU
"""

import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlocked.kernels.reference import HeadResult, local_head, make_basis
from unlocked.kernels.triton.aot_spec import AotSpec
from unlocked.kernels.triton.arrivals import arrival_counter

__all__ = ["AOT_SPEC", "hand_head"]

_SUM_CHUNK = tl.constexpr(1024)


@triton.jit(do_not_specialize=["num_rows"])
def _hand_kernel(
    latents,
    labels,
    basis,
    latents_grad,
    loss_sum,
    correct_sum,
    totals,
    scratch,
    arrivals,
    num_rows,
    temperature,
    label_smoothing,
    DIM: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row per program; the last to arrive adds up losses and correct rows."""
    row = tl.program_id(0).to(tl.int64)
    dims, classes = tl.arange(0, DIM), tl.arange(0, BLOCK)
    real = classes < CLASSES
    waves = tl.load(basis + classes[:, None] * DIM + dims[None, :], mask=real[:, None], other=0.0)
    z = tl.load(latents + row * DIM + dims)
    label = tl.load(labels + row)
    norm = tl.maximum(tl.sqrt(tl.sum(z * z, axis=0)), 1e-12)
    direction = z / norm
    scores = tl.sum(waves * direction[None, :], axis=1)
    logits = tl.where(real, scores / temperature, float("-inf"))
    shifted = logits - tl.max(logits, axis=0)
    log_probs = tl.where(real, shifted - tl.log(tl.sum(tl.exp(shifted), axis=0)), 0.0)
    share = label_smoothing / CLASSES
    target = tl.where(classes == label, 1.0 - label_smoothing + share, share)
    loss = -tl.sum(tl.where(real, target * log_probs, 0.0), axis=0)
    best = tl.max(tl.where(real, scores, float("-inf")), axis=0)
    first = tl.min(tl.where(real & (scores == best), classes, BLOCK), axis=0)
    scores_grad = tl.where(real, (tl.exp(log_probs) - target) / (temperature * num_rows), 0.0)
    grad = tl.sum(waves * scores_grad[:, None], axis=0)
    along = tl.where(norm > 1e-12, tl.sum(direction * grad, axis=0), 0.0)
    tl.store(latents_grad + row * DIM + dims, (grad - direction * along) / norm)
    tl.store(scratch + row, loss)
    tl.store(scratch + num_rows + row, (first == label).to(tl.float32))
    tl.debug_barrier()
    if tl.atomic_add(arrivals, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        index = tl.arange(0, _SUM_CHUNK)
        losses, corrects = tl.zeros([_SUM_CHUNK], tl.float32), tl.zeros([_SUM_CHUNK], tl.float32)
        for start in range(0, num_rows, _SUM_CHUNK):
            inside = start + index < num_rows
            losses += tl.load(scratch + start + index, mask=inside, other=0.0, cache_modifier=".cg")
            corrects += tl.load(scratch + num_rows + start + index, mask=inside, other=0.0, cache_modifier=".cg")
        loss, correct = tl.sum(losses, axis=0), tl.sum(corrects.to(tl.int32), axis=0)
        tl.store(loss_sum, loss)
        tl.store(correct_sum, correct.to(tl.int64))
        tl.store(totals, tl.load(totals) + loss.to(tl.float64))
        tl.store(totals + 1, tl.load(totals + 1) + correct.to(tl.float64))
        tl.store(arrivals, 0)


def hand_head(
    latents: Tensor,
    labels: Tensor,
    basis: Tensor,
    *,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    totals: Tensor,
) -> HeadResult:
    """Plain LLS on contiguous float32 latents [B, D], D a power of two."""
    (batch, dim), classes = latents.shape, basis.shape[0]
    if dim & (dim - 1) or latents.dtype != torch.float32 or not latents.is_contiguous():
        raise ValueError(f"latents must be contiguous float32 with 2**n columns, got {latents.dtype} {latents.shape}")
    grad = torch.empty_like(latents)
    loss = torch.empty((), device=latents.device)
    correct = torch.empty((), dtype=torch.int64, device=latents.device)
    scratch = torch.empty(2 * batch, device=latents.device)
    _hand_kernel[(batch,)](
        latents, labels, basis, grad, loss, correct, totals, scratch, arrival_counter(latents.device), batch,
        temperature, label_smoothing, DIM=dim, CLASSES=classes, BLOCK=max(16, triton.next_power_of_2(classes)),
        num_warps=4,
    )  # fmt: skip
    return HeadResult(loss, correct, grad, None, None)


_POINTERS = dict.fromkeys(("latents", "basis", "latents_grad", "loss_sum", "scratch"), "*fp32")
_POINTERS |= {"labels": "*i64", "correct_sum": "*i64", "totals": "*fp64", "arrivals": "*i32", "num_rows": "i32"}
AOT_SPEC = AotSpec(
    "LLS 512, written by hand",
    _hand_kernel,
    _POINTERS | {"temperature": "fp32", "label_smoothing": "fp32"},
    {"DIM": 512, "CLASSES": 10, "BLOCK": 16},
)


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(9, 64, generator=generator).to(device)
    labels = torch.randint(10, (9,), generator=generator).to(device)
    basis, totals = make_basis(10, 64, device=device), torch.zeros(2, dtype=torch.float64, device=device)
    found = hand_head(latents, labels, basis, temperature=0.5, label_smoothing=0.1, totals=totals)
    wanted = local_head(latents.double(), labels, basis, temperature=0.5, label_smoothing=0.1)
    error = float((found.latents_grad - wanted.latents_grad).norm() / wanted.latents_grad.norm())
    sums = abs(float(found.loss_sum) - float(wanted.loss_sum)) / float(wanted.loss_sum)
    print(f"relative error of the gradient {error:.1e}, of the loss {sums:.1e}")
    return 0 if error < 1e-5 and sums < 1e-5 and int(found.correct) == int(wanted.correct) == int(totals[1]) else 1


if __name__ == "__main__":
    sys.exit(main())
