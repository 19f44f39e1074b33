"""The local step in closed form, on the fused kernels.

It is made of what a block computes (`workers.graph`), operation by operation: what the table of operations does not
have runs through autograd, for that piece alone. Where the rule has no closed form, autograd follows the rule alone
(`workers.open_step`); where the block can't be followed, the layer keeps the autograd step (`choose_step`). The
gradient of a bias in front of BatchNorm is exactly zero here; autograd computes rounding noise for it.

With bfloat16 inputs (`unlocked.kernels.precision`) bfloat16 are: the cast weights, the library's results and their
gradients, the latents and their gradient, the output. The kernels compute in float32 and round what they store.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from unlocked.kernels.dispatch import fuse_optimizer, get_backend
from unlocked.kernels.reference import HeadResult
from unlocked.models import Block
from unlocked.rules import CrossEntropy, needs_pass
from unlocked.workers.graph.body import GraphBody
from unlocked.workers.graph.joins import make_body
from unlocked.workers.graph.tracing import Untraceable, gives_sparse
from unlocked.workers.layer import AutogradStep, Layer, Step, StepFactory
from unlocked.workers.open_step import OpenStep, as_gradients, opened_body

__all__ = ["FusedStep", "FusedSteps", "LogitsStep", "choose_step", "fused_step", "holds_blocks"]


def choose_step(kernels: str, device: torch.device) -> StepFactory | None:
    """The step factory for `kernels` on `device`; None: autograd for every layer.

    Raises:
        ValueError: a backend asked for by name can't run on `device`.
    """
    backend = get_backend(kernels, device)
    return fused_step(backend) if backend.ABILITIES.closed_form else None


def fused_step(backend: ModuleType) -> StepFactory:
    """Builds closed-form steps with the operations of `backend` where a layer allows it, autograd steps elsewhere."""
    return FusedSteps(backend)


@dataclass(frozen=True)
class FusedSteps:
    """Makes a layer's step, and puts the backend's optimizer in the place of the layer's."""

    backend: ModuleType

    def __call__(self, layer: Layer) -> Step:
        body, why = _closed_form(layer, self.backend)
        promised = body is not None and body.gives_every_gradient
        layer.optimizer = self.optimizer_of(layer, every_gradient=promised)
        if body is not None:
            return FusedStep(layer, self.backend, body)
        if not why and not needs_pass(layer.rule):
            body, why = opened_body(layer, self.backend)
            if body is not None:
                return OpenStep(layer, body)
        step = LogitsStep(layer, self.backend) if _gives_logits(layer) else AutogradStep(layer)
        step.why = why or f"the rule {type(layer.rule).__name__} has no closed form"
        return step

    def optimizer_of(self, layer: Layer, *, every_gradient: bool = False) -> Any:
        """The layer's optimizer, as one kernel for all of its parameters where the backend has one for it.

        Args:
            every_gradient: every step gives all of them, by place.
        """
        optimizer = layer.optimizer
        if optimizer is None or gives_sparse(layer.block):
            return optimizer
        owned = [p for group in optimizer.param_groups for p in group["params"]]
        if every_gradient and list(map(id, owned)) != list(map(id, layer.parameters)):
            return optimizer  # of some of them, or in another order
        return fuse_optimizer(self.backend, optimizer, layer.device, every_gradient=every_gradient)


def holds_blocks(layer: Layer) -> bool:
    """It is a whole network, which backpropagation trains."""
    return any(isinstance(module, Block) for module in layer.block.body.modules())


def _closed_form(layer: Layer, backend: ModuleType) -> tuple[GraphBody | None, str]:
    """The layer's step in closed form; or why there is none, empty if the rule has none and the block may have."""
    if layer.needs:
        return None, f"it reads {', '.join(layer.needs)} beside its input"
    if holds_blocks(layer):
        return None, "backpropagation through the whole network"
    if layer.rule.head_arguments() is None:
        return None, ""
    try:
        body = make_body(layer, backend)
    except Untraceable as error:
        return None, str(error)
    parts = [(call.how, call.why) for call in body.calls]
    if all(how == "autograd" for how, _ in parts) and not body.end.parameters:
        return None, "; ".join(why for _, why in parts)
    return body, ""


class FusedStep:
    """One layer's local step in closed form.

    Args:
        backend: a module with the operations of `kernels.reference`.
        body: how the block's own arithmetic runs forward and back, on the same backend.
    """

    def __init__(self, layer: Layer, backend: ModuleType, body: GraphBody) -> None:
        self.layer, self.backend, self.body = layer, backend, body
        self.counts: Sequence[nn.Module] = body.counts
        self._takes_bfloat16 = hasattr(layer.optimizer, "bfloat16_of")
        if self._takes_bfloat16:
            body.casts.bfloat16_of = _copies(layer.optimizer)

    @torch.no_grad()
    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The layer's output after dropout, in `out` if given: shapes as those of `GraphBody.forward`."""
        return self.body.forward(self.layer.own(x), out)

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
        grads: list[Tensor | None] = [*layer.rule.head_gradients(head), *self.body.backward(head.latents_grad)]
        # Those of a bfloat16 cast are bfloat16.
        self._apply(grads if self._takes_bfloat16 else [None if grad is None else grad.float() for grad in grads])
        return head.loss_sum

    def _apply(self, grads: list[Tensor | None]) -> None:
        optimizer = self.layer.optimizer
        if optimizer is None:
            return
        if not isinstance(optimizer, torch.optim.Optimizer):  # a fused one takes them as they are
            optimizer.step(grads)
            return
        for parameter, grad in zip(self.layer.parameters, as_gradients(grads, self.layer.parameters), strict=True):
            parameter.grad = grad
        optimizer.step()


def _copies(optimizer: Any) -> Callable[[Tensor], Tensor]:
    """A weight in bfloat16: the copy that the optimizer keeps of what it trains; what is frozen is cast anew."""
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return lambda weight: optimizer.bfloat16_of(weight) if id(weight) in owned else weight.to(torch.bfloat16)


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
