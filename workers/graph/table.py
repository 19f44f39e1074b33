"""From a traced node to its operation, or the reason why it is left to autograd."""

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from unlocked.models import KeyedDropout
from unlocked.workers.graph.attention import Attention
from unlocked.workers.graph.operations import (
    Add,
    Casts,
    Convolution,
    Dropout,
    Elementwise,
    Flatten,
    GroupNorm,
    LayerNorm,
    Operation,
    Pool,
)
from unlocked.workers.graph.products import Linear, Product
from unlocked.workers.graph.shapes import Moved, Reshaped, Sizes, is_size
from unlocked.workers.graph.tracing import Node, has_hooks

__all__ = ["name_of", "operation_of", "slope_of", "usable_norm"]

aten = torch.ops.aten


def operation_of(node: Node, casts: Casts) -> Operation | str:
    """The operation of `node` alone; or why the table has none, in a few words."""
    target = node.target
    if isinstance(target, nn.Module):
        if has_hooks(target):
            return "hooks are set on it"
        if is_parametrized(target):
            return "its weights are parametrised"
    if is_size(node):
        return Sizes(node)
    made: Operation | str | None = None
    maker = _BY_KIND.get(node.kind)
    if maker is not None and not any(isinstance(value, Node) for value in node.kwargs.values()):
        made = maker(node, casts)
    return f"{name_of(node)} is not in the table" if made is None else made


def name_of(node: Node) -> str:
    """What an operation is called: the module's class, or the function."""
    if isinstance(node.target, nn.Module):
        return type(node.target).__name__
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def slope_of(node: Node) -> float | None:
    """Of a ReLU (0) or leaky ReLU; None: it is neither."""
    target = node.target
    if isinstance(target, nn.Module) and has_hooks(target):
        return None
    if node.kind is nn.LeakyReLU:
        return float(target.negative_slope)
    if node.kind is nn.ReLU or node.kind in (F.relu, torch.relu, F.relu_, torch.relu_, "relu", "relu_"):
        return 0.0
    if node.kind is F.leaky_relu:
        slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
        return None if isinstance(slope, Node) else float(slope)
    return None


def usable_norm(node: Node) -> str:
    """Why the kernels can't take this BatchNorm; empty: they can."""
    norm = node.target
    if has_hooks(norm):
        return "hooks are set on it"
    if is_parametrized(norm):
        return "its weights are parametrised"
    if not norm.affine or not norm.track_running_stats or norm.momentum is None:
        return "a BatchNorm without weights, running statistics or momentum"
    return ""


def _convolution(node: Node, casts: Casts) -> Operation | str:
    conv = node.target
    if isinstance(conv.padding, str):
        return f"it pads by {conv.padding!r}"
    if conv.padding_mode != "zeros":
        return f"it pads by {conv.padding_mode}"
    return Convolution(conv, casts)


def _max_pool(node: Node, casts: Casts) -> Operation | str:
    p = node.target
    if p.return_indices:
        return "it returns indices"
    sizes = (p.kernel_size, p.stride, p.padding, p.dilation)
    options = [*(list(_pair(size)) for size in sizes), p.ceil_mode]

    def backward(grad: Tensor, x: Tensor, indices: Any) -> Tensor:
        return aten.max_pool2d_with_indices_backward(grad, x, *options, indices)

    return Pool(lambda x: aten.max_pool2d_with_indices(x, *options), backward)


def _average_pool(node: Node, casts: Casts) -> Operation:
    p = node.target
    options = [list(_pair(p.kernel_size)), list(_pair(p.stride)), list(_pair(p.padding))]
    options += [p.ceil_mode, p.count_include_pad, p.divisor_override]
    return Pool(
        lambda x: (aten.avg_pool2d(x, *options), None), lambda grad, x, _: aten.avg_pool2d_backward(grad, x, *options)
    )


def _adaptive_pool(node: Node, casts: Casts) -> Operation:
    size = node.target.output_size
    return Pool(
        lambda x: (F.adaptive_avg_pool2d(x, size), None),
        lambda grad, x, _: aten._adaptive_avg_pool2d_backward(grad, x),
    )


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _add(node: Node, casts: Casts) -> Operation | None:
    both = len(node.args) == 2 and not node.kwargs and all(isinstance(value, Node) for value in node.args)
    return Add() if both and not any(map(is_size, node.inputs)) else None


def _flatten(node: Node, casts: Casts) -> Operation | None:
    if isinstance(node.target, nn.Module):
        return Flatten(node.target.forward)
    numbers = [*node.args[1:], *node.kwargs.values()]
    if not all(isinstance(number, int) for number in numbers):
        return None
    first, *rest = node.args
    return Flatten(lambda x: torch.flatten(x, *rest, **node.kwargs)) if isinstance(first, Node) else None


def _attention(node: Node, casts: Casts) -> Operation | str:
    options = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    given = options | dict(zip(options, node.args[3:], strict=False)) | dict(node.kwargs)
    causal, scale = given.pop("is_causal"), given.pop("scale")
    plain = isinstance(causal, bool) and (scale is None or isinstance(scale, int | float))
    if not plain or any(given[name] != options.get(name, given) for name in given):
        return "attention with a mask, a dropout or grouped queries"
    return Attention(casts, causal=causal, scale=scale) if casts.device == "cpu" else "attention on a GPU"


def _product(node: Node, casts: Casts) -> Operation | None:
    plain = len(node.args) in (2, 3) and all(isinstance(value, Node) or value is None for value in node.args)
    return Product(casts) if plain and not node.kwargs and node.args[0] is not node.args[1] else None


def _reshaped(node: Node, casts: Casts) -> Operation:
    return Reshaped(node)


def _moved(node: Node, casts: Casts) -> Operation | None:
    first, *rest = node.args
    orders = list(rest[0]) if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
    if not isinstance(first, Node) or node.kwargs or not all(isinstance(number, int) for number in orders):
        return None
    if node.target in ("permute", torch.permute):
        back = sorted(range(len(orders)), key=lambda i: orders[i] % len(orders))
        return Moved(lambda x: x.permute(orders), lambda grad: grad.permute(back))
    return Moved(lambda x: x.transpose(*orders), lambda grad: grad.transpose(*orders))


def _leaky(node: Node, casts: Casts) -> Operation | None:
    slope = slope_of(node)
    if slope is None:
        return None
    if slope == 0.0:
        return Elementwise(torch.relu, lambda grad, y: aten.threshold_backward(grad, y, 0), keeps_result=True)
    return Elementwise(partial(F.leaky_relu, negative_slope=slope), partial(_leaky_backward, slope))


def _leaky_backward(slope: float, grad: Tensor, x: Tensor) -> Tensor:
    result: Tensor = aten.leaky_relu_backward(grad, x, slope, False)
    return result


def _gelu(node: Node, casts: Casts) -> Operation | None:
    target = node.target
    how: Any = target.approximate if isinstance(target, nn.Module) else node.kwargs.get("approximate", "none")
    if len(node.args) > 1 and not isinstance(target, nn.Module):
        return None
    return Elementwise(partial(F.gelu, approximate=how), lambda grad, x: aten.gelu_backward(grad, x, approximate=how))


def _plain(function: Callable[[Tensor], Tensor], derivative: Callable[..., Any], *, keeps_result: bool = False) -> Any:
    """The maker of an elementwise function without options."""
    return lambda node, casts: Elementwise(function, derivative, keeps_result=keeps_result)


def _with(function: Callable[..., Tensor], derivative: Callable[..., Any], *options: str) -> Any:
    """The maker of an elementwise module with these attributes as its function's and its derivative's options."""

    def make(node: Node, casts: Casts) -> Operation:
        values = [getattr(node.target, name) for name in options]
        return Elementwise(lambda x: function(x, *values), lambda grad, x: derivative(grad, x, *values))

    return make


def _elu(node: Node, casts: Casts) -> Operation:
    alpha = node.target.alpha
    return Elementwise(partial(F.elu, alpha=alpha), lambda grad, x: aten.elu_backward(grad, alpha, 1.0, 1.0, False, x))


_SILU = _plain(F.silu, aten.silu_backward)
_TANH = _plain(torch.tanh, aten.tanh_backward, keeps_result=True)
_SIGMOID = _plain(torch.sigmoid, aten.sigmoid_backward, keeps_result=True)
_BY_KIND: Mapping[Any, Callable[[Node, Casts], Operation | str | None]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d), _convolution),
    **dict.fromkeys((nn.Linear, NonDynamicallyQuantizableLinear), lambda node, casts: Linear(node.target, casts)),
    F.linear: _product,
    nn.LayerNorm: lambda node, casts: LayerNorm(node.target),
    nn.GroupNorm: lambda node, casts: GroupNorm(node.target),
    **dict.fromkeys((nn.ReLU, nn.LeakyReLU, F.relu, F.leaky_relu, torch.relu, "relu", "relu_"), _leaky),
    **dict.fromkeys((nn.GELU, F.gelu), _gelu),
    **dict.fromkeys((nn.SiLU, F.silu), _SILU),
    **dict.fromkeys((nn.Tanh, torch.tanh, F.tanh, "tanh"), _TANH),
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid"), _SIGMOID),
    nn.ELU: _elu,
    nn.Mish: _plain(F.mish, aten.mish_backward),
    nn.Hardswish: _plain(F.hardswish, aten.hardswish_backward),
    nn.Hardsigmoid: _plain(F.hardsigmoid, aten.hardsigmoid_backward),
    **dict.fromkeys((nn.Hardtanh, nn.ReLU6), _with(F.hardtanh, aten.hardtanh_backward, "min_val", "max_val")),
    nn.Softplus: _with(F.softplus, aten.softplus_backward, "beta", "threshold"),
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _average_pool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _add),
    **dict.fromkeys((nn.Flatten, torch.flatten, "flatten"), _flatten),
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys(("view", "reshape", "unsqueeze", "squeeze", "contiguous", "unflatten"), _reshaped),
    **dict.fromkeys((torch.reshape, torch.unsqueeze, torch.squeeze), _reshaped),
    **dict.fromkeys(("permute", "transpose", torch.permute, torch.transpose), _moved),
    KeyedDropout: lambda node, casts: Dropout(node.target),
}
"""By the module's class (itself, no subclass), the function, or the method's name."""
