"""What runs when a module is called as a whole: hooks on it, and a forward() that was put into it."""

from torch import nn

__all__ = ["hook_on", "runs_when_called"]

_KINDS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}


def hook_on(module: nn.Module) -> str | None:
    """A hook that a call of `module` runs, in words; None: there is none."""
    for kind, words in _KINDS.items():
        for hook in getattr(module, kind).values():
            return f"a {words} ({getattr(hook, '__qualname__', type(hook).__name__)})"
    return None


def runs_when_called(module: nn.Module) -> str | None:
    """What a call of `module` runs besides the forward() of its class, in words; None: nothing. Whoever calls its parts
    one by one leaves that out."""
    return hook_on(module) or ("a forward() of this one object" if "forward" in vars(module) else None)
