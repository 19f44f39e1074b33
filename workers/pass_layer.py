"""A layer whose rule takes whole passes, and its local step: by autograd, or with the block in closed form.

In closed form the activations that the rule sees still have a graph, of one node, with which a rule may do all that it
may with the block's own. What `GraphBody` can't give, a second way back or a gradient of the gradient, or has lost as
the rule wrote into the activations, is made of a second forward of the block, with the same draws.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from unlocked.kernels.philox import Purpose, philox_int
from unlocked.kernels.vocabulary import using
from unlocked.models.generators import mixed
from unlocked.rules import Carried, LayerPass, OutputHead
from unlocked.workers.drawing import DrawingLayer
from unlocked.workers.fused import FusedSteps, holds_blocks
from unlocked.workers.graph.body import GraphBody
from unlocked.workers.heads import PiecewiseHead, SplitBody, head_of, split_body
from unlocked.workers.layer import AutogradStep, Layer, StepFactory, as_delivered
from unlocked.workers.open_step import as_gradients, opened_body
from unlocked.workers.rule_convolutions import convolving

__all__ = ["OpenPassStep", "PassHeadStep", "PassLayer", "PassStep"]


class _Given(NamedTuple):
    """What a pass has from outside its layer."""

    epoch: int
    labels: Tensor
    carried: Mapping[str, Tensor]


class PassLayer(DrawingLayer):
    """Arguments as `DrawingLayer`. Whoever calls `forward` says by `begin` what the micro-batch brings."""

    def __init__(self, *args: Any, step: StepFactory | None = None, **options: Any) -> None:
        self._given: _Given | None = None
        self.lr_factor = 1.0
        super().__init__(*args, **options, step=_pass_step(step))
        self._pass_key = philox_int(self.info.seed, Purpose.RULE, self.info.index, 2)

    def begin(self, epoch: int, labels: Tensor, carried: Mapping[str, Tensor]) -> None:
        """The training micro-batch that comes next.

        Args:
            labels: [B], of the samples.
            carried: what arrives on the side channel.
        """
        self._given = _Given(epoch, labels, carried)

    def new_pass(self, x: Tensor, activations: Tensor) -> LayerPass:
        """The rule's view of a micro-batch whose forward is done."""
        assert self._given is not None, "forward without a begin"
        epoch, labels, carried = self._given
        self._given = None
        return LayerPass(
            input=x,
            activations=activations,
            labels=labels,
            block=self.block.body,
            step=self._steps,
            epoch=epoch,
            lr_factor=self.lr_factor,
            carried=carried,
            key=mixed(self._pass_key, self._steps),
            forward=self._forward_again,
            head=self.step.head_given() if isinstance(self.step, PassHeadStep) else None,
        )

    @torch.no_grad()
    def carry(self) -> Mapping[str, Tensor]:
        """What leaves on the side channel with the last `forward`.

        Raises:
            ValueError: it is not what the rule declares; names the tensor.
        """
        declared = self.rule.carries
        if not declared:
            return {}
        step = self.step
        assert isinstance(step, PassStep)
        with self._generators.keyed(mixed(self._bases["carry"], self._steps)):
            made = self.rule.carry(step.current())
        return _checked(made, declared)

    def set_lr_factor(self, factor: float) -> None:
        super().set_lr_factor(factor)
        self.lr_factor = factor

    def repeated(self, x: Tensor) -> Callable[[], Tensor]:
        """Does the training forward of `x`, which comes now, once more when it is called: with the same draws, through
        autograd, and with the block's buffers as they are left by the first."""
        key = mixed(self._bases["train"], self._steps)

        def again() -> Tensor:
            buffers = [(buffer, buffer.clone()) for buffer in self.block.body.buffers()]
            with self._generators.keyed(key):
                activations = self._forward_again(x)
            for buffer, value in buffers:
                buffer.data.copy_(value)  # autograd keeps running statistics, and would find them changed
            return activations

        return again

    def _forward_again(self, x: Tensor) -> Tensor:
        with self.autocast(), self.group_norms.active():
            activations: Tensor = self.block.body(x, **self.beside)
        return activations.float() if activations.dtype == torch.bfloat16 else activations


def _pass_step(other: StepFactory | None) -> StepFactory:
    """Builds such steps; with `other`, that of a backend, in closed form where block and rule allow it."""

    def build(layer: Layer) -> PassStep:
        in_pieces = layer.rule.reads_head and layer.is_output and layer.task.name == "tokens"
        if not isinstance(other, FusedSteps):
            return PassHeadStep(layer) if in_pieces and head_of(layer.block) is not None else PassStep(layer)
        layer.optimizer = other.optimizer_of(layer)
        if in_pieces and head_of(layer.block) is not None:
            return PassHeadStep(layer)
        if not layer.rule.needs_graph or layer.needs or holds_blocks(layer):
            return PassStep(layer)
        body, why = opened_body(layer, other.backend)
        if body is not None:
            return OpenPassStep(layer, body)
        step = PassStep(layer)
        step.why = f"{step.why}; {why}" if why else step.why
        return step

    return build


class PassStep(AutogradStep):
    """The local step of a rule that takes whole passes."""

    layer: PassLayer

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.why = f"the rule {type(layer.rule).__name__} takes whole passes"
        self._pass: LayerPass | None = None

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        layer, x = self.layer, x.detach()
        with torch.set_grad_enabled(layer.rule.needs_graph), layer.autocast(), layer.group_norms.active():
            activations = self.activate(x)
        with torch.set_grad_enabled(layer.rule.needs_graph):
            seen = activations.float() if activations.dtype == torch.bfloat16 else activations
        self.begin_pass(x, seen)
        with torch.no_grad():
            result = layer.leaving(layer.block.finish(activations.detach()))
            return result if out is None else out.copy_(result)

    def activate(self, x: Tensor) -> Tensor:
        """The activations as the rule sees them."""
        found: Tensor = self.layer.block.body(x, **self.layer.beside)
        return found

    def begin_pass(self, x: Tensor, seen: Tensor) -> None:
        """The rule's turn comes next, with these activations."""
        self._pass, self._version = self.layer.new_pass(x, seen), seen._version

    def current(self) -> LayerPass:
        """The micro-batch between `forward` and `update`."""
        assert self._pass is not None, "no forward before"
        return self._pass

    def update(self, labels: Tensor) -> Tensor:
        layer, one = self.layer, self.current()
        self._pass = None
        for parameter in layer.parameters:
            parameter.grad = None
        with torch.set_grad_enabled(layer.rule.needs_graph), using(layer.kernels), convolving(layer.kernels):
            loss = layer.rule.step(one)
            if not isinstance(loss, Tensor):
                raise ValueError(f"step() gives {type(loss).__name__}; it is the mean loss, a scalar tensor")
            if one.activations._version != self._version:
                self._check_delivered(one.activations)
            if loss.requires_grad:
                loss.backward()
        if layer.optimizer is not None:
            layer.optimizer.step()
        with torch.no_grad():
            return self.tell(loss.detach(), one, labels)

    @torch.no_grad()
    def _check_delivered(self, changed: Tensor) -> None:
        """
        Raises:
            ValueError: the next layer reads the activations as they are, so that a rule can't write into them.
        """
        delivered = self.layer.block.finish(changed.detach())
        if delivered.untyped_storage().data_ptr() == changed.untyped_storage().data_ptr():
            raise ValueError(
                f"step() of {type(self.layer.rule).__name__} writes into the activations, which the next layer reads "
                "as well; write into a copy (`activations.clone()`)"
            )

    def tell(self, loss: Tensor, one: LayerPass, labels: Tensor) -> Tensor:
        """Adds the micro-batch to the layer's totals; the sum of its losses."""
        return self.layer.account(loss, one.activations, labels)


class PassHeadStep(PiecewiseHead, PassStep):
    """The same at an output layer whose rule makes the scores in pieces."""

    layer: PassLayer

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.split = cast(SplitBody, split_body(layer.block))

    def head_given(self) -> OutputHead:
        hits = torch.zeros((), dtype=torch.float64, device=self.layer.device)
        return OutputHead(self.head.weight, self.head.bias, hits)

    def activate(self, x: Tensor) -> Tensor:
        return self.hidden(x)

    def tell(self, loss: Tensor, one: LayerPass, labels: Tensor) -> Tensor:
        assert one.head is not None
        return self.account(loss, one.head.hits, labels)


class OpenPassStep(PassStep):
    """The same with the block's own arithmetic by `body`."""

    def __init__(self, layer: Layer, body: GraphBody) -> None:
        super().__init__(layer)
        self.body, self.counts = body, body.counts
        self.rest = self.why
        self.unread = body.unread
        body.note_rest()
        self._trains = [(p, p.requires_grad) for p in layer.block.body.parameters()]
        self._forward = 0  # which one `body` keeps the state of

    @property
    def trains_as_built(self) -> bool:
        """No parameter was frozen or set free since."""
        return all(parameter.requires_grad == trains for parameter, trains in self._trains)

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The layer's output, in `out` if given."""
        if not self.trains_as_built:
            return self._forward_by_autograd(x, out)
        x = x.detach()
        with torch.no_grad():
            result = self.body.forward(x, out)
            made = self.body.latents().detach()
            if made.dim() == 3:  # rows may have their channels together: rules may ask for a view
                made = made.contiguous()
        self._forward += 1
        with torch.enable_grad():
            way = _Way(self, x, made, self.layer.repeated(x))
            seen = cast(Tensor, _ThroughBody.apply(way, *self.body.trained))
        self.begin_pass(x, seen)
        return result

    def _forward_by_autograd(self, x: Tensor, out: Tensor | None) -> Tensor:
        result = super().forward(x, out)
        with torch.no_grad():
            for norm in self.counts:  # which have counted by themselves now
                if isinstance(count := norm.num_batches_tracked, Tensor):
                    count -= 1
        return result

    def update(self, labels: Tensor) -> Tensor:
        found = super().update(labels)
        self._forward += 1
        self.body.drop()
        return found

    def spend(self, number: int, grad: Tensor) -> Sequence[Tensor | None] | None:
        """The parameters' gradients from that of the activations, laid out as they are; None: what they are made of is
        gone."""
        if number != self._forward:
            return None
        self._forward += 1
        with torch.no_grad():
            return as_gradients(self.body.backward(grad), self.body.trained)


class _Way:
    """From the activations of one micro-batch back to the block's parameters.

    Args:
        again: the block's activations once more, through autograd, leaving its buffers as they are.
    """

    def __init__(self, step: OpenPassStep, x: Tensor, activations: Tensor, again: Callable[[], Tensor]) -> None:
        self._step, self._again, self._number = step, again, step._forward
        self.activations, self._version = activations, activations._version
        self._read = [(x, x._version), *((p, p._version) for p in step.body.trained if p.dim() > 1)]
        # Vectors are few numbers: a rule may change a bias or a norm as it likes.
        self._vectors = [(p, p._version, p.detach().clone()) for p in step.body.trained if p.dim() <= 1]

    def back(self, grad: Tensor) -> Sequence[Tensor | None]:
        plain = not (torch.is_grad_enabled() or _is_batched(grad))
        found = None
        if plain and self._step.trains_as_built and self.activations._version == self._version:
            if grad.stride() != self.activations.stride():
                grad = torch.empty_like(self.activations).copy_(grad)
            self._check([one for one in self._read if id(one[0]) not in self._step.unread])
            with self._vectors_as_they_were():
                found = self._step.spend(self._number, grad)
        return self._by_autograd(grad) if found is None else found

    def _by_autograd(self, grad: Tensor) -> list[Tensor | None]:
        differentiable = torch.is_grad_enabled()
        self._check(self._read)
        if differentiable:  # gradients of gradients would be those of what vectors are now
            self._check([(p, version) for p, version, _ in self._vectors])
        trained = self._step.body.trained
        still = [p for p in trained if p.requires_grad]
        with torch.enable_grad(), contextlib.nullcontext() if differentiable else self._vectors_as_they_were():
            made = torch.autograd.grad(self._again(), still, grad, create_graph=differentiable, allow_unused=True)
        found = {id(p): one for p, one in zip(still, made, strict=True)}
        return [found.get(id(p)) for p in trained]

    def _check(self, given: Sequence[tuple[Tensor, int]]) -> None:
        """
        Raises:
            RuntimeError: what the way back reads was written into, as in autograd.
        """
        for tensor, version in given:
            if tensor._version != version:
                what = "a parameter" if isinstance(tensor, torch.nn.Parameter) else "the input"
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{what} of the layer {self._step.layer.name}, {list(tensor.shape)}; change it after the way back"
                )

    @contextlib.contextmanager
    def _vectors_as_they_were(self) -> Iterator[None]:
        changed = [(p, p.detach().clone(), before) for p, version, before in self._vectors if p._version != version]
        for parameter, _, before in changed:
            parameter.data.copy_(before)
        try:
            yield
        finally:
            for parameter, now, _ in changed:
                parameter.data.copy_(now)


def _is_batched(grad: Tensor) -> bool:
    """It stands for several, in `torch.func` or by `is_grads_batched`."""
    return torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(grad)


class _ThroughBody(torch.autograd.Function):
    """The activations, as made of the parameters."""

    @staticmethod
    def forward(ctx: Any, way: _Way, *parameters: Tensor) -> Tensor:
        ctx.way = way
        return way.activations.detach()  # the same tensor would hold the graph that holds it

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.way.back(grad))


def _checked(made: Mapping[str, Tensor], declared: Mapping[str, Carried]) -> dict[str, Tensor]:
    if not isinstance(made, Mapping) or made.keys() != declared.keys():
        got = ", ".join(map(str, made)) if isinstance(made, Mapping) else type(made).__name__
        raise ValueError(f"carry() gives {got or 'nothing'}; the rule declares that it carries {', '.join(declared)}")
    tensors = {}
    for name, one in declared.items():
        value = made[name]
        if not isinstance(value, Tensor) or value.dtype != one.dtype or tuple(value.shape[1:]) != tuple(one.shape):
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            rows = "samples" if one.per_sample else "rows"
            raise ValueError(
                f"carry() gives {got} under the name {name!r}; declared is {one.dtype} [{rows}, "
                f"{', '.join(map(str, one.shape))}]"
            )
        tensors[name] = as_delivered(value.detach())
    return tensors
