# mypy: allow-untyped-defs, allow-incomplete-defs
"""The kernel of the fused optimizers: one step of one chunk, for all kinds.

[Note: one launch] Parameters and gradients stay where they are; their addresses are plain kernel arguments, so a step
in eager mode copies no table to the device. The kernel is specialised on the tensors' sizes: program i works on one
chunk of `CHUNK` elements of the tensor that chunk i belongs to. Momentum buffers and moments lie in flat buffers of
whole chunks, one after the other.

[Note: counters] Step counts (and schedule-free's weight_sum and lr_max) advance on the device. Every chunk has its own
copy, read and written by its one program alone: programs of a launch share nothing that changes, and the copies of a
tensor's chunks are equal because all do the same arithmetic.

[Note: hyperparameters] They lie in a float64 tensor on the device, where a captured graph sees their changes. Scalars
such as bias corrections are computed in float64 and then rounded, as torch.optim does on the host: in float32
1 - beta2 is wrong in the fifth digit.

[Note: bfloat16] A training in bfloat16 has bfloat16 gradients of its cast weights, and needs the new weights cast for
the next step. Both happen here, on the way, instead of in a kernel per tensor before and after.
"""

import triton
import triton.language as tl

from unlocked.kernels.triton.aot_spec import AotSpec

__all__ = ["AOT_SPECS", "CHUNK", "COUNTERS", "HYPER", "step_kernel"]

CHUNK = 1024  # elements of a program: a 3x3 convolution of 64 to 128 channels makes 72 programs
COUNTERS = 4  # float64 per chunk: step, weight_sum, lr_max, unused
HYPER = 10  # float64: lr, beta1 or momentum, beta2, eps, weight_decay, log(beta1), log(beta2), warm-up, r, power


@triton.jit
def _adam(p, g, mean, second, hyper_ptr, steps, lr, correction2, KIND: tl.constexpr):
    """(weights, first moment, second moment) after a step of Adam or AdamW."""
    beta1, beta2, eps = tl.load(hyper_ptr + 1), tl.load(hyper_ptr + 2), tl.load(hyper_ptr + 3).to(tl.float32)
    weight_decay = tl.load(hyper_ptr + 4)
    if KIND == "adam":
        g += weight_decay.to(tl.float32) * p
    else:
        p *= (1.0 - lr * weight_decay).to(tl.float32)
    mean += (1.0 - beta1).to(tl.float32) * (g - mean)
    second = beta2.to(tl.float32) * second + (1.0 - beta2).to(tl.float32) * (g * g)
    step_size = (lr / (1.0 - tl.exp((steps + 1.0) * tl.load(hyper_ptr + 5)))).to(tl.float32)
    spread = tl.div_rn(tl.sqrt_rn(second), tl.sqrt(correction2).to(tl.float32)) + eps
    return p - step_size * tl.div_rn(mean, spread), mean, second


@triton.jit
def _average(hyper_ptr, counters, steps, lr, correction2, KIND: tl.constexpr):
    """(this step's learning rate, the largest so far, the sum of weights, this step's share of the averaged point)."""
    warmup, power = tl.load(hyper_ptr + 7), tl.load(hyper_ptr + 9)
    lr *= tl.where(steps < warmup, (steps + 1.0) / tl.maximum(warmup, 1.0), 1.0)
    if KIND == "adamw_sf":
        lr *= tl.sqrt(correction2)  # so the first steps also weigh less in the average
    lr_max = tl.load(counters + 2)
    lr_max = tl.where(lr > lr_max, lr, lr_max)
    scale = tl.where(power == 0.0, 1.0, tl.exp(power * tl.log(lr_max)))
    weight = tl.exp(tl.load(hyper_ptr + 8) * tl.log(steps + 1.0)) * scale
    weight_sum = tl.load(counters + 1) + weight
    share = tl.where(weight_sum == 0.0, 0.0, weight / tl.where(weight_sum == 0.0, 1.0, weight_sum))
    return lr, lr_max, weight_sum, share


@triton.jit
def _averaged(p, z, g, share, lr, beta1):
    """The weights after a schedule-free step: between the average and z, less the gradient's part."""
    # torch.lerp's two forms: the second is exact at share = 1, which the first step has.
    near = p + share.to(tl.float32) * (z - p)
    far = z - (1.0 - share).to(tl.float32) * (z - p)
    p = tl.where(share < 0.5, near, far)
    return p + (lr * (beta1 * (1.0 - share) - 1.0)).to(tl.float32) * g


@triton.jit
def _gradient(grad_ptrs, program, offset, size, PROGRAMS: tl.constexpr, NARROW: tl.constexpr):
    """The chunk's gradient, in float32."""
    if len(NARROW) == 0:
        grad = grad_ptrs[0]
        for i in tl.static_range(1, len(PROGRAMS)):
            grad = tl.where(program >= PROGRAMS[i], grad_ptrs[i], grad)
        g = tl.load(grad + offset, mask=offset < size, other=0.0)
    else:  # of two types, so it is addresses that are chosen between
        address, narrow = grad_ptrs[0].to(tl.int64), tl.full((), NARROW[0], tl.int32)
        for i in tl.static_range(1, len(PROGRAMS)):
            address = tl.where(program >= PROGRAMS[i], grad_ptrs[i].to(tl.int64), address)
            narrow = tl.where(program >= PROGRAMS[i], NARROW[i], narrow)
        is_wide, is_half = offset < tl.where(narrow == 0, size, 0), offset < tl.where(narrow == 0, 0, size)
        wide = tl.load(address.to(tl.pointer_type(tl.float32)) + offset, mask=is_wide, other=0.0)
        half = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offset, mask=is_half, other=0.0)
        g = tl.where(narrow == 0, wide, half.to(tl.float32))
    return g


@triton.jit
def _copy(copy_ptrs, p, program, offset, size, PROGRAMS: tl.constexpr, COPIED: tl.constexpr):
    """Leaves the chunk's new weights in the tensor's copy, if it has one."""
    if len(COPIED) > 0:
        copy, copied = copy_ptrs[0], tl.full((), COPIED[0], tl.int32)
        for i in tl.static_range(1, len(PROGRAMS)):
            copy = tl.where(program >= PROGRAMS[i], copy_ptrs[i], copy)
            copied = tl.where(program >= PROGRAMS[i], COPIED[i], copied)
        tl.store(copy + offset, p.to(tl.bfloat16), mask=offset < tl.where(copied == 0, 0, size))


@triton.jit
def step_kernel(
    param_ptrs,  # tuple of float32 tensors; the name `params` would clash with one in Triton's own launcher
    grad_ptrs,  # tuple of float32 or bfloat16 tensors with the parameters' memory layout
    copy_ptrs,  # tuple of bfloat16 tensors with the parameters' memory layout; see COPIED
    first_state_ptr,  # [chunks * CHUNK], float32: momentum buffer, first moment or z
    second_state_ptr,  # [chunks * CHUNK], float32: second moment
    counters_ptr,  # [chunks, 4], float64
    hyper_ptr,  # [10], float64
    SIZES: tl.constexpr,  # elements of each tensor
    PROGRAMS: tl.constexpr,  # each tensor's first program
    CHUNKS: tl.constexpr,  # each tensor's first chunk in the state buffers
    NARROW: tl.constexpr,  # 1 for each tensor with a bfloat16 gradient; () if none has one
    COPIED: tl.constexpr,  # 1 for each tensor whose new weights go to its copy, too; () if none has one
    KIND: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One step on one chunk; see [Note: one launch]."""
    program = tl.program_id(0)
    param, size, first, chunk = param_ptrs[0], SIZES[0], PROGRAMS[0], CHUNKS[0]
    for i in tl.static_range(1, len(SIZES)):
        mine = program >= PROGRAMS[i]
        param = tl.where(mine, param_ptrs[i], param)
        size = tl.where(mine, SIZES[i], size)
        first = tl.where(mine, PROGRAMS[i], first)
        chunk = tl.where(mine, CHUNKS[i], chunk)
    local = (program - first).to(tl.int64)
    row, lane = local + chunk, tl.arange(0, CHUNK)
    offset = local * CHUNK + lane
    inside = offset < size
    p_ptrs, first_ptrs = param + offset, first_state_ptr + row * CHUNK + lane
    p = tl.load(p_ptrs, mask=inside, other=0.0)
    g = _gradient(grad_ptrs, program, offset, size, PROGRAMS, NARROW)
    lr, beta1, weight_decay = tl.load(hyper_ptr), tl.load(hyper_ptr + 1), tl.load(hyper_ptr + 4)
    counters = counters_ptr + row * 4
    if KIND == "sgd":
        g += weight_decay.to(tl.float32) * p
        if MOMENTUM:
            buffer = beta1.to(tl.float32) * tl.load(first_ptrs, mask=inside, other=0.0) + g
            tl.store(first_ptrs, buffer, mask=inside)
            if NESTEROV:
                g += beta1.to(tl.float32) * buffer
            else:
                g = buffer
        p -= lr.to(tl.float32) * g
    else:
        steps = tl.load(counters)  # taken before this one
        beta2, eps = tl.load(hyper_ptr + 2), tl.load(hyper_ptr + 3).to(tl.float32)
        correction2 = 1.0 - tl.exp((steps + 1.0) * tl.load(hyper_ptr + 6))
        if KIND != "schedule_free_sgd":
            second_ptrs = second_state_ptr + row * CHUNK + lane
            second = tl.load(second_ptrs, mask=inside, other=0.0)
        if KIND == "adam" or KIND == "adamw":
            mean = tl.load(first_ptrs, mask=inside, other=0.0)
            p, mean, second = _adam(p, g, mean, second, hyper_ptr, steps, lr, correction2, KIND)
            tl.store(first_ptrs, mean, mask=inside)
            tl.store(second_ptrs, second, mask=inside)
        else:
            z = tl.load(first_ptrs, mask=inside, other=0.0)
            z = tl.where(steps == 0.0, p, z)  # z starts at the weights
            lr, lr_max, weight_sum, share = _average(hyper_ptr, counters, steps, lr, correction2, KIND)
            if KIND != "schedule_free_sgd":
                second = beta2.to(tl.float32) * second + (1.0 - beta2).to(tl.float32) * (g * g)
                if KIND == "adamw_sf":
                    spread = tl.sqrt_rn(second) + eps
                else:
                    spread = tl.sqrt_rn(tl.div_rn(second, correction2.to(tl.float32))) + eps
                g = tl.div_rn(g, spread)
                tl.store(second_ptrs, second, mask=inside)
            g += weight_decay.to(tl.float32) * p
            tl.store(first_ptrs, z - lr.to(tl.float32) * g, mask=inside)
            p = _averaged(p, z, g, share, lr, beta1)
        tl.debug_barrier()  # every warp has read the counters before one thread writes them
        tl.store(counters, steps + 1.0)
        if KIND != "adam" and KIND != "adamw":
            tl.store(counters + 1, weight_sum)
            tl.store(counters + 2, lr_max)
    tl.store(p_ptrs, p, mask=inside)
    _copy(copy_ptrs, p, program, offset, size, PROGRAMS, COPIED)


@triton.jit
def _two_tensors(
    p0, p1, g0, g1, c0, first, second, counters, hyper, KIND: tl.constexpr, BFLOAT16: tl.constexpr, CHUNK: tl.constexpr
):
    """`step_kernel` with its tuples spelled out, for compilation ahead of time."""
    flags: tl.constexpr = (1, 0) if BFLOAT16 else ()
    step_kernel(
        (p0, p1),
        (g0, g1),
        (c0, c0),
        first,
        second,
        counters,
        hyper,
        (73728, 128),
        (0, 72),
        (0, 72),
        flags,
        flags,
        KIND,
        True,
        False,
        CHUNK,
    )


_SIGNATURE = dict.fromkeys(("p0", "p1", "g0", "g1", "first", "second"), "*fp32")
_SIGNATURE |= {"counters": "*fp64", "hyper": "*fp64"}
_SIGNATURE |= {"c0": "*bf16"}
AOT_SPECS = [
    AotSpec(
        f"optimizer {kind}{' bf16' if half else ''}",
        _two_tensors,
        {**_SIGNATURE, "g0": "*bf16"} if half else _SIGNATURE,
        {"KIND": kind, "BFLOAT16": half, "CHUNK": CHUNK},
    )
    for kind in ("sgd", "adam", "adamw", "adamw_sf", "schedule_free_adamw", "schedule_free_sgd")
    for half in (False, True)
]
