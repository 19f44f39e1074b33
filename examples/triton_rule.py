"""A local rule outside the LLS family, in Triton, made of four small pieces.

Latents go through softsign, z / (1 + |z|), before the fixed basis; the loss is the multi-class hinge loss of Weston
and Watkins (1999) with `temperature` as its margin. The head kernel around the pieces stays as it is. Run as a script
(without a GPU in Triton's interpreter), it compares with autograd of the same rule in plain torch.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before triton is imported

import triton
import triton.language as tl

from unlocked.kernels.reference import make_basis
from unlocked.kernels.triton.head import HeadPieces, make_head
from unlocked.kernels.triton.pieces import first_maximum_is


@triton.jit
def softsign(z, inside):
    scale = 1.0 / (1.0 + tl.abs(z))
    return z * scale, scale  # the second is kept for the way back


@triton.jit
def softsign_backward(features_grad, features, saved, z, inside):
    return features_grad * saved * saved


@triton.jit
def hinge(scores, label, inside, CLASSES: tl.constexpr, margin, unused):
    is_label = tl.arange(0, scores.shape[0]) == label
    own = tl.sum(tl.where(is_label, scores, 0.0), axis=0)
    slack = tl.where(inside & (is_label == 0), tl.maximum(margin - own + scores, 0.0), 0.0)
    pushed = tl.where(slack > 0.0, 1.0, 0.0)
    scores_grad = tl.where(is_label, -tl.sum(pushed, axis=0), pushed) / CLASSES
    return tl.sum(slack, axis=0) / CLASSES, scores_grad, first_maximum_is(label, scores, inside)


hinge_head = make_head(HeadPieces(latents=softsign, latents_backward=softsign_backward, loss=hinge))


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(16, 48, generator=generator).to(device).requires_grad_()
    labels = torch.randint(10, (16,), generator=generator).to(device)
    basis = make_basis(10, 48, device=device)
    scores = torch.nn.functional.softsign(latents) @ basis.T
    loss = torch.nn.functional.multi_margin_loss(scores, labels, margin=2.0)
    (expected,) = torch.autograd.grad(loss, latents)
    result = hinge_head(latents.detach(), labels, basis, temperature=2.0)
    error = float((result.latents_grad - expected).abs().max() / expected.abs().max())
    print(f"largest error of the latents' gradient, relative to its largest entry: {error:.1e}")
    return 0 if error < 1e-5 else 1


if __name__ == "__main__":
    raise SystemExit(main())
