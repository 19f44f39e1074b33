"""A user's model as blocks: one per layer, with names."""

from collections.abc import Sequence

from torch import nn

from unlocked.models import Block

__all__ = ["Model", "blocks_of"]

Model = nn.Sequential | nn.ModuleList | Sequence[nn.Module]
"""The layers in order: `unlocked.models.Block`s, or any modules."""


def blocks_of(model: Model) -> list[Block]:
    """The model's modules as blocks; a Sequential's own names are kept, numbers become the class's name.

    Raises:
        ValueError: no layers, one module that says nothing of its layers, an entry that is no module, or two layers of
            one name.
    """
    if isinstance(model, nn.Module) and not isinstance(model, nn.Sequential | nn.ModuleList):
        raise ValueError(
            f"the model is one {type(model).__name__}; say where its layers begin, with "
            "unlocked.models.split(model, at=[...]), or give an nn.Sequential or a list of modules"
        )
    named = list(model.named_children()) if isinstance(model, nn.Module) else [("", m) for m in model]
    if isinstance(model, nn.Sequential | nn.ModuleList) and len(named) != len(model):
        named = [(str(i), m) for i, m in enumerate(model)]  # named_children leaves a second use of a module out
    if not named:
        raise ValueError("the model has no layers; give at least an output layer that maps to the classes")
    blocks = []
    for number, (name, module) in enumerate(named, start=1):
        if not isinstance(module, nn.Module):
            raise ValueError(f"entry {number} of the model is a {type(module).__name__}; every layer is an nn.Module")
        if isinstance(module, Block):
            blocks.append(module)
        else:
            kind = f"{type(module).__name__.lower()}{number}"
            blocks.append(Block.wrap(module, kind if name.isdigit() or not name else name))
    names = [block.name for block in blocks]
    if len(set(names)) != len(names):
        raise ValueError(f"layer names must differ from each other, got {names}")
    return blocks
