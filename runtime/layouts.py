"""Which dimension of a block's activations holds its features, told by the operations that made them.

[B, X, Y] may be C channels of L samples (a 1-d convolution's) or T tokens of D features (attention's). A block is run
once at set-up while every torch function that it calls is watched: convolutions, batch normalisation and pools have
their channels first, linear maps, layer normalisation, embeddings, attention and recurrent layers have their features
last; views and transpositions move them, and elementwise operations leave them. Where this leads nowhere, nothing is
assumed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from unlocked.kernels.reference import Layout

__all__ = ["LayoutWatch"]

_DIMS: Mapping[Layout, int] = {"channels_first": 1, "tokens": 2}
_PER_CHANNEL = (
    *("batch_norm", "instance_norm", "group_norm", "interpolate", "lp_pool1d", "lp_pool2d"),
    *(f"{kind}_pool{n}d" for kind in ("avg", "max", "adaptive_avg", "adaptive_max") for n in (1, 2)),
)
# Results whose features are the second dimension: whatever the input was called, or only if it is not known as another.
_CHANNELS_FIRST = {f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)}
_CHANNELS_KEPT = {f"{name}{end}" for name in _PER_CHANNEL for end in ("", "_with_indices")} - {
    "interpolate_with_indices"
}
# The same for the last dimension.
_FEATURES_LAST = {
    *("embedding", "multi_head_attention_forward", "scaled_dot_product_attention"),
    *("lstm", "gru", "rnn_tanh", "rnn_relu"),
}
_FEATURES_KEPT = {"linear", "bilinear", "layer_norm", "rms_norm"}
_TRANSPOSED = {"transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "__get__"}  # .T and .mT
_RESHAPED = {"view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze"}
_UNCLEAR = (
    -1
)  # the features' dimension where two operations speak of different ones; it sticks, as not knowing does not
_MIXED = {"matmul", "bmm", "baddbmm", "einsum", "tensordot", "__matmul__", "__rmatmul__", "unfold", "fold"}


class LayoutWatch(TorchFunctionMode):
    """While it is entered, follows the features' dimension of every tensor that a torch function makes."""

    def __init__(self) -> None:
        super().__init__()
        self._features: Any = WeakTensorKeyDictionary()  # Tensor -> dimension

    def declare(self, x: Tensor, layout: Layout | None) -> None:
        """Says what `x` is, if anybody knows."""
        self._set(x, None if layout is None else _DIMS[layout])

    def layout_of(self, x: Tensor) -> Layout | None:
        """Of [B, X, Y]; None where nothing tells, and for tensors of any other number of dimensions."""
        feature = self._features.get(x) if x.dim() == 3 else None
        return next((layout for layout, dim in _DIMS.items() if dim == feature), None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").removesuffix("_") if not _is_dunder(func) else func.__name__
        known = {id(x): (x.shape, self._features.get(x)) for x in _tensors([*args, *kwargs.values()])}
        result = func(*args, **kwargs)
        for made in _tensors([result]):
            self._set(made, self._feature(func, name, args, kwargs, list(known.values()), made))
        return result

    def _set(self, x: Tensor, feature: int | None) -> None:
        if feature is not None:
            self._features[x] = feature
        elif x in self._features:
            del self._features[x]

    def _feature(
        self,
        func: Callable[..., Any],
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        known: Sequence[tuple[torch.Size, int | None]],
        made: Tensor,
    ) -> int | None:
        """The features' dimension of `made`, from the arguments' shapes and features before the call."""
        if made.dim() < 2 or not known:
            return None
        last = made.dim() - 1
        shape, first = known[0]
        if name in _CHANNELS_FIRST:
            return 1
        if name in _CHANNELS_KEPT:
            return 1 if first in (None, 1) else _UNCLEAR
        if name in _FEATURES_LAST:
            return last
        if name in _FEATURES_KEPT:
            over = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
            if name.endswith("norm") and len(over) != 1:
                return first
            return last if first in (None, len(shape) - 1) else _UNCLEAR
        if name in _MIXED:
            return None
        if name in _TRANSPOSED:
            return first if first in (None, _UNCLEAR) else _moved(func, args, kwargs, first, len(shape))
        if name in _RESHAPED:
            return _kept(shape, first, made.shape)
        if name == "__getitem__" and not all(isinstance(i, slice | EllipsisType) for i in _row(args[1])):
            return None
        features = {feature for size, feature in known if feature is not None and len(size) == made.dim()}
        return _UNCLEAR if len(features) > 1 else features.pop() if features else None


def _moved(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], feature: int, dims: int
) -> int | None:
    """Where the transposition takes the dimension: seen on a tensor all of whose sizes differ."""
    probe = torch.empty(*range(2, 2 + dims), device="meta")
    try:
        moved = func(probe, *args[1:], **{key: value for key, value in kwargs.items() if key != "input"})
    except (RuntimeError, TypeError, IndexError):
        return None
    shape = list(moved.shape) if isinstance(moved, Tensor) else []
    return shape.index(2 + feature) if 2 + feature in shape else None


def _kept(before: torch.Size, feature: int | None, after: torch.Size) -> int | None:
    """The dimension after a view of the same values in the same order, where it is still whole."""
    if feature in (None, _UNCLEAR):
        return feature
    if before[: feature + 1] == after[: feature + 1]:
        return feature
    from_end = len(before) - feature
    is_whole = from_end <= len(after) and before[feature:] == after[len(after) - from_end :]
    return len(after) - from_end if is_whole else None


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """All tensors in nested lists and tuples that have a shape yet."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found += [] if is_lazy(value) else [value]
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _row(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _is_dunder(func: Callable[..., Any]) -> bool:
    return getattr(func, "__name__", "").endswith("__")
