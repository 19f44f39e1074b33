"""One specialisation of a kernel, as data: what the kernels' files list and `aot.py` compiles ahead of time."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["AotSpec"]


@dataclass(frozen=True)
class AotSpec:
    """One specialisation of one kernel.

    `signature` names the type of every argument that is not in `constexprs`: "*fp32", "*bf16", "i32", "fp32"; an
    integer that is a multiple of 16 may say so ("i32:16"). Pointers are taken to be 16-byte aligned, as torch's
    allocations are. `constexprs` holds constants, jit functions, and None for a pointer that is not given.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
