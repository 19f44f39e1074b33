"""Dropout whose mask depends on a key alone, so that a layer drops the same elements wherever it runs."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.kernels.philox import Purpose, keyed_uniform

__all__ = ["KeyedDropout", "kept_dropout_keys", "replace_dropout", "set_dropout_keys"]

# Elements are counted from index * 2**40, so that no two dropouts of a layer share a stream: in units of 2**32.
_APART = 1 << 8
_CHANNEL_DROPOUTS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class _Key(NamedTuple):
    seed: int
    layer: int
    microbatch: Tensor | int


class KeyedDropout(nn.Dropout):
    """Zeroes elements with probability `p` and scales the others by 1 / (1 - p); the identity in eval mode.

    With a key, that is in a run, the mask is a function of (seed, layer, micro-batch, index) and of an element's place
    in the tensor's logical order ([B, C, H, W], whatever the memory format). There is no generator, hence no state to
    save. Without a key it draws from torch's global generator, as the module whose place it takes: in a user's own
    training, and where one draws in evaluation.

    Args:
        p: probability in [0, 1].
        per_channel: draw once per [B, C] pair, as torch.nn.Dropout2d does, instead of once per element.
        index: which of its layer's dropouts this is; `replace_dropout` counts them.

    Raises:
        ValueError: `p` is no probability.
    """

    inplace = False  # it never is; on the class, as a module's settings are what its instance holds

    def __init__(self, p: float = 0.5, *, per_channel: bool = False, index: int = 0) -> None:
        nn.Module.__init__(self)
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"dropout is a probability in [0, 1], got {p}")
        self.p = p
        self.per_channel = per_channel
        self.index = index
        self._key: _Key | None = None

    def set_key(self, seed: int, layer: int, microbatch: Tensor | int) -> None:
        """Key the masks from now on.

        `microbatch` is an int64 scalar tensor on the activations' device. It is kept, not read: whoever advances it
        in place (a captured CUDA graph, say) gets the next mask.
        """
        self._key = _Key(seed, layer, microbatch)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if self._key is None:
            return torch.feature_dropout(x, self.p, True) if self.per_channel else F.dropout(x, self.p, True)
        # `x` comes first: a product takes the memory format of its first operand.
        return x * self.mask(x)

    def mask(self, x: Tensor) -> Tensor:
        """What `x` is multiplied by in training: 0 or 1 / (1 - p), of its type; [B, C, 1, ...] per channel.

        Raises:
            ValueError: no key was set.
        """
        if self._key is None:
            raise ValueError(
                "KeyedDropout has no key to make a mask of: call set_key(seed, layer, microbatch) before, or forward()"
            )
        shape = torch.Size((*x.shape[:2], *[1] * (x.dim() - 2))) if self.per_channel else x.shape
        count = shape.numel()
        counter = torch.arange(-(-count // 4), device=x.device)
        seed, layer, microbatch = self._key
        draws = keyed_uniform(seed, Purpose.DROPOUT, counter, major=microbatch, minor=layer, high=self.index * _APART)
        keep = draws.reshape(-1)[:count].view(shape) >= self.p
        scale = 0.0 if self.p == 1.0 else 1.0 / (1.0 - self.p)
        return (keep * scale).to(x.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}, per_channel={self.per_channel}, index={self.index}"


def replace_dropout(module: nn.Module) -> nn.Module:
    """Swap torch's dropout modules inside `module` for keyed ones, in place; returns it (or its replacement).

    Dropout becomes per element, Dropout1d, 2d and 3d per channel. All keyed dropouts are then numbered in the order
    of `module.modules()`. Their subclasses, alpha dropout and function calls inside someone's forward() stay as they
    are: their draws are keyed around the layer (`unlocked.models.chance`).
    """
    if (keyed := _keyed(module)) is not None:
        return keyed
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if (keyed := _keyed(child)) is not None:
                parent.add_module(name, keyed)
    for index, dropout in enumerate(_dropouts(module)):
        dropout.index = index
    return module


def set_dropout_keys(module: nn.Module, seed: int, layer: int, microbatch: Tensor | int) -> None:
    """`set_key` on every keyed dropout inside `module`."""
    for dropout in _dropouts(module):
        dropout.set_key(seed, layer, microbatch)


@contextlib.contextmanager
def kept_dropout_keys(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Afterwards every keyed dropout inside them has the key of before, if it had one: a run's key is the run's alone,
    and a clock that stands still would give one mask for ever."""
    kept = [(dropout, dropout._key) for module in modules for dropout in _dropouts(module)]
    try:
        yield
    finally:
        for dropout, key in kept:
            dropout._key = key


def _dropouts(module: nn.Module) -> list[KeyedDropout]:
    return [m for m in module.modules() if isinstance(m, KeyedDropout)]


def _keyed(module: nn.Module) -> KeyedDropout | None:
    """The keyed twin of one of torch's dropout modules, or None for any other module."""
    kind = type(module)  # exactly: a subclass may compute something else
    if kind is nn.Dropout or kind in _CHANNEL_DROPOUTS:
        assert isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d)
        keyed = KeyedDropout(module.p, per_channel=kind in _CHANNEL_DROPOUTS)
        return keyed.train(module.training)
    return None
