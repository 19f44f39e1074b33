"""Named tensors of the data, such as a mask: which block reads which, and how far each of them travels.

A block reads what its body's `forward` takes by name after its input; a name without a default has to be there.
"""

import inspect
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from unlocked.models import Block
from unlocked.rules import Carried, Task, Tokens

__all__ = ["check_all_read", "find_needs", "rows_of", "travelling"]

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def find_needs(blocks: Sequence[Block], beside: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """Of each block, the names of the tensors that it reads beside its input.

    Raises:
        ValueError: a block takes a tensor that the data does not bring (names both); or a module takes one that the
            nn.Sequential around it would not hand on.
    """
    found = []
    for block in blocks:
        named = _taken(block.body)
        missing = [one.name for one in named if one.default is one.empty and one.name not in beside]
        if missing and beside:
            raise ValueError(
                f"layer {block.name} reads {', '.join(missing)} beside its input, which the data does not bring; there "
                f"is {', '.join(beside)}: give batches with that key, or the parameter a default"
            )
        if missing:
            raise ValueError(
                f"layer {block.name} reads {', '.join(missing)} beside its input, but the data has one tensor per "
                "sample; give batches as dicts of named tensors, or the parameter a default"
            )
        _refuse_hidden(block, beside)
        found.append(tuple(one.name for one in named if one.name in beside))
    return found


def check_all_read(
    blocks: Sequence[Block], needs: Sequence[Sequence[str]], beside: Mapping[str, Tensor], task: Task
) -> None:
    """Every tensor of the data has a reader: a layer, or the task, which takes tokens' targets by their mask.

    Raises:
        ValueError: one has none; names it, and what layers can read.
    """
    read = {"attention_mask"} if isinstance(task, Tokens) else set()
    unread = [name for name in beside if name not in read.union(*needs)]
    if not unread:
        return
    readable = list(dict.fromkeys(one.name for block in blocks for one in _taken(block.body)))
    raise ValueError(
        f"the data brings {', '.join(unread)}, which no layer reads; beside their input the layers read "
        f"{', '.join(readable) or 'nothing'}: give a layer's forward() a parameter of that name, or leave the key out"
    )


def _taken(module: nn.Module) -> list[inspect.Parameter]:
    """What its forward takes by name after its input."""
    _, *others = [*inspect.signature(_as_written(module).forward).parameters.values(), None][:-1] or [None]
    return [one for one in others if one is not None and one.kind in _BY_NAME]


def _as_written(module: nn.Module) -> nn.Module:
    """Without what torch.compile has put around it, whose forward takes anything."""
    inner = getattr(module, "_orig_mod", None)
    return _as_written(inner) if isinstance(inner, nn.Module) else module


def _refuse_hidden(block: Block, beside: Mapping[str, Tensor]) -> None:
    waiting = [block.body]
    for holder in waiting:
        if type(holder).forward is not nn.Sequential.forward:
            continue
        for child in holder.children():
            if names := [one.name for one in _taken(child) if one.name in beside]:
                raise ValueError(
                    f"layer {block.name} holds a {type(_as_written(child)).__name__} that reads {', '.join(names)} in "
                    "an nn.Sequential, which hands on its input alone; make it a layer by itself, or put both into a "
                    f"module whose forward(x, {', '.join(names)}) passes it on"
                )
            waiting.append(child)


def travelling(needs: Sequence[Sequence[str]], beside: Mapping[str, Tensor]) -> tuple[Mapping[str, Carried], ...]:
    """What of the data's tensors travels on from each layer to the next one: whatever a later layer reads. The first
    entry is what comes in with the samples."""
    forms = {name: Carried(tuple(one.shape[1:]), one.dtype, per_sample=True) for name, one in beside.items()}
    later: set[str] = set()
    found: list[Mapping[str, Carried]] = []
    for names in reversed(needs):
        later |= set(names)
        found.append({name: forms[name] for name in forms if name in later})
    return tuple(reversed(found))


def rows_of(beside: Mapping[str, Tensor], names: Sequence[str], rows: int) -> dict[str, Tensor]:
    """Micro-batches of copies of one row of each."""
    return {name: beside[name].expand(rows, *beside[name].shape[1:]).clone() for name in names}
