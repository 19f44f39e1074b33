"""The local step of any rule of activations and targets on a block in closed form: autograd follows the rule alone.

The rule sees the activations without a graph behind them; the gradient that it leaves there goes back through the
block's own operations (`workers.graph`), which keep less, and compute less, than autograd would.
"""

from types import ModuleType

import torch
from torch import Tensor, nn

from unlocked.workers.graph.body import GraphBody
from unlocked.workers.graph.joins import make_body
from unlocked.workers.graph.tracing import Untraceable
from unlocked.workers.layer import AutogradStep, Layer

__all__ = ["OpenStep", "as_gradient", "opened_body"]


def opened_body(layer: Layer, backend: ModuleType, root: nn.Module | None = None) -> tuple[GraphBody | None, str]:
    """The layer's block in closed form up to its activations; or why there is none, empty elsewhere than on a CPU.

    Args:
        root: the part of the block that is meant, from its input on; None: all of it.
    """
    if layer.device.type != "cpu":
        return None, ""  # on a GPU autograd's kernels are as few
    part = root or layer.block.body
    if not any(p.requires_grad for p in part.parameters()):
        return None, "nothing in it trains"
    try:
        body = make_body(layer, backend, opened=True, root=root)
    except Untraceable as error:
        return None, str(error)
    parts = [(call.how, call.why) for call in body.calls]
    if all(how == "autograd" for how, _ in parts):
        return None, "; ".join(why for _, why in parts)
    return body, ""


class OpenStep(AutogradStep):
    """Forward and back by `body`; between them the rule, by autograd."""

    def __init__(self, layer: Layer, body: GraphBody) -> None:
        super().__init__(layer)
        self.body, self.counts = body, body.counts
        self.rest = f"the rule {type(layer.rule).__name__} has no closed form"
        self._seen: Tensor | None = None

    @torch.no_grad()
    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The layer's output, in `out` if given."""
        return self.body.forward(x, out)

    def take_activations(self) -> Tensor:
        """What the rule sees, float32; its gradient is where the block's begin."""
        with torch.no_grad():
            seen = self.body.latents().detach()
        self._seen = seen.requires_grad_()
        return self._seen

    def descend(self, loss: Tensor) -> None:
        optimizer, seen = self.layer.optimizer, self._seen
        assert seen is not None
        self._seen = None
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            given = torch.zeros_like(seen) if seen.grad is None else seen.grad
            grads = self.body.backward(given)  # which drops what it has kept
            for parameter, grad in zip(self.body.trained, grads, strict=True):
                if grad is not None and seen.grad is not None:
                    given_to = as_gradient(grad.float(), parameter)
                    parameter.grad = given_to if parameter.grad is None else parameter.grad + given_to
        optimizer.step()


def as_gradient(grad: Tensor, parameter: Tensor) -> Tensor:
    """A closed form's gradient as `parameter.grad`, laid out like the parameter.

    Optimizers may write into it (the schedule-free ones of the library do), so that it must not be one that an
    operation keeps, as the zeros of a bias in front of BatchNorm are: vectors are copied.
    """
    if grad.dim() == 1:
        return grad.clone()
    channels_last = parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
    return grad.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
