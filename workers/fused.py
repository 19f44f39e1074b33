"""The local step in closed form, on the fused kernels: no autograd, no full-size activation gradient.

Which blocks and rules it covers is decided per layer (`choose_step`); all others keep the autograd step. The gradient
of a bias in front of BatchNorm is exactly zero here; autograd computes rounding noise for it.

With bfloat16 inputs (`unlocked.kernels.precision`) bfloat16 are: the cast weights, the library's results and their
gradients, the latents and their gradient, the output. The kernels compute in float32 and round what they store.
"""

from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from unlocked.kernels.dispatch import fuse_optimizer, get_backend
from unlocked.kernels.reference import HeadResult
from unlocked.models import KeyedDropout
from unlocked.rules import CrossEntropy
from unlocked.workers.bodies import Body, make_body
from unlocked.workers.layer import AutogradStep, Layer, Step, StepFactory

__all__ = ["FusedStep", "LogitsStep", "choose_step", "fused_step"]


def choose_step(kernels: str, device: torch.device) -> StepFactory | None:
    """The step factory for `kernels` on `device`; None: autograd for every layer.

    Raises:
        ValueError: a backend asked for by name can't run on `device`.
    """
    backend = get_backend(kernels, device)
    return fused_step(backend) if backend.ABILITIES.closed_form else None


def fused_step(backend: ModuleType) -> StepFactory:
    """Builds closed-form steps with the operations of `backend` where a layer allows it, autograd steps elsewhere."""

    def build(layer: Layer) -> Step:
        body = make_body(layer.block, layer.info, backend)
        # A gradient for every parameter of the block, by the micro-batch's statistics, is what the closed form gives:
        # autograd knows of frozen ones.
        frozen = bool(layer.frozen) or not all(p.requires_grad for p in layer.block.parameters())
        closed_form = body is not None and not frozen and layer.rule.head_arguments() is not None
        layer.optimizer = _fuse_optimizer(layer, backend, closed_form=closed_form)
        if body is not None and closed_form:
            return FusedStep(layer, backend, body)
        return LogitsStep(layer, backend) if _gives_logits(layer) else AutogradStep(layer)

    return build


class FusedStep:
    """One layer's local step in closed form.

    Args:
        backend: a module with the operations of `kernels.reference`.
        body: how the block's own arithmetic runs forward and back, on the same backend.
    """

    def __init__(self, layer: Layer, backend: ModuleType, body: Body) -> None:
        self.layer, self.backend, self.body = layer, backend, body
        keeps = getattr(layer.optimizer, "bfloat16_of", None)
        self._takes_bfloat16 = keeps is not None
        if keeps is not None:
            body.bfloat16_of = keeps
        self._dropout = next((m for m in layer.block.tail.modules() if isinstance(m, KeyedDropout) and m.p > 0), None)

    @torch.no_grad()
    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The layer's output after dropout, in `out` if given: shapes as those of `Body.forward`."""
        if self._dropout is None:
            return self.body.forward(x, out)
        result = cast(Tensor, self._dropout(self.body.forward(x, None)))
        return result if out is None else out.copy_(result)

    @torch.no_grad()
    def update(self, labels: Tensor) -> Tensor:
        """One step of the optimizer from the labels [B], int64; returns the sum of the B losses, [] float32."""
        layer = self.layer
        arguments = layer.rule.head_arguments()
        assert arguments is not None
        latents = self.body.latents()
        # Only the output layer's hits among the first five are of interest.
        totals = layer.totals if layer.is_output else layer.totals[:2]
        head: HeadResult = self.backend.local_head(latents, labels, **arguments._asdict(), totals=totals)
        grads = [*layer.rule.head_gradients(head), *self.body.backward(head.latents_grad)]
        # Those of a bfloat16 cast are bfloat16.
        self._apply(grads if self._takes_bfloat16 else [grad.float() for grad in grads])
        return head.loss_sum

    def _apply(self, grads: list[Tensor]) -> None:
        optimizer = self.layer.optimizer
        if optimizer is None:
            return
        if not isinstance(optimizer, torch.optim.Optimizer):  # a fused one takes them as they are
            optimizer.step(grads)
            return
        for parameter, grad in zip(self.layer.parameters, grads, strict=True):
            parameter.grad = grad.contiguous(memory_format=_format_of(parameter))
        optimizer.step()


class LogitsStep(AutogradStep):
    """An output layer of any block, or a whole network that ends in one: autograd from the logits down.

    Loss, hits and the gradient at the logits come from the head's kernel, which spares backpropagation about twenty
    small ones.
    """

    def __init__(self, layer: Layer, backend: ModuleType) -> None:
        super().__init__(layer)
        self.backend = backend

    def update(self, labels: Tensor) -> Tensor:
        """As `FusedStep.update`, from the logits [B, N] that `forward` kept."""
        layer, logits = self.layer, self.take_activations()
        arguments = layer.rule.head_arguments()
        assert arguments is not None
        with torch.no_grad():
            head: HeadResult = self.backend.local_head(
                logits.detach(), labels, **arguments._asdict(), totals=layer.totals
            )
        if layer.optimizer is not None:
            layer.optimizer.zero_grad(set_to_none=True)
            logits.backward(head.latents_grad)
            layer.optimizer.step()
        return head.loss_sum


def _gives_logits(layer: Layer) -> bool:
    return layer.is_output and isinstance(layer.rule, CrossEntropy) and len(layer.info.activation_shape) == 1


def _fuse_optimizer(layer: Layer, backend: ModuleType, *, closed_form: bool) -> Any:
    """The layer's optimizer, as one kernel for all of its parameters where the backend has one for it."""
    optimizer = layer.optimizer
    if optimizer is None:
        return None
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    if closed_form and list(map(id, owned)) != list(map(id, layer.parameters)):
        return optimizer  # of some of them, or in another order: gradients are given by place
    # A gradient for every parameter is what only the closed form promises.
    return fuse_optimizer(backend, optimizer, layer.device, every_gradient=closed_form)


def _format_of(parameter: Tensor) -> torch.memory_format:
    channels_last = parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
