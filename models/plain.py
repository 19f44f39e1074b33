"""A trained model as one plain module: what is kept, exported and loaded, without anything of a pipeline."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import nn

from unlocked.models.blocks import Block, use_tanh
from unlocked.models.registry import find_model, get_model

__all__ = ["architecture_of", "plain_module", "rebuild"]


def plain_module(model: nn.Sequential | nn.ModuleList | Sequence[nn.Module]) -> nn.Module:
    """The network as its user knows it; shares the model's weights.

    What `split` has cut is the module that was cut, with the names of its own `state_dict`; an nn.Sequential is itself;
    any other list of layers, those of this project's networks among them, is nn.Sequential(*layers).
    """
    if isinstance(model, nn.Sequential):
        return model
    layers = list(model)
    origins = {id(whole): whole for block in layers if (whole := _whole(block)) is not None}
    if len(origins) == 1 and all(_whole(block) is not None for block in layers):
        (whole,) = origins.values()
        held = {id(parameter) for parameter in whole.parameters()}
        # A frozen weight may be a copy of the whole's: an embedding that is tied to a head in another layer.
        trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
        if all(id(parameter) in held for parameter in trained):
            return whole
    return nn.Sequential(*layers)


def architecture_of(model: Iterable[nn.Module]) -> dict[str, Any] | None:
    """What `rebuild` needs, if the model is one of this project's networks and nobody has put other modules into it;
    else None."""
    layers = list(model)
    named = [layer.origin.architecture if isinstance(layer, Block) else None for layer in layers]
    first = named[0] if named else None
    if first is None or any(one != first for one in named):
        return None
    name, sizes = first
    tanh = any(isinstance(module, nn.Tanh) for layer in layers for module in layer.modules())
    plain = {word: _of_python(size) for word, size in sizes.items()}
    architecture = {"model": name, **plain, "image_size": list(sizes["image_size"]), "tanh": tanh}
    with torch.device("meta"):
        fresh = rebuild(architecture)
    return architecture if repr(fresh) == repr(layers) else None


def _of_python(size: Any) -> Any:
    """Whole numbers may be NumPy's, which JSON does not take."""
    return int(size) if isinstance(size, Integral) and not isinstance(size, bool) else size


def rebuild(architecture: Mapping[str, Any]) -> list[Block]:
    """The blocks of the network that `architecture_of` has described, with start values of their own.

    Raises:
        ValueError: there is no network of that name, or a size does not fit it.
    """
    sizes = dict(architecture)
    name, tanh = sizes.pop("model"), sizes.pop("tanh")
    find_model(name)
    blocks = get_model(name, **sizes)
    if tanh:
        use_tanh(blocks)
    return blocks


def _whole(layer: nn.Module) -> nn.Module | None:
    return layer.origin.module if isinstance(layer, Block) else None
