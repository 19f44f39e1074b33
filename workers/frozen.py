"""What of a block stays in eval mode while it trains."""

from torch import nn

__all__ = ["frozen_modules"]


def frozen_modules(block: nn.Module) -> list[nn.Module]:
    """What the user has put into eval mode, and the normalisations whose weights all need no gradient: there a frozen
    BatchNorm keeps its running statistics, and normalises by them."""
    return [m for m in block.modules() if not m.training or _is_frozen_norm(m)]


def _is_frozen_norm(module: nn.Module) -> bool:
    parameters = list(module.parameters(recurse=False))
    is_norm = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
    return is_norm and bool(parameters) and not any(p.requires_grad for p in parameters)
