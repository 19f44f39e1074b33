"""What a Triton kernel stores of float32 values: rounded on a GPU, while the interpreter cuts bfloat16 off."""

import torch
from torch import Tensor

__all__ = ["stored"]


def stored(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """`exact`, float32, as `dtype`; of bfloat16 the interpreter keeps the upper half of the bits as they are."""
    if exact.is_cuda or dtype != torch.bfloat16:
        return exact.to(dtype)
    return (exact.view(torch.int32) & -0x10000).view(torch.float32).to(dtype)
