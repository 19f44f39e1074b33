"""The numerics of the local step in plain PyTorch: the truth that every other backend is tested against.

Shapes: B images (or rows), C channels, H x W pixels, D latents, R rows of the basis, N classes, p the side of
the latents' pooling. Everything is computed in float32, or in float64 when the input is float64.

A local step of a block, in the words of the functions below:

    convolution (library) -> norm_act_forward -> local_head -> norm_act_backward -> weight gradient (library)

[Note: window sums] The gradient at the activations is constant over each pooling window of the latents. So
BatchNorm's two reductions over the full tensor, sum(da * mask) and sum(da * mask * xhat), only need two sums
per window, which the forward pass has in its registers anyway. The way back then reads the convolution's
output once and writes its gradient once; no full-size activation gradient exists.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unlocked.kernels.abilities import Abilities
from unlocked.kernels.images import load_batch

__all__ = [
    "ABILITIES",
    "WAVEFORMS",
    "HeadResult",
    "Layout",
    "NormActResult",
    "PoolKind",
    "label_ranks",
    "load_batch",
    "local_head",
    "make_basis",
    "norm_act_backward",
    "norm_act_backward_full",
    "norm_act_forward",
    "pool_latents",
    "spread_latents",
    "unavailable",
]

WAVEFORMS = ("cosine", "square")
"""Of the fixed basis, see `make_basis`."""

# Autograd on the library's layers is faster than these: they are the truth, not a fast twin.
ABILITIES = Abilities(devices=frozenset({"cpu", "cuda"}), closed_form=False, in_place=True)

NORM_EPS = 1e-12  # the clamp of torch.nn.functional.normalize, which the authors use
PoolKind = Literal["none", "max", "average"]
Layout = Literal["channels_first", "tokens"]
"""What [B, X, Y] is: C channels of L places [B, C, L], or T tokens of D features [B, T, D]."""


def unavailable(device: torch.device | str) -> str:
    """Why this backend can't run on `device`: it runs wherever torch does."""
    return ""


class HeadResult(NamedTuple):
    """What the local head computes in one go. Gradients are those of the mean loss over the batch."""

    loss_sum: Tensor  # [], float32: the sum of the B losses
    correct: Tensor  # [], int64: rows whose largest score is their label's (the first of equals)
    latents_grad: Tensor  # [B, D], dtype of the latents
    modulation_grad: Tensor | None  # shape of the modulation
    basis_grad: Tensor | None  # [R, D], only if asked for


class NormActResult(NamedTuple):
    """BatchNorm + LeakyReLU + pooling, and what the way back needs. [B, C, p, p] is flattened to [B, C p p]."""

    latents: Tensor  # [B, C p p] (empty where latent_size is 0)
    output: Tensor  # what the next layer reads: [B, C, H', W'], or [B, C]
    mean: Tensor  # [C], of this batch
    rstd: Tensor  # [C], 1 / sqrt(biased variance + eps)
    mask_sums: Tensor  # [B, C p p]: sum over the window of the LeakyReLU's slope (1 or negative_slope)
    mask_xhat_sums: Tensor  # [B, C p p]: sum over the window of slope * normalised value


def make_basis(rows: int, dim: int, waveform: str = "cosine", device: torch.device | str = "cpu") -> Tensor:
    """The fixed basis P [rows, dim]: sin(f_c t) with f = linspace(50, 512, rows), t = 0 .. dim - 1, in float32.

    `waveform` is "cosine" (the authors' name for this sine) or "square" (its sign). The product is rounded to
    float32 before the sine, as in the authors' code: a basis made in float64 differs visibly. It is computed on the
    CPU and then moved, so that every device holds the same bits.
    """
    if waveform not in WAVEFORMS:
        raise ValueError(f"waveform {waveform!r} is not known; valid: {', '.join(WAVEFORMS)}")
    frequencies = torch.linspace(50, 512, rows)
    wave = torch.sin(frequencies[:, None] * torch.arange(dim, dtype=torch.float32)[None, :])
    return (wave.sign() if waveform == "square" else wave).contiguous().to(device)


def pool_latents(activations: Tensor, latent_size: int, layout: Layout | None = None) -> Tensor:
    """Latents z of activations: averages over adaptive windows, p of them where p is `latent_size`.

    [B, C, H, W] -> [B, C p p]: p x p windows of each channel's plane. [B, C, L] -> [B, C p]: the same in one dimension,
    and so are tokens [B, T, D] -> [B, D p], p pieces of the sequence for each of its D features (p = 1: the mean
    token). [B, D] -> [B, p]: windows of neighbouring features.

    Args:
        layout: which of the two an activation of three dimensions is; of others it says nothing.

    Raises:
        ValueError: activations of another number of dimensions, or of three and an unknown layout.
    """
    if activations.dim() == 4:
        return F.adaptive_avg_pool2d(activations, latent_size).flatten(1)
    if activations.dim() == 3 and layout is not None:
        rows = activations if layout == "channels_first" else activations.transpose(1, 2)
        return F.adaptive_avg_pool1d(rows, latent_size).flatten(1)
    if activations.dim() == 2:
        return F.adaptive_avg_pool1d(activations[:, None], latent_size)[:, 0]
    raise ValueError(
        "latents need activations [B, C, H, W], [B, D], or [B, C, L] or [B, T, D] with their layout, got "
        f"{tuple(activations.shape)} with layout {layout}"
    )


def spread_latents(grad: Tensor, activations: Tensor, latent_size: int, layout: Layout | None = None) -> Tensor:
    """The gradient at the activations, like them, from that of `pool_latents(activations, latent_size, layout)`."""
    if activations.dim() == 2:
        rows = activations[:, None, None]
    elif activations.dim() == 3:
        rows = (activations.transpose(1, 2) if layout == "tokens" else activations)[:, :, None]
    else:
        rows = activations
    high = latent_size if activations.dim() == 4 else 1
    grid = grad.view(*rows.shape[:2], high, latent_size)
    full = torch.empty_like(activations)
    target = full[:, None, None] if activations.dim() == 2 else full
    if activations.dim() == 3:
        target = (full.transpose(1, 2) if layout == "tokens" else full)[:, :, None]
    height, width = rows.shape[2:]
    if height % high or width % latent_size:  # windows overlap, or repeat values
        target.copy_(torch.ops.aten._adaptive_avg_pool2d_backward(grid, rows))
        return full
    sides = (height // high, width // latent_size)
    windows = target.unflatten(3, (latent_size, sides[1])).unflatten(2, (high, sides[0]))
    # As the library divides, so that the bits are its own; one window is a mean to it.
    shares = grid / (height * width) if high == latent_size == 1 else grid / sides[0] / sides[1]
    if target.stride(1) == 1:  # channels lie together there, and are copied so if they do here
        shares = shares.contiguous(memory_format=torch.channels_last)
    windows.copy_(shares[:, :, :, None, :, None])
    return full


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
    """The local head, forward and backward, in closed form.

    scores = f(z) basisT, times `modulation` [N] element by element (LLS_M) or matrix-multiplied by `modulation`
    [R, N] (LLS_MxM), where f(z) is z / max(|z|, 1e-12) if `normalize`, else z. loss = cross entropy of
    scores / temperature with label smoothing (Szegedy et al. 2016, as torch.nn.functional.cross_entropy has it).

    Args:
        latents: [B, D], float.
        labels: [B], int64, in [0, N).
        basis: [R, D], float32. R = N unless `modulation` is a matrix. None: the latents are the scores (plain
            cross-entropy of logits, as the output layer trains).
        modulation: None, [N] or [R, N] (any strides).
        totals: [2] or [3], float64: loss_sum, correct and (where there is a third entry) the rows whose label is among
            the five largest scores are added to it in place, so that nothing is read per step.
    """
    z = latents if latents.dtype == torch.float64 else latents.float()
    num_rows = z.shape[0]
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp_min(NORM_EPS)
    direction = z / norm if normalize else z
    raw = direction if basis is None else direction @ basis.T.to(z.dtype)
    scores = raw
    if modulation is not None:
        scores = raw * modulation if modulation.dim() == 1 else raw @ modulation
    num_classes = scores.shape[1]
    log_probs = F.log_softmax(scores / temperature, dim=1)
    target = torch.full_like(scores, label_smoothing / num_classes)
    target.scatter_(1, labels[:, None], 1.0 - label_smoothing + label_smoothing / num_classes)
    loss_sum = -(target * log_probs).masked_fill(target == 0, 0.0).sum()  # a class may be out of question, at -inf
    correct = ((scores.argmax(dim=1) == labels) & _can_hit(scores, labels)).sum()

    scores_grad = (log_probs.exp() - target) / (num_rows * temperature)
    modulation_grad = None
    if modulation is None:
        raw_grad = scores_grad
    elif modulation.dim() == 1:
        raw_grad, modulation_grad = scores_grad * modulation, (scores_grad * raw).sum(0)
    else:
        raw_grad, modulation_grad = scores_grad @ modulation.T, raw.T @ scores_grad
    basis_grad = raw_grad.T @ direction if basis_gradient else None
    grad = raw_grad if basis is None else raw_grad @ basis.to(z.dtype)
    if normalize:
        # Below the clamp the norm is a constant, so only the division is left.
        along = torch.where(norm > NORM_EPS, (direction * grad).sum(1, keepdim=True), 0.0)
        grad = (grad - direction * along) / norm
    if totals is not None:
        sums = [loss_sum.double(), correct.double()]
        if totals.shape[0] == 3:
            sums.append((label_ranks(scores, labels) < 5).sum().double())
        totals += torch.stack(sums)
    return HeadResult(loss_sum, correct, grad.to(latents.dtype), modulation_grad, basis_grad)


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before each row's label: int64 [B], for scores [B, N] and labels [B].

    Of equal scores the smaller class index comes first, as argmax decides. In a row that has no finite loss the label
    comes after all classes, and after the fifth place at the least: what is not a number is never a hit.
    """
    label_scores = scores.gather(1, labels[:, None])
    count = scores.shape[1]
    classes = torch.arange(count, device=scores.device)
    before = ((scores > label_scores) | ((scores == label_scores) & (classes < labels[:, None]))).sum(1)
    return torch.where(_can_hit(scores, labels), before, max(count, 5))


def _can_hit(scores: Tensor, labels: Tensor) -> Tensor:
    """Whether a row's cross-entropy is finite: bool [B]. A NaN is passed on by the maximum."""
    return scores.amax(dim=1).isfinite() & scores.gather(1, labels[:, None])[:, 0].isfinite()


def norm_act_forward(
    conv: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    conv_bias: Tensor | None = None,
    *,
    latent_size: int,
    pool: PoolKind = "none",
    pool_size: int = 1,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.01,
    out: Tensor | None = None,
) -> NormActResult:
    """Training-mode BatchNorm + LeakyReLU, its latents, and the next layer's input.

    `conv` is the convolution's (or the linear map's) output *without* its bias: BatchNorm subtracts it again, so
    `conv_bias` only enters the running mean. Updates `running_mean` and `running_var` [C] in place (the variance
    unbiased, as torch.nn.BatchNorm2d does).

    Args:
        conv: [B, C, H, W] (contiguous or channels-last) or [B, C].
        latent_size: the side p of the latents' average pooling; H and W are multiples of it. 0: no latents. For
            [B, C] it is 0 or C: a linear block's latents are its activations.
        pool: what the next layer reads: "none" (the activations), "max" (2x2, stride 2, odd rows dropped) or
            "average" (adaptive, to `pool_size` x `pool_size`, which divides H and W).
        out: where to write the output (the slot of an edge, say); same shape and dtype as the output.
    """
    x = conv if conv.dtype == torch.float64 else conv.float()
    dims = [0, *range(2, x.dim())]
    count = x.numel() // x.shape[1]
    mean = x.mean(dims)
    var = x.var(dims, correction=0)
    rstd = (var + eps).rsqrt()
    with torch.no_grad():
        shift = 0.0 if conv_bias is None else conv_bias
        running_mean.lerp_((mean + shift).to(running_mean.dtype), momentum)
        running_var.lerp_((var * (count / max(count - 1, 1))).to(running_var.dtype), momentum)
    xhat = (x - _per_channel(mean, x)) * _per_channel(rstd, x)
    y = xhat * _per_channel(weight, x) + _per_channel(bias, x)
    mask = torch.where(y > 0, 1.0, negative_slope).to(y.dtype)
    activations = y * mask
    output = _pool(activations, pool, pool_size).to(conv.dtype)
    if out is not None:
        output = out.copy_(output)
    if latent_size == 0:
        empty = x.new_empty(0)
        return NormActResult(empty.to(conv.dtype), output, mean, rstd, empty, empty)
    area = _window_area(x, latent_size)
    sums = [pool_latents(t, latent_size) * area for t in (mask, mask * xhat)]
    latents = pool_latents(activations, latent_size).to(conv.dtype)
    return NormActResult(latents, output, mean, rstd, *sums)


def norm_act_backward(
    latents_grad: Tensor,
    conv: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask_sums: Tensor,
    mask_xhat_sums: Tensor,
    *,
    latent_size: int,
    negative_slope: float = 0.01,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the latents' gradient [B, C p p] to (conv_grad like `conv`, weight_grad [C], bias_grad [C]).

    See [Note: window sums]. The gradient of the convolution's bias is zero, because BatchNorm subtracts the mean.

    Args:
        out: where to write `conv_grad`; it may be `conv` itself. On a CPU a fresh buffer of this size costs more in
            page faults than the arithmetic. The GPU backends do not take it: they read `conv` through caches that
            don't see writes.
    """
    x = conv if conv.dtype == torch.float64 else conv.float()
    batch, channels = x.shape[:2]
    area = _window_area(x, latent_size)
    window_grad = latents_grad.to(x.dtype) / area  # the gradient of every activation in the window
    per_channel = (batch, channels, -1)
    bias_grad = (window_grad * mask_sums).reshape(per_channel).sum((0, 2))
    weight_grad = (window_grad * mask_xhat_sums).reshape(per_channel).sum((0, 2))
    if x.dim() == 4:
        grid = window_grad.reshape(batch, channels, latent_size, latent_size)
        side_h, side_w = x.shape[2] // latent_size, x.shape[3] // latent_size
        act_grad = grid.repeat_interleave(side_h, 2).repeat_interleave(side_w, 3)
    else:
        act_grad = window_grad
    conv_grad = _normalization_backward(act_grad, x, mean, rstd, weight, bias, weight_grad, bias_grad, negative_slope)
    return conv_grad.to(conv.dtype) if out is None else out.copy_(conv_grad), weight_grad, bias_grad


def norm_act_backward_full(
    activations_grad: Tensor,
    conv: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    negative_slope: float = 0.01,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `norm_act_backward`, from a gradient at every activation (inside a depthwise-separable block)."""
    x = conv if conv.dtype == torch.float64 else conv.float()
    grad = activations_grad.to(x.dtype)
    xhat = (x - _per_channel(mean, x)) * _per_channel(rstd, x)
    y = xhat * _per_channel(weight, x) + _per_channel(bias, x)
    masked = grad * torch.where(y > 0, 1.0, negative_slope).to(y.dtype)
    dims = [0, *range(2, x.dim())]
    bias_grad, weight_grad = masked.sum(dims), (masked * xhat).sum(dims)
    conv_grad = _normalization_backward(grad, x, mean, rstd, weight, bias, weight_grad, bias_grad, negative_slope)
    return conv_grad.to(conv.dtype) if out is None else out.copy_(conv_grad), weight_grad, bias_grad


def _normalization_backward(
    act_grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_grad: Tensor,
    bias_grad: Tensor,
    negative_slope: float,
) -> Tensor:
    """The input gradient weight * rstd * (dy - (sum(dy) + xhat * sum(dy * xhat)) / count), dy = act_grad * mask."""
    count = x.numel() // x.shape[1]
    xhat = (x - _per_channel(mean, x)) * _per_channel(rstd, x)
    y = xhat * _per_channel(weight, x) + _per_channel(bias, x)
    dy = act_grad * torch.where(y > 0, 1.0, negative_slope).to(y.dtype)
    means = (_per_channel(bias_grad, x) + xhat * _per_channel(weight_grad, x)) / count
    return _per_channel(weight * rstd, x) * (dy - means)


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.reshape(1, -1, *[1] * (like.dim() - 2))


def _window_area(x: Tensor, latent_size: int) -> int:
    """Pixels in each pooling window; the closed form needs windows that tile the plane."""
    if x.dim() == 2:
        if latent_size != x.shape[1]:
            raise ValueError(f"a linear block's fused latents are its {x.shape[1]} activations, got {latent_size}")
        return 1
    height, width = x.shape[2:]
    if height % latent_size or width % latent_size:
        raise ValueError(f"latent pooling to {latent_size} does not tile {height} x {width} pixels")
    return (height // latent_size) * (width // latent_size)


def _pool(activations: Tensor, pool: PoolKind, pool_size: int) -> Tensor:
    if pool == "max":
        return F.max_pool2d(activations, 2)
    if pool == "average":
        return F.adaptive_avg_pool2d(activations, pool_size)
    return activations
