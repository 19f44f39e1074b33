"""The local step of any rule of activations and targets on a block in closed form: autograd follows the rule alone.

The rule sees the activations without a graph behind them; the gradient that it leaves there goes back through the
block's own operations (`workers.graph`), which keep less, and compute less, than autograd would.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from unlocked.workers.graph.body import GraphBody
from unlocked.workers.graph.joins import make_body
from unlocked.workers.graph.tracing import Untraceable
from unlocked.workers.layer import AutogradStep, Layer

__all__ = ["OpenStep", "as_gradients", "opened_body"]


def opened_body(layer: Layer, backend: ModuleType, root: nn.Module | None = None) -> tuple[GraphBody | None, str]:
    """The layer's block in closed form up to its activations; or why there is none, empty elsewhere than on a CPU.

    Args:
        root: the part of the block that is meant, from its input on; None: all of it.
    """
    if layer.device.type != "cpu":
        return None, ""  # on a GPU autograd's kernels are as few
    part = layer.block.body if root is None else root
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
        return self.body.forward(self.layer.own(x), out)

    def take_activations(self) -> Tensor:
        """What the rule sees, float32; its gradient is where the block's begin."""
        with torch.no_grad():
            seen = self.body.latents().detach()
            if seen.dim() == 3:  # rows may have their channels together: rules may ask for a view
                seen = seen.contiguous()
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
            made = as_gradients([grad if seen.grad is not None else None for grad in grads], self.body.trained)
            for parameter, grad in zip(self.body.trained, made, strict=True):
                if grad is not None:
                    parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        optimizer.step()


def as_gradients(grads: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """A closed form's gradients as `parameter.grad`, float32 and laid out like the parameters.

    Optimizers may write into them (the schedule-free ones of the library do). So each must be a tensor of its own, and
    none that an operation keeps, as the zeros of a bias in front of BatchNorm are: vectors are copied, and what two
    summands share.
    """
    made: list[Tensor | None] = []
    given: set[int] = set()
    for grad, parameter in zip(grads, parameters, strict=True):
        if grad is None:
            made.append(None)
            continue
        channels_last = parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        one = grad.float().contiguous(memory_format=layout)
        one = one.clone() if one.dim() <= 1 or one.data_ptr() in given else one
        given.add(one.data_ptr())
        made.append(one)
    return made
