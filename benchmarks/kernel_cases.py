"""What benchmarks/kernels.py times: every operation of the local step, in every backend and in PyTorch's own modules.

A case is one operation on one shape. Its contenders are functions that take the number of a buffer set and give back a
call; equal numbers hold equal values for all contenders, so that results can be compared. `eager` is what one would
write with torch.nn and autograd, `compile` is torch.compile of that.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from traced_backend import head_work

from unlocked.kernels import reference
from unlocked.kernels.reference import PoolKind, make_basis
from unlocked.models import ConvBlock, DepthwiseBlock, LinearBlock, get_model
from unlocked.runtime.network import build_network

__all__ = ["Call", "Case", "Context", "LayerShape", "head_cases", "layers_of", "norm_act_cases"]

Call = Callable[[], tuple[Tensor, ...]]
Maker = Callable[[int], Call]
CLASSES, TEMPERATURE, SLOPE = 10, 0.5, 0.01


@dataclass(frozen=True)
class Context:
    """Where the cases run, and against what.

    Attributes:
        backends: "triton", "cuda" (as far as they run here) -> their modules.
        compiled: whether torch.compile takes part.
    """

    device: torch.device
    backends: Mapping[str, ModuleType]
    compiled: bool


@dataclass(frozen=True)
class Case:
    """One operation on one shape.

    Attributes:
        bytes: what has to move: inputs read (twice where a reduction over them comes first), outputs written.
        makers: contender -> maker of calls; the first is the reference that the others are compared with (not timed).
    """

    operation: str
    shape: str
    bytes: int
    flops: int
    makers: Mapping[str, Maker]
    unit: str = "fp32"


@dataclass(frozen=True)
class LayerShape:
    """What a layer's operations depend on. `latent_size` 0: inside a depthwise-separable block, with no latents."""

    name: str
    shape: tuple[int, ...]
    latent_size: int
    pool: PoolKind
    pool_size: int

    @property
    def latents(self) -> int:
        return self.shape[1] * (self.latent_size**2 if len(self.shape) == 4 else 1)

    def __str__(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.shape))}"


def layers_of(model: str, batch: int) -> list[LayerShape]:
    """The layers with a closed form, each shape once."""
    blocks = get_model(model, in_channels=3, num_classes=CLASSES, image_size=32)
    network = build_network(blocks, input_shape=(3, 32, 32), num_classes=CLASSES, seed=0)
    found: dict[tuple[Any, ...], LayerShape] = {}
    for block, info in zip(network.blocks, network.infos, strict=True):
        if not isinstance(block, ConvBlock | DepthwiseBlock | LinearBlock):
            continue
        shape, p = (batch, *info.activation_shape), info.latent_size
        if len(shape) == 4 and (shape[2] % p or shape[3] % p):
            continue
        if len(shape) == 2 and p != shape[1]:
            continue
        layers = [LayerShape(block.name, shape, p, block.pool, block.pool_size)]
        if isinstance(block, DepthwiseBlock):
            inner = (batch, block.depthwise.out_channels, *shape[2:])
            layers.append(LayerShape(f"{block.name} inside", inner, 0, "none", 1))
        for layer in layers:
            found.setdefault((layer.shape, layer.latent_size, layer.pool), layer)
    return list(found.values())


# norm_act


def norm_act_cases(layer: LayerShape, context: Context) -> Iterator[Case]:
    """Forward, and the way back: from the latents' gradient, or from that of all activations."""
    size, latents = _bytes(layer.shape), layer.latents if layer.latent_size else 0
    batch = layer.shape[0]
    outputs = size // {"none": 1, "max": 4, "average": 1}[layer.pool]
    if layer.pool == "average":
        outputs = 4 * batch * layer.shape[1] * layer.pool_size**2
    written = outputs + 4 * 3 * batch * latents
    values = size // 4
    yield Case(
        "norm_act_forward",
        str(layer),
        2 * size + written,
        10 * values,
        _makers(context, _forward, _eager_forward, layer),
    )
    if layer.latent_size:
        moved = 2 * size + 4 * 3 * batch * latents
        makers = _makers(context, _backward, _eager_backward, layer)
        yield Case("norm_act_backward", str(layer), moved, 10 * values, makers)
    else:
        makers = _makers(context, _backward_full, _eager_backward_full, layer)
        yield Case("norm_act_backward_full", str(layer), 5 * size, 14 * values, makers)


def _forward(module: ModuleType, layer: LayerShape, context: Context, index: int) -> Call:
    conv, weight, bias, mean, var = norm_inputs(layer, context.device, index)

    def call() -> tuple[Tensor, ...]:
        result = module.norm_act_forward(
            conv, weight, bias, mean, var, latent_size=layer.latent_size, pool=layer.pool, pool_size=layer.pool_size
        )
        return (result.output, result.latents) if layer.latent_size else (result.output,)

    return call


def _eager_forward(wrap: Callable[..., Any], layer: LayerShape, context: Context, index: int) -> Call:
    conv, weight, bias, mean, var = norm_inputs(layer, context.device, index)
    function = wrap(partial(plain_norm_act, layer))

    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = function(conv, weight, bias, mean, var)
        return result

    return call


def _backward(module: ModuleType, layer: LayerShape, context: Context, index: int) -> Call:
    conv, weight, bias, mean, var = norm_inputs(layer, context.device, index)
    grad = _random((layer.shape[0], layer.latents), context.device, index + 500) * 1e-3
    forward = reference.norm_act_forward(conv, weight, bias, mean, var, latent_size=layer.latent_size)
    saved = (forward.mean, forward.rstd, weight, bias, forward.mask_sums, forward.mask_xhat_sums)

    def call() -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = module.norm_act_backward(grad, conv, *saved, latent_size=layer.latent_size)
        return result

    return call


def _eager_backward(wrap: Callable[..., Any], layer: LayerShape, context: Context, index: int) -> Call:
    inputs = norm_inputs(layer, context.device, index)
    learned = [t.requires_grad_() for t in inputs[:3]]
    grad = _random((layer.shape[0], layer.latents), context.device, index + 500) * 1e-3
    # Autograd runs a node on the stream of its forward pass, so the graph is made here, on the stream of the capture.
    latents = wrap(partial(plain_norm_act, layer))(*inputs)[1]

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(latents, learned, grad, retain_graph=True)

    return call


def _backward_full(module: ModuleType, layer: LayerShape, context: Context, index: int) -> Call:
    conv, weight, bias, mean, var = norm_inputs(layer, context.device, index)
    grad = _random(layer.shape, context.device, index + 500)
    forward = reference.norm_act_forward(conv, weight, bias, mean, var, latent_size=0)

    def call() -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = module.norm_act_backward_full(grad, conv, forward.mean, forward.rstd, weight, bias)
        return result

    return call


def _eager_backward_full(wrap: Callable[..., Any], layer: LayerShape, context: Context, index: int) -> Call:
    inputs = norm_inputs(layer, context.device, index)
    learned = [t.requires_grad_() for t in inputs[:3]]
    grad = _random(layer.shape, context.device, index + 500)
    output = wrap(partial(plain_norm_act, layer))(*inputs)[0]

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, learned, grad, retain_graph=True)

    return call


def plain_norm_act(
    layer: LayerShape, conv: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor, ...]:
    """(output, latents) as torch.nn's modules compute them."""
    y = F.leaky_relu(F.batch_norm(conv, mean, var, weight, bias, training=True), SLOPE)
    output = y
    if layer.pool == "max":
        output = F.max_pool2d(y, 2)
    elif layer.pool == "average":
        output = F.adaptive_avg_pool2d(y, layer.pool_size)
    if not layer.latent_size:
        return (output,)
    return output, F.adaptive_avg_pool2d(y, layer.latent_size).flatten(1) if y.dim() == 4 else y


# The head


def head_cases(layer: LayerShape, context: Context, hand: Callable[..., Any] | None = None) -> Iterator[Case]:
    """The local head of LLS, LLS_M and LLS_MxM. `hand`: a head written for LLS alone."""
    batch, dim = layer.shape[0], layer.latents
    for rule, modulation in (("LLS", 0), ("LLS_M", CLASSES), ("LLS_MxM", CLASSES**2)):
        makers = _makers(context, partial(_head, rule), partial(_eager_head, rule), layer)
        if rule == "LLS" and hand is not None and dim & (dim - 1) == 0:
            makers |= {"hand": partial(_hand_head, hand, layer, context)}
        moved, flops = head_work(batch, dim, CLASSES, CLASSES, modulation)
        yield Case(f"local_head {rule}", f"{layer.name} {batch}x{dim}", moved, flops, makers)


def head_inputs(rule: str, layer: LayerShape, device: torch.device, index: int) -> tuple[Tensor, ...]:
    """(latents, labels, basis, modulation if there is one)."""
    latents = _random((layer.shape[0], layer.latents), device, index + 1000)
    labels = _random((layer.shape[0],), device, index + 2000).mul(100).long().abs() % CLASSES
    basis = make_basis(CLASSES, layer.latents, device=device)
    shape = {"LLS": None, "LLS_M": (CLASSES,), "LLS_MxM": (CLASSES, CLASSES)}[rule]
    return (latents, labels, basis) if shape is None else (latents, labels, basis, _random(shape, device, 3000))


def _head(rule: str, module: ModuleType, layer: LayerShape, context: Context, index: int) -> Call:
    inputs = head_inputs(rule, layer, context.device, index)
    totals = torch.zeros(2, dtype=torch.float64, device=context.device)

    def call() -> tuple[Tensor, ...]:
        result = module.local_head(*inputs, temperature=TEMPERATURE, totals=totals)
        grads = (result.latents_grad, result.modulation_grad)
        return (result.loss_sum, *(g for g in grads if g is not None))

    return call


def _eager_head(rule: str, wrap: Callable[..., Any], layer: LayerShape, context: Context, index: int) -> Call:
    latents, labels, basis, *rest = head_inputs(rule, layer, context.device, index)
    learned = [t.requires_grad_() for t in (latents, *rest)]
    totals = torch.zeros(2, dtype=torch.float64, device=context.device)
    function = wrap(plain_head)

    def call() -> tuple[Tensor, ...]:
        loss, correct = function(latents, labels, basis, *rest)
        grads = torch.autograd.grad(loss, learned)
        with torch.no_grad():
            loss_sum = loss.detach() * latents.shape[0]
            totals[0] += loss_sum
            totals[1] += correct
        return loss_sum, *grads

    return call


def plain_head(
    latents: Tensor, labels: Tensor, basis: Tensor, modulation: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(mean loss, correct rows) as one writes it with autograd."""
    scores = F.normalize(latents, dim=1, eps=1e-12) @ basis.T
    if modulation is not None:
        scores = scores * modulation if modulation.dim() == 1 else scores @ modulation
    return F.cross_entropy(scores / TEMPERATURE, labels), (scores.argmax(1) == labels).sum()


def _hand_head(hand: Callable[..., Any], layer: LayerShape, context: Context, index: int) -> Call:
    latents, labels, basis = head_inputs("LLS", layer, context.device, index)
    totals = torch.zeros(2, dtype=torch.float64, device=context.device)

    def call() -> tuple[Tensor, ...]:
        result = hand(latents, labels, basis, temperature=TEMPERATURE, totals=totals)
        return result.loss_sum, result.latents_grad

    return call


# Tools


def norm_inputs(layer: LayerShape, device: torch.device, index: int) -> tuple[Tensor, ...]:
    """(convolution's output, weight, bias, running mean, running variance); images channels-last."""
    channels = layer.shape[1]
    weight = _random((channels,), device, index + 100).abs() + 0.5
    bias = _random((channels,), device, index + 200)
    conv = _random(layer.shape, device, index)
    return conv, weight, bias, torch.zeros(channels, device=device), torch.ones(channels, device=device)


def _makers(
    context: Context, ours: Callable[..., Call], eager: Callable[..., Call], layer: LayerShape
) -> dict[str, Maker]:
    makers: dict[str, Maker] = {"reference": partial(ours, reference, layer, context)}
    for name, module in context.backends.items():
        makers[name] = partial(ours, module, layer, context)
    makers["eager"] = partial(eager, _as_it_is, layer, context)
    if context.compiled:
        makers["compile"] = partial(eager, compiled, layer, context)
    return makers


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for one shape."""
    return torch.compile(function, dynamic=False)


def _random(shape: tuple[int, ...], device: torch.device, key: int) -> Tensor:
    """Normal values that depend on shape and key alone; images channels-last."""
    generator = torch.Generator(device).manual_seed(key)
    values = torch.randn(shape, generator=generator, device=device)
    return values.to(memory_format=torch.channels_last) if len(shape) == 4 else values


def _bytes(shape: tuple[int, ...]) -> int:
    return 4 * torch.Size(shape).numel()
