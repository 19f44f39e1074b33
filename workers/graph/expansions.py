"""Modules of torch's that are made of others: what they compute in training, in operations of the table.

Attention's own dropout draws from torch's generator, and masks are others for every caller: with these a module stays
whole, for autograd.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

__all__ = ["expansion_of", "has_expansions"]

_OF_WEIGHTS = {"need_weights", "average_attn_weights"}  # a second result, which is None: whoever reads it is refused


def expansion_of(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[], Any] | None:
    """What gives the module's result for these arguments, in smaller steps; None: it has none that is equal."""
    plain = module.training and not any(map(is_parametrized, module.modules()))
    if not plain:
        return None
    if type(module) is nn.TransformerEncoderLayer:
        usable = _attends(module.self_attn) and (isinstance(module.activation, nn.Module) or _is_known(module))
        masked = any(value is not None and value is not False for value in (*args[1:], *kwargs.values()))
        return (lambda: _encode(module, args[0])) if usable and not masked and args else None
    if type(module) is nn.MultiheadAttention:
        options = {name: value for name, value in kwargs.items() if value is not None and value is not False}
        alone = len(args) == 3 and args[0] is args[1] is args[2] and options.keys() <= _OF_WEIGHTS
        return (lambda: (_attend(module, args[0]), None)) if alone and _attends(module) else None
    return None


def has_expansions(body: nn.Module) -> bool:
    """Something in it may be made of smaller steps, whose sums are rounded otherwise."""
    return any(type(module) in (nn.TransformerEncoderLayer, nn.MultiheadAttention) for module in body.modules())


def _is_known(layer: Any) -> bool:
    return layer.activation in (F.relu, F.gelu)


def _attends(module: Any) -> bool:
    """To the tokens of its own sample, by one product for queries, keys and values, without chance."""
    if type(module) is not nn.MultiheadAttention or not module.batch_first or module.dropout or module.add_zero_attn:
        return False
    own = {name for name, _ in module.named_parameters(recurse=False)}  # an attribute's look-up would be traced
    return "in_proj_weight" in own and "bias_k" not in own


def _attend(module: Any, x: Any) -> Any:
    """Multi-head self-attention (Vaswani et al., NeurIPS 2017) of tokens [B, T, D]."""
    heads, width = module.num_heads, module.embed_dim
    parts = F.linear(x, module.in_proj_weight, module.in_proj_bias).unflatten(-1, (3, heads, width // heads))
    q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
    return module.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _encode(layer: Any, x: Any) -> Any:
    """An encoder's layer with its norms before (Xiong et al., ICML 2020) or after its two parts: tokens [B, T, D]."""
    if layer.norm_first:
        x = x + layer.dropout1(_attend(layer.self_attn, layer.norm1(x)))
        return x + _feed(layer, layer.norm2(x))
    x = layer.norm1(x + layer.dropout1(_attend(layer.self_attn, x)))
    return layer.norm2(x + _feed(layer, x))


def _feed(layer: Any, x: Any) -> Any:
    return layer.dropout2(layer.linear2(layer.dropout(layer.activation(layer.linear1(x)))))
