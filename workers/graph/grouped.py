"""GroupNorm, the activation after it, and at a block's end the latents, on a backend's kernels."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from unlocked.workers.graph.body import Call, PlainEnd
from unlocked.workers.graph.gelu import is_gelu, is_silu
from unlocked.workers.graph.operations import Convolution, Gradients, GroupNorm, Operation
from unlocked.workers.graph.products import Linear
from unlocked.workers.graph.table import slope_of
from unlocked.workers.graph.tracing import Node

__all__ = ["Grouped", "GroupedEnd", "grouped", "grouped_end"]

Operations = Callable[[Node], Operation | str]
"""A node's own operation; or why it has none."""


def grouped(norm: Node, output: Node, operation_of: Operations, backend: ModuleType) -> Call | None:
    """A GroupNorm inside a block, with the activation after it if nobody else reads what it gives; None: `norm` is none
    that the backend takes.

    Args:
        output: the block's last operation.
    """
    if not _is_usable(norm, operation_of, backend):
        return None
    after = norm.users[0] if len(norm.users) == 1 and norm is not output else None
    given = None if after is None else _activation(after, operation_of)
    covers = [norm] if after is None or given is None else [norm, after]
    operation = _made(covers, output, operation_of, backend, given)
    how, why = ("closed", "") if len(covers) == 1 else ("joined", "in one pass")
    return Call(operation, norm.inputs, covers[-1:], covers, how, why)  # type: ignore[arg-type]


def grouped_end(
    output: Node,
    plain: tuple[Any, ...],
    ending: Sequence[Node],
    shape: Sequence[int],
    operation_of: Operations,
    backend: ModuleType,
) -> Call | None:
    """The end of a block whose last operations are a GroupNorm and, maybe, an activation, with the latents; None: it is
    another.

    Args:
        output: the block's last operation.
        plain: what a `PlainEnd` takes.
        ending: what the end stands for beside these operations.
        shape: of one sample's activations.
    """
    given, side = _activation(output, operation_of), plain[1]
    norm = output if given is None else output.inputs[0]
    alone = not output.users and (norm is output or norm.users == [output])
    even = side is not None and len(shape) == 3 and not any(length % side for length in shape[1:])
    if not alone or not even or not _is_usable(norm, operation_of, backend):
        return None
    covers = list(dict.fromkeys((norm, output)))
    inside = _made(covers, output, operation_of, backend, given, latent_size=side)
    return Call(GroupedEnd(inside, *plain), norm.inputs, [], [*covers, *ending], "joined", "in one pass each way")


def _is_usable(norm: Node, operation_of: Operations, backend: ModuleType) -> bool:
    if norm.kind is not nn.GroupNorm or not backend.ABILITIES.groups or not norm.target.affine:
        return False
    return isinstance(operation_of(norm), GroupNorm)  # nobody looks on, nothing is parametrised


def _activation(node: Node, operation_of: Operations) -> dict[str, Any] | None:
    """What the kernels call it; None: they don't have it, or the library has it in no form that we know."""
    if isinstance(operation_of(node), str):
        return None
    slope = slope_of(node)
    if slope is not None:
        return {"activation": "leaky_relu", "negative_slope": slope}
    if is_gelu(node):
        return {"activation": "gelu"}
    return {"activation": "silu"} if is_silu(node) else None


def _made(
    covers: Sequence[Node],
    output: Node,
    operation_of: Operations,
    backend: ModuleType,
    given: dict[str, Any] | None,
    **options: Any,
) -> "Grouped":
    norm = covers[0]
    (before,) = norm.inputs
    fresh = isinstance(operation_of(before), Convolution | Linear)  # neither keeps what it gives
    owns = fresh and len(before.users) == 1 and before is not output
    library = [one for one in map(operation_of, covers) if isinstance(one, Operation)]
    return Grouped(norm.target, given or {}, library, backend, owns_input=owns, **options)


class Grouped(Operation):
    """Keeps nothing but what it reads. Images are taken into channels-last memory; what the kernels don't take (other
    types, more dimensions, rows that lie otherwise) goes to the library.

    Args:
        norm: with affine parameters.
        given: the activation, as `group_act_forward` takes it; empty: there is none.
        library: GroupNorm and the activation as the library has them.
        owns_input: nobody else reads what is normalised, so `backward` may overwrite it.
        latent_size: p, if latents are made of p x p windows and `backward` begins at their gradient, else 0.
    """

    def __init__(
        self,
        norm: nn.GroupNorm,
        given: dict[str, Any],
        library: Sequence[Operation],
        backend: ModuleType,
        *,
        owns_input: bool,
        latent_size: int = 0,
    ) -> None:
        self._groups, self._eps, self._library, self._backend = norm.num_groups, norm.eps, library, backend
        self._options = given | {"latent_size": latent_size}
        # A module looks its parameters up anew each time.
        self._vectors: tuple[Tensor, Tensor] = (norm.weight, norm.bias)
        self.parameters, self._owns_input = library[0].parameters, owns_input
        self.latents: Tensor | None = None
        """Of the last `forward`, [B, C p p] float32; None: the kernels did not make them."""
        self._state: tuple[Tensor, ...] | None = None  # None: the library computes

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...]; `backward` may overwrite it."""
        self._state = self.latents = None
        image = self._image(x)
        if image is None:
            for operation in self._library:
                x = operation.forward(x)
            return x
        self._may_write = self._owns_input or image.data_ptr() != x.data_ptr()
        result = self._backend.group_act_forward(image, self._groups, *self._vectors, eps=self._eps, **self._options)
        self._state = (image, result.mean, result.rstd)
        self.latents = result.latents if self._options["latent_size"] else None
        output: Tensor = result.output.view(x.shape)
        return output

    def _image(self, x: Tensor) -> Tensor | None:
        """`x` as the kernels take it, [B, C, H, W]; None: they don't."""
        plain = all(one.dtype == torch.float32 and one.is_contiguous() for one in self._vectors)
        if not plain or x.dim() > 4 or x.dtype not in (torch.float32, torch.bfloat16):
            return None
        image = _as_image(x)
        lies = image.is_contiguous(memory_format=torch.channels_last)
        if not lies and x.dim() == 4:
            return image.contiguous(memory_format=torch.channels_last)
        return image if lies else None

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        """From the gradient at every activation, or from the latents', [B, C p p]."""
        if self._state is None:
            return self._by_library(grad)
        image, *statistics = self._state
        self._state = self.latents = None
        shape = grad.shape
        if self._options["latent_size"]:
            grad, shape = grad.float(), image.shape
        else:
            grad = _as_image(grad).to(image.dtype).contiguous(memory_format=torch.channels_last)
        place = image if self._may_write else None
        given, *grads = self._backend.group_act_backward(
            grad, image, *statistics, *self._vectors, **self._options, out=place
        )
        pairs = zip(self._vectors, grads, strict=True)
        return [given.view(shape) if wanted[0] else None], [g for p, g in pairs if p.requires_grad]

    def _by_library(self, grad: Tensor) -> Gradients:
        for operation in self._library[:0:-1]:
            (grad,), _ = operation.backward(grad, [True])  # type: ignore[assignment]
        return self._library[0].backward(grad, [True])


def _as_image(x: Tensor) -> Tensor:
    """[B, C] and [B, C, L] as one row of pixels."""
    return x.reshape(*x.shape[:2], *[1] * (4 - x.dim()), *x.shape[2:])


class GroupedEnd(PlainEnd):
    """The same at a block's end: no gradient of the activations' size is made of the latents'.

    Args:
        inside: makes latents.
    """

    def __init__(self, inside: Grouped, *plain: Any) -> None:
        super().__init__(*plain)
        self._inside, self.parameters = inside, inside.parameters

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> what leaves the block."""
        return super().forward(self._inside.forward(x), out)

    def latents(self) -> Tensor:
        """[B, C p p]."""
        made = self._inside.latents
        return super().latents() if made is None else made

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        if self._inside.latents is None:
            (grad,), _ = super().backward(grad, [True])  # type: ignore[assignment]
        self._activations = None
        return self._inside.backward(grad, wanted)
