"""How a layer calls its block: in its precision, with the tensors that it reads beside its input, and on copies of what
it writes into."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from unlocked.kernels.precision import storage_dtype
from unlocked.models import Block, OutputBlock
from unlocked.models.overwriting import Writes

__all__ = ["BlockCalls"]


class BlockCalls:
    """The block of a layer, as the layer and its step call it.

    What a block is given may be an edge's slot, which is read again after a crash; or be read by others of the same
    process: by the rule of the layer before, whose activations it may be, by a later layer, by a second forward. So a
    block that writes into it gets a copy.

    Args:
        block: on its device.
        precision: see `unlocked.kernels.precision`.
        needs: names of the tensors that the block's body takes beside its input.
        writes: what the block writes into.
    """

    def __init__(
        self, block: Block, device: torch.device, precision: str, needs: Sequence[str], writes: Writes
    ) -> None:
        self.block, self.device, self.is_output = block, device, block.is_output
        self._storage = storage_dtype(precision)
        self.computes_in_bfloat16 = self._storage == torch.bfloat16 and not isinstance(block, OutputBlock)
        self.needs, self._writes = tuple(needs), writes
        self._beside: Mapping[str, Tensor] = {}

    @property
    def beside(self) -> Mapping[str, Tensor]:
        """What the block reads beside its input, for one call. Whoever calls `forward` sets it before, of the
        micro-batch that comes next."""
        written = self._writes.beside
        if not written:
            return self._beside
        return {name: value.clone() if name in written else value for name, value in self._beside.items()}

    @beside.setter
    def beside(self, values: Mapping[str, Tensor]) -> None:
        self._beside = values

    def own(self, x: Tensor) -> Tensor:
        """The block's input [B, ...] for one call: a copy, with the same strides, where the block writes into it."""
        return x.clone() if self._writes.input else x

    def body(self, x: Tensor) -> Tensor:
        """The activations of the input [B, ...], which stays as it is."""
        return cast(Tensor, self.block.body(self.own(x), **self.beside))

    def tail(self, activations: Tensor) -> Tensor:
        """What the next layer reads of the activations, which stay as they are."""
        return cast(Tensor, self.block.tail(activations.clone() if self._writes.activations else activations))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, the block's modules compute in the layer's precision. No casts are kept: a graph may be capturing."""
        if not self.computes_in_bfloat16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def leaving(self, output: Tensor) -> Tensor:
        """The output in the type that the next layer reads; class scores are float32."""
        if self._storage == torch.float32:
            return output
        return output.float() if self.is_output else output.to(self._storage)

    def _entering(self, x: Tensor) -> Tensor:
        """The input as an edge would bring it, in the type that the layer computes with."""
        if self._storage == torch.float32 or not x.is_floating_point():
            return x
        x = x.to(self._storage)
        return x if self.computes_in_bfloat16 else x.float()
