"""Of an operation that torch dispatches: whether it launches anything, and on what."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

__all__ = ["copies_itself", "is_free", "tensors"]


def is_free(func: Any) -> bool:
    """Views and allocations launch nothing."""
    name = func._schema.name.removeprefix("aten::")
    if name.startswith(("empty", "new_empty", "detach", "_unsafe_view", "lift")) or name.endswith("_like_empty"):
        return True
    returns = [r.alias_info for r in func._schema.returns]
    return any(info is not None and not info.is_write for info in returns)


def copies_itself(func: Any, args: Any) -> bool:
    """`x[2:] += y` ends in a copy of a view to itself, which torch leaves out."""
    if func._schema.name != "aten::copy_":
        return False
    to, source = args[:2]
    same_storage = to.untyped_storage()._cdata == source.untyped_storage()._cdata
    return same_storage and to.storage_offset() == source.storage_offset() and to.stride() == source.stride()


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)
