"""A user's model as blocks: one per layer, with names."""

from collections.abc import Sequence

from torch import nn

from unlocked.models import Block
from unlocked.models.hooks import runs_when_called

__all__ = ["Model", "blocks_of"]

Model = nn.Sequential | nn.ModuleList | Sequence[nn.Module]
"""The layers in order: `unlocked.models.Block`s, or any modules."""


def blocks_of(model: Model) -> list[Block]:
    """The model's modules as blocks; a Sequential's own names are kept, numbers become the class's name.

    Raises:
        ValueError: no layers, one module that says nothing of its layers, an entry that is no module, two layers of one
            name; hooks on the list itself or on a block, or a forward() of its own.
    """
    if isinstance(model, nn.Module) and not isinstance(model, nn.Sequential | nn.ModuleList):
        raise ValueError(
            f"the model is one {type(model).__name__}; say where its layers begin, with "
            "unlocked.models.split(model, at=[...]), or give an nn.Sequential or a list of modules"
        )
    _refuse_code_around(model)
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
            _refuse_code_of_block(module)
            blocks.append(module)
        else:
            kind = f"{type(module).__name__.lower()}{number}"
            blocks.append(Block.wrap(module, kind if name.isdigit() or not name else name))
    names = [block.name for block in blocks]
    if len(set(names)) != len(names):
        raise ValueError(f"layer names must differ from each other, got {names}")
    return blocks


def _refuse_code_around(model: Model) -> None:
    """The layers are called one by one: what a list of them does around that would silently be left out."""
    plain = nn.Sequential.forward if isinstance(model, nn.Sequential) else nn.Module.forward
    if not isinstance(model, nn.Module):
        return
    kind = type(model).__name__
    if type(model).forward is not plain:
        base = "nn.Sequential" if isinstance(model, nn.Sequential) else "nn.ModuleList"
        raise ValueError(
            f"the model's class {kind} is an {base} with a forward() of its own, which its layers one by one would not "
            f"run; cut it with unlocked.models.split(model, at=[...]), or give a plain {base}"
        )
    if what := runs_when_called(model):
        raise ValueError(
            f"the model, a {kind}, has {what}, which its layers one by one would not run; remove it, or hang it on a "
            "layer"
        )


def _refuse_code_of_block(block: Block) -> None:
    """Its body and its tail are called, in training one by one."""
    what = runs_when_called(block)
    if type(block).forward is not Block.forward:
        what = "a forward() of its own"
    if what:
        raise ValueError(
            f"layer {block.name} is a block that has {what}, which training would not run, as it calls the block's "
            "body and tail; put that on or into block.body"
        )
