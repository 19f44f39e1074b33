"""What a run leaves to its user: all trained weights in the user's own module, and by that module's names."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unlocked.data import Dataset, ImageDataset
from unlocked.models import architecture_of, plain_module
from unlocked.runtime.network import Model, Network
from unlocked.runtime.result import RunResult
from unlocked.runtime.tensors import give_strides

__all__ = ["KeptModel", "describe_kept"]


class KeptModel:
    """The user's module, and which of its entries is which of a run's weights. Make it before the run: an engine may
    put other tensors in the place of some buffers."""

    def __init__(self, model: Model, network: Network) -> None:
        self.module = plain_module(model)
        named = {
            id(value): f"{name}.block.{key}"
            for name, block in zip(network.names, network.blocks, strict=True)
            for key, value in block.state_dict(keep_vars=True).items()
        }
        entries = _entries(self.module)
        self._sources = {key: named.get(id(value)) for key, value in entries.items()}
        self._strides = {key: value.stride() for key, value in entries.items()}

    def take(self, result: RunResult, about: Mapping[str, Any]) -> None:
        """Copies the run's weights into the module, which has then the memory format of before, and gives the result
        their plain names."""
        if not result.is_complete:
            return
        with torch.no_grad():
            for key, value in _entries(self.module).items():
                source = self._sources[key]
                if source is not None:
                    value.copy_(result.weights[source])
                if isinstance(value, nn.Parameter):  # convolutions train with channels last
                    give_strides(value, self._strides[key])
                kept = value.detach().cpu().clone() if source is None else result.weights[source]
                result.plain_weights[key] = kept
        result.about = about


def describe_kept(model: Model, kept: KeptModel, network: Network, train: Dataset, rule: Any) -> dict[str, Any]:
    """What a file of the weights says beside them, as JSON values."""
    images = train if isinstance(train, ImageDataset) and train.images.dtype == torch.uint8 else None
    named = isinstance(train, ImageDataset) and len(train.classes) < 10_000
    return {
        "kind": f"a {type(kept.module).__name__}",
        "architecture": architecture_of(model),
        "layers": network.names,
        "input_shape": list(network.input_shape),
        "input_dtype": str(network.input_dtype).removeprefix("torch."),
        "mean": list(images.mean) if images else [],
        "std": list(images.std) if images else [],
        "num_classes": network.infos[-1].num_classes,
        "classes": list(train.classes) if named and isinstance(train, ImageDataset) else [],
        "rule": rule,
    }


def _entries(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name; a module's extra state, which need be no tensor, is not for us."""
    return {key: value for key, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
