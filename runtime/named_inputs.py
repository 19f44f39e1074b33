"""Named tensors of the data, such as a mask: which block reads which, and how far each of them travels.

A block reads what its body's `forward` takes by name after its input; a name without a default has to be there.
"""

import inspect
from collections.abc import Mapping, Sequence

from torch import Tensor

from unlocked.models import Block
from unlocked.rules import Carried

__all__ = ["find_needs", "rows_of", "travelling"]

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def find_needs(blocks: Sequence[Block], beside: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """Of each block, the names of the tensors that it reads beside its input.

    Raises:
        ValueError: a block takes a tensor that the data does not bring; names both.
    """
    found = []
    for block in blocks:
        _, *others = [*inspect.signature(block.body.forward).parameters.values(), None][:-1] or [None]
        named = [one for one in others if one is not None and one.kind in _BY_NAME]
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
        found.append(tuple(one.name for one in named if one.name in beside))
    return found


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
