"""Several versions of a stage's weights, of which older ones stay as they are while the newest is updated."""

import copy
from collections.abc import Callable

import torch
from torch import nn

__all__ = ["WeightVersions"]


class WeightVersions:
    """The newest `kept` versions of a module's weights. Version n is that after n updates; 0 is the start.

    Each lies in a copy of the module with weights of its own; buffers (BatchNorm's statistics) are shared by all, in
    the order in which the forward passes come. `parameters`, which an optimizer is built of, always are the newest.

    Args:
        module: becomes the newest version wherever it is used.
        kept: at least 1; with 1 an update is in place.
    """

    def __init__(self, module: nn.Module, kept: int) -> None:
        self.module, self.newest = module, 0
        self.parameters = list(module.parameters())
        self._copies = [module] if kept == 1 else [_with_own_weights(module) for _ in range(kept)]
        self._weights = [list(made.parameters()) for made in self._copies]
        self._point_to_newest()

    def at(self, version: int) -> nn.Module:
        """The module with the weights of a version that is still kept."""
        assert self.newest - len(self._copies) < version <= self.newest, (version, self.newest)
        return self._copies[version % len(self._copies)]

    def weights(self, version: int) -> list[nn.Parameter]:
        """Of `at(version)`, in the order of `parameters`."""
        return self._weights[version % len(self._weights)]

    def advance(self, update: Callable[[], object]) -> None:
        """Makes the next version of the newest one by `update`, which changes `parameters` in place. It takes the place
        of the oldest one: nothing that was computed with that may be open."""
        old, new = self.weights(self.newest), self.weights(self.newest + 1)
        if old is not new and old:
            with torch.no_grad():
                torch._foreach_copy_(tuple(new), tuple(old))
        self.newest += 1
        self._point_to_newest()
        update()

    def restart(self) -> None:
        """What the newest weights are now is version 0."""
        for weights in self._weights:
            with torch.no_grad():
                for own, newest in zip(weights, self.parameters, strict=True):
                    if own.data_ptr() != newest.data_ptr():
                        own.copy_(newest)
        self.newest = 0
        self._point_to_newest()

    def _point_to_newest(self) -> None:
        for parameter, newest in zip(self.parameters, self.weights(self.newest), strict=True):
            if parameter is not newest:
                parameter.data = newest.data


def _with_own_weights(module: nn.Module) -> nn.Module:
    made = copy.deepcopy(module)
    for mine, theirs in zip(made.modules(), module.modules(), strict=True):
        mine._buffers = theirs._buffers
    return made
